"""Every kernel under compute-sanitizer's racecheck: unordered accesses to shared memory."""

from tests.gpu.sanitizer import check
from tests.gpu.setting import Setting


def run(setting: Setting) -> None:
    check(setting, "racecheck")
