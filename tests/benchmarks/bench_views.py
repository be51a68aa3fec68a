"""Augmented views: how alike teacher and student see them at their own sizes, and what augmentation costs.

    python tests/benchmarks/bench_views.py [--teacher 224] [--student 112] [--sample 100] [IMAGE ...]

Sizes: each crop is shown at the teacher's size and reduced to the student's, and shown at the student's size; the
figure is their mean absolute difference in bytes, for each operation at magnitude 9. `own` is the same where an
operation measures the histogram of each size by itself. What resampling alone makes is the line `identity`.
Cost: the time of a view with `randaugment:2:9` over that of its crop alone, decoding not counted.

Without image files, those of the emoji training tars are used.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from threetowers.cache.format.image_ops import OPS, ImageOp, apply_ops
from threetowers.cache.format.views import N_CROP_PARAMS, Params, Views, apply_crop, render_view
from threetowers.cache.webdataset.dataset_sample import sample_dataset
from threetowers.cache.webdataset.images import decode_rgb

EMOJI = Path(__file__).parents[2] / "data/emoji/train-*.tar"
STRENGTH = 9 / 30


def load(paths: Sequence[Path], sample: int) -> list[Image.Image]:
    if paths:
        return [decode_rgb(path.read_bytes()) for path in paths]
    return sample_dataset([str(EMOJI)], sample, 0).images()[0]


def difference(large: Image.Image, small: Image.Image) -> float:
    reduced = large.resize(small.size, Image.Resampling.BOX)
    return float(np.abs(np.asarray(reduced, np.float32) - np.asarray(small, np.float32)).mean())


def differences(op_id: int, op: ImageOp, image: Image.Image, crop_5: Params, sizes: list[int]) -> tuple[float, float]:
    """Return how the sizes differ if the operation is measured once, and if each size measures its own pixels."""
    params = np.append(crop_5, [op_id, op.value(STRENGTH, 1)]).astype(np.float32)
    views = [render_view(image, params, (side, side), "bicubic") for side in sizes]
    crops = [apply_crop(image, crop_5, (side, side), "bicubic") for side in sizes]
    own = [apply_ops(crop, crop, [(op, float(params[-1]))]) for crop in crops]
    return difference(*views), difference(*own)


def bench_sizes(images: list[Image.Image], sizes: list[int]) -> None:
    views = Views("crops:2", seed=0, scale=0.35)
    crops = [(image, crop_5) for i, image in enumerate(images) for crop_5 in views.params(i, *image.size)]
    print(f"teacher {sizes[0]}, student {sizes[1]}: mean |difference| of {len(crops)} views, in bytes")
    print(f"{'':14}{'views':>8}{'own':>8}")
    for op_id, op in enumerate(OPS):
        found = [differences(op_id, op, image, crop_5, sizes) for image, crop_5 in crops]
        shared, own = np.mean(found, axis=0)
        print(f"{op.name:14}{shared:8.2f}" + (f"{own:8.2f}" if op.measures else ""))


def bench_cost(images: list[Image.Image], side: int, rounds: int = 5) -> None:
    views = Views("crops:4", seed=0, scale=0.35, augment="randaugment:2:9")
    params = [(image, params_P) for i, image in enumerate(images) for params_P in views.params(i, *image.size)]
    times: dict[str, list[float]] = {"crop": [], "augmented": []}
    for _ in range(rounds):
        for name in times:
            started = time.perf_counter()
            for image, params_P in params:
                shown = params_P[:N_CROP_PARAMS] if name == "crop" else params_P
                render_view(image, shown, (side, side), "bicubic")
            times[name].append((time.perf_counter() - started) / len(params))
    crop, augmented = (statistics.median(times[name]) * 1e3 for name in ("crop", "augmented"))
    print(f"at {side}: crop {crop:.2f} ms, augmented {augmented:.2f} ms: {augmented / crop:.2f} of the time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", type=Path, metavar="IMAGE")
    parser.add_argument("--teacher", type=int, default=224)
    parser.add_argument("--student", type=int, default=112)
    parser.add_argument("--sample", type=int, default=100)
    options = parser.parse_args()
    images = load(options.images, options.sample)
    bench_sizes(images, [options.teacher, options.student])
    bench_cost(images, options.teacher)
    bench_cost(images, options.student)


if __name__ == "__main__":
    main()
