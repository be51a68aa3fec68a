"""What each figure was expected to be before anything was measured, for one H100 (80 GB, SXM) and 16 cores of its host.

They come from arithmetic: operations over the rates that others have published for such a card, bytes over its
memory's bandwidth, decoding at 6 to 7 ms an image and core. None was measured. A figure outside its range is the
interesting one.
"""

from dataclasses import dataclass

MOST_WAITS = 2  # of the host within a training step on one GPU


@dataclass(frozen=True)
class Prediction:
    """A range, both ends included."""

    low: float
    high: float

    def text(self) -> str:
        """Return the range as in a table."""
        return f"{self.low:g}" if self.low == self.high else f"{self.low:g} to {self.high:g}"

    def verdict(self, value: float) -> str:
        """Return how a measurement lies to the range."""
        if self.low <= value <= self.high:
            return "as predicted"
        if value < self.low:
            return "below" if not self.low else f"{value / self.low:.2f} x the lower end"
        return "above" if not self.high else f"{value / self.high:.2f} x the upper end"


KERNEL_PREDICTIONS = {
    "product 8192 x 8192 x 8192 in bfloat16": Prediction(680, 810),
    "product 8192 x 8192 x 8192 in float32": Prediction(45, 60),
    "copy of 2 GB, read and written": Prediction(2.6, 3.1),
    "host, a call of stats": Prediction(20, 90),
    "host, a call of softmax_grad": Prediction(15, 60),
    "host, a call of sigmoid": Prediction(40, 120),
    "host, a call of distill_stats": Prediction(60, 200),
    "host, a call of distill_grad": Prediction(30, 100),
    "host, a call of distill_sigmoid": Prediction(60, 180),
    "host, a call of add_rows": Prediction(8, 30),
    "host, a call of add_cols": Prediction(8, 30),
    "stats 4096 x 4096 x 768, 128x128": Prediction(240, 290),  # mma.sync at 63 % of the peak, L2 at 3.2 to 3.5 TB/s
    "stats 4096 x 4096 x 768, 128x256": Prediction(330, 410),
    "stats 4096 x 2048 x 768, library": Prediction(360, 430),
    "softmax_grad 4096 x 4096 x 768, 128x128": Prediction(230, 270),
    "softmax_grad 4096 x 4096 x 768, 128x256": Prediction(330, 400),
    "softmax_grad 4096 x 2048 x 768, library": Prediction(315, 380),
    "sigmoid 4096 x 4096 x 768, 128x128": Prediction(215, 260),
    "sigmoid 4096 x 4096 x 768, 128x256": Prediction(310, 380),
    "sigmoid 4096 x 2048 x 768, library": Prediction(300, 365),
    "distill_stats 4096 x 4096 x 768, 1 teachers": Prediction(230, 370),  # 70 to 90 us of products, 134 MB read again
    "distill_grad 4096 x 4096 x 768, 1 teachers": Prediction(300, 420),
    "distill_sigmoid 4096 x 4096 x 768, 1 teachers": Prediction(240, 370),
    "add_rows 4096 x 4096 x 768, 128x256": Prediction(480, 570),
    "add_cols 4096 x 4096 x 768, 128x256": Prediction(480, 570),
    "softmax 4096 x 4096 x 768, 128x128, 4 passes": Prediction(310, 360),
    "softmax 4096 x 4096 x 768, 128x256, 4 passes": Prediction(400, 470),
}
LOSS_PREDICTIONS = {
    "softmax, B 32768 D 768": Prediction(14.5, 18),  # 4 passes of 1.65 TFLOP; 18.9 ms is 350 TFLOP/s
    "softmax, B 65536 D 768": Prediction(58, 66),
    "sigmoid, B 65536 D 768": Prediction(43, 48.8),
    "sigmoid, B 65536 D 768, 128x128": Prediction(50, 55),
    "sigmoid, B 65536 D 768, 128x256": Prediction(43, 46),
    "sigmoid, B 65536 D 768, library": Prediction(43, 47),
    "memory of softmax, B 65536 D 768": Prediction(0.5, 1.4),
    "memory of sigmoid, B 65536 D 768": Prediction(0.5, 1.4),
    "open_clip's form, B 32768 D 768": Prediction(22, 32),  # 6 passes, and 34 GB of logits read and written
    "memory of open_clip's form, B 32768 D 768": Prediction(8, 14),
}
STEP_PREDICTIONS = {
    "plain loop, CLIP B/16": Prediction(165, 190),
    "CLIP B/16, mixed, ZeRO 1": Prediction(165, 185),
    "3T B/16, mixed, ZeRO 1": Prediction(167, 191),  # 1.01 to 1.03 of CLIP's
    "CLIP B/16, bfloat16, ZeRO 1": Prediction(160, 175),
    "CLIP B/16, float32, ZeRO 1": Prediction(330, 425),  # in TF32
    "CLIP B/16, mixed, ZeRO 1, compile blocks": Prediction(145, 170),
    "CLIP B/16, mixed, ZeRO 1, compile model": Prediction(140, 168),
    "CLIP B/16, mixed, ZeRO 1: kernels": Prediction(88, 98),
    "CLIP B/16, mixed, ZeRO 1: host waits": Prediction(1, MOST_WAITS),
    "3T B/16, mixed, ZeRO 1: host waits": Prediction(1, MOST_WAITS),
    "CLIP B/16, mixed, ZeRO 2: host waits": Prediction(1, MOST_WAITS),
    "CLIP B/16, mixed, ZeRO 1, micro-batches of 64: host waits": Prediction(1, MOST_WAITS),
}
CACHE_PREDICTIONS = {
    "cache, bfloat16, decoded in processes": Prediction(2000, 2300),  # what 16 cores decode
    "cache, float32, decoded in processes": Prediction(1200, 1400),  # what the GPU embeds
    "cache, bfloat16, decoded in threads": Prediction(800, 1000),
    "cache, bfloat16, 2 processes on one GPU": Prediction(1900, 2400),
    "3T S/16 from tars: waiting for data": Prediction(25, 50),
    "smallest cosine of GPU and CPU embeddings": Prediction(0.999, 1),
}
PREDICTIONS = KERNEL_PREDICTIONS | LOSS_PREDICTIONS | STEP_PREDICTIONS | CACHE_PREDICTIONS
