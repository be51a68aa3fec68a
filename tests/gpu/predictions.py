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
    "host, a call of add_rows": Prediction(8, 30),
    "host, a call of add_cols": Prediction(8, 30),
    "stats 4096 x 4096 x 768": Prediction(80, 110),  # 26 GFLOP at 240 to 320 TFLOP/s
    "softmax_grad 4096 x 4096 x 768": Prediction(85, 120),
    "sigmoid 4096 x 4096 x 768": Prediction(85, 125),
    "add_rows 4096 x 4096 x 768": Prediction(45, 65),
    "add_cols 4096 x 4096 x 768": Prediction(45, 65),
    "softmax tile 4096 x 4096 x 768, 4 passes": Prediction(290, 400),
    "sigmoid tile 4096 x 4096 x 768, 3 passes": Prediction(300, 430),
}
LOSS_PREDICTIONS = {
    "softmax, B 32768 D 768": Prediction(17, 25),  # 4 passes of 1.65 TFLOP
    "softmax, B 65536 D 768": Prediction(66, 96),
    "sigmoid, B 65536 D 768": Prediction(46, 62),
    "memory of softmax, B 65536 D 768": Prediction(0.5, 1.4),
    "memory of sigmoid, B 65536 D 768": Prediction(0.5, 1.4),
    "open_clip's form, B 32768 D 768": Prediction(22, 32),  # 6 passes, and 34 GB of logits read and written
    "memory of open_clip's form, B 32768 D 768": Prediction(8, 14),
}
STEP_PREDICTIONS = {
    "plain loop, CLIP B/16": Prediction(165, 190),
    "CLIP B/16, bfloat16, ZeRO 1": Prediction(160, 185),
    "3T B/16, bfloat16, ZeRO 1": Prediction(162, 191),  # 1.01 to 1.03 of CLIP's
    "CLIP B/16, bfloat16, ZeRO 1: host waits": Prediction(0, MOST_WAITS),
    "3T B/16, bfloat16, ZeRO 1: host waits": Prediction(0, MOST_WAITS),
    "CLIP B/16, bfloat16, ZeRO 2, micro-batches of 64: host waits": Prediction(0, MOST_WAITS),
    "CLIP B/16, bfloat16, ZeRO 1: kernels": Prediction(85, 97),
}
CACHE_PREDICTIONS = {
    "cache, 1 process, bfloat16": Prediction(800, 1100),
    "cache, 1 process, float32": Prediction(700, 1100),
    "cache, 2 processes on one GPU, bfloat16": Prediction(1500, 2000),
    "cache, 4 processes on one GPU, bfloat16": Prediction(2000, 2400),
    "3T S/16 from tars: waiting for data": Prediction(25, 50),
    "smallest cosine of GPU and CPU embeddings": Prediction(0.999, 1),
}
PREDICTIONS = KERNEL_PREDICTIONS | LOSS_PREDICTIONS | STEP_PREDICTIONS | CACHE_PREDICTIONS
