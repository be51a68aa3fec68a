"""Inference of clip-retrieval over tars, with our teacher instead of CLIP. Prints its seconds.

    PYTHON tests/benchmarks/peer_clip_retrieval.py OUT IMAGE_SIZE BATCH WORKERS TAR...

For a Python that has clip-retrieval 2.45 with its dependencies and this package; `bench_cache.py` calls it.
"""

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from threetowers.cache.encoders.names import load_frozen_encoder


class TeacherAsClip:
    """The teacher with the interface of a CLIP model that clip-retrieval expects."""

    def __init__(self, size: int) -> None:
        name = f"timm:tf_efficientnet_lite0@{size}:package:efficientnet-lite0"
        self.encoder = load_frozen_encoder(name).side("image")

    def encode_image(self, images_b3HW: Tensor) -> Tensor:
        return self.encoder.embed(images_b3HW)

    def encode_text(self, tokens: Tensor) -> Tensor:
        raise AssertionError("clip-retrieval was told to embed no captions")

    def preprocess(self, image: Any) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(self.encoder.transform(image.convert("RGB"))))


def main() -> None:
    from clip_retrieval.clip_inference import mapper, worker

    out, size, batch, workers, *tars = sys.argv[1:]
    torch.set_num_threads(int(workers))

    def load_clip(**options: Any) -> tuple[TeacherAsClip, Any, Any]:
        wrapped = TeacherAsClip(int(size))
        return wrapped, wrapped.preprocess, None

    mapper.load_clip = worker.load_clip = load_clip
    Path(out).mkdir(parents=True)
    started = time.perf_counter()
    worker.worker(
        tasks=[0],
        input_dataset=list(tars),
        output_folder=out,
        output_partition_count=1,
        input_format="webdataset",
        batch_size=int(batch),
        num_prepro_workers=int(workers),
        enable_text=False,
        enable_metadata=False,
        wds_image_key="jpg",
    )
    print(time.perf_counter() - started)


if __name__ == "__main__":
    main()
