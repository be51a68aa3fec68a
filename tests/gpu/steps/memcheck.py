"""Every kernel under compute-sanitizer's memcheck: reads and writes outside of what was allocated."""

from tests.gpu.sanitizer import check
from tests.gpu.setting import Setting


def run(setting: Setting) -> None:
    check(setting, "memcheck")
