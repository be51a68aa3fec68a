"""The crops of a sample, in its `paug.json` member, as the parameters of views that a cache stores.

`param_aug` is a list with `[[top, left, height, width], [[operation, magnitude], ...]]` for each crop. The box is in
pixels of the image as it is stored, without its EXIF orientation. Operations are numbered as in `image_ops.OPS`, and
their magnitudes are those that torchvision's `RandAugment` draws for a crop of 224 x 224: of a translation its pixels,
which torchvision cuts to whole ones, of an enhancement what is added to the factor 1, of all others the value itself.
Where crops are mirrored, true or false stands between the two. Source: apple/ml-mobileclip-dr, `dr/transforms.py`.
"""

import json
from typing import Any

import numpy as np

from threetowers.cache.exchange.datacompdr.bad_reinforcement import BadReinforcement
from threetowers.cache.format.image_ops import N_OP_PARAMS, OPS
from threetowers.cache.format.rand_augment import MAX_MAGNITUDE, RandAugment
from threetowers.cache.format.views import N_CROP_PARAMS, Params
from threetowers.cache.webdataset.captions import BadText, json_object

PAUG = "paug.json"
CROP_SIDE = 224  # of the crops that were augmented, in pixels
TOLERANCE = 1e-4  # of a magnitude, which is written as float32
MAX_VALUE = 1e6  # larger magnitudes are of no operation, nor is NaN
TRANSLATIONS = frozenset({"translate_x", "translate_y"})
ENHANCEMENTS = frozenset({"brightness", "color", "contrast", "sharpness"})
NO_OP = (0, 0.0)  # identity
EXPECTED = "expected [[top, left, height, width], [[operation, magnitude], ...]]"


def read_crops(data: bytes, size: tuple[int, int], policy: RandAugment | None) -> Params:
    """Return the (V, P) parameters of all crops of a sample.

    Args:
        data: Its `paug.json` member.
        size: Width and height of the image that the boxes are in.
        policy: That drew the operations; None: there are none.

    Raises:
        BadReinforcement: The member is damaged, a crop is not inside the image, or an operation is not of the policy.
    """
    crops = _crops(data)
    params_VP = np.empty((len(crops), N_CROP_PARAMS + N_OP_PARAMS * (policy.num_ops if policy else 0)), np.float32)
    for k, crop in enumerate(crops):
        box, flip, ops = _split(k, crop)
        params_VP[k, :N_CROP_PARAMS] = *_fractions(k, box, size), flip
        params_VP[k, N_CROP_PARAMS:] = _values(k, ops, policy)
    return params_VP


def _crops(data: bytes) -> list[Any]:
    try:
        crops = json_object(data).get("param_aug")
        if isinstance(crops, str):  # as the viewer of Hugging Face gives them
            crops = json.loads(crops)
    except (BadText, ValueError, RecursionError) as error:
        reason = error if isinstance(error, BadText) else "param_aug is not JSON"
        raise BadReinforcement(f"{PAUG}: {reason}") from None
    if not isinstance(crops, list) or not crops:
        raise BadReinforcement(f"{PAUG}: expected a list of crops in param_aug")
    return crops


def _split(k: int, crop: Any) -> tuple[list[int], bool, list[Any]]:
    """Return box, flip and operations of a crop; operations that were skipped are null."""
    match crop:
        case [[int(), int(), int(), int()] as box]:
            return box, False, []
        case [[int(), int(), int(), int()] as box, (list() | None) as ops]:
            return box, False, ops or []
        case [[int(), int(), int(), int()] as box, bool(flip), (list() | None) as ops]:
            return box, flip, ops or []
    raise BadReinforcement(f"{PAUG}: crop {k}: {EXPECTED}, found {json.dumps(crop)[:80]}")


def _fractions(k: int, box: list[int], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Return left, top, right and bottom as fractions of the image."""
    top, left, height, width = box
    if not (
        top >= 0 and left >= 0 and height > 0 and width > 0 and left + width <= size[0] and top + height <= size[1]
    ):
        raise BadReinforcement(
            f"{PAUG}: crop {k} is {width} x {height} pixels at ({left}, {top}), outside of its image of {size[0]} x "
            f"{size[1]}: the teachers saw it at another size (--view-size)"
        )
    return left / size[0], top / size[1], (left + width) / size[0], (top + height) / size[1]


def _values(k: int, ops: list[Any], policy: RandAugment | None) -> list[float]:
    """Return ids and values of the operations as a cache stores them."""
    n_ops = policy.num_ops if policy else 0
    if ops and len(ops) != n_ops:
        raise BadReinforcement(f"{PAUG}: crop {k} has {len(ops)} operations, expected {n_ops} (--view-augment)")
    numbers: list[float] = []
    if not ops:
        return [*NO_OP] * n_ops
    for op in ops:
        match op:
            case [int(op_id), (int() | float()) as magnitude] if 0 <= op_id < len(OPS) and abs(magnitude) < MAX_VALUE:
                numbers += [op_id, _value(k, op_id, magnitude, policy)]
            case _:
                raise BadReinforcement(f"{PAUG}: crop {k}: {EXPECTED}, found the operation {json.dumps(op)[:80]}")
    return numbers


def _value(k: int, op_id: int, magnitude: float, policy: RandAugment | None) -> float:
    """Return the stored value of an operation. Raises BadReinforcement for one that the policy does not draw."""
    op = OPS[op_id]
    if op.name in TRANSLATIONS:
        value, stored = magnitude / CROP_SIDE, int(magnitude) / CROP_SIDE
    else:
        value = stored = magnitude + (op.neutral if op.name in ENHANCEMENTS else 0)
    strength = policy.magnitude / MAX_MAGNITUDE if policy else 0.0
    drawn = {op.value(strength, sign) for sign in (1, -1)}
    if not any(abs(value - each) <= TOLERANCE * max(1, abs(each)) for each in drawn):
        raise BadReinforcement(
            f"{PAUG}: crop {k}: {op.name} at {magnitude:g}, which is no magnitude of this policy (--view-augment)"
        )
    return stored
