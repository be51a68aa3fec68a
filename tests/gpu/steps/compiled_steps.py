"""A training step under `torch.compile`: blocks, and the model as a whole."""

from tests.gpu.setting import Setting
from tests.gpu.steps.training_steps import MIXED, Variant, measure_all

VARIANTS = [
    Variant(f"CLIP B/16, mixed, ZeRO 1, compile {part}", engine=MIXED | {"compile": part})
    for part in ("blocks", "model")
]


def run(setting: Setting) -> None:
    if setting.gpu_only("training steps under torch.compile"):
        measure_all(setting, VARIANTS)
