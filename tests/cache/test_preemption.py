"""SIGTERM: a build exits with 143, a data worker ignores it."""

import signal
import subprocess
import sys
import threading

from threetowers.cache.processes.preemption import exit_on_sigterm


def test_exit_on_sigterm_runs_clean_up_and_exits_with_143() -> None:
    code = (
        "import os, signal\n"
        "from threetowers.cache.processes.preemption import exit_on_sigterm\n"
        "with exit_on_sigterm():\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    finally:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)  # a second signal must not stop the clean-up\n"
        "        print('cleaned up')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (143, "cleaned up\n", "")


def test_the_handler_before_is_restored() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with exit_on_sigterm():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_outside_the_main_thread_nothing_is_changed() -> None:
    seen = []

    def work() -> None:
        with exit_on_sigterm():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]


def test_ignored_sigterm_leaves_a_process_running() -> None:
    code = (
        "import os, signal\n"
        "from threetowers.cache.processes.preemption import ignore_sigterm\n"
        "ignore_sigterm()\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "print('still here')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "still here\n"), result.stderr
