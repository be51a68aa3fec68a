"""The command `threetowers`, or `python -m threetowers`: the form that `torchrun -m` and `deepspeed --module` start."""

import sys

from threetowers.cache.processes.preemption import Interrupted
from threetowers.cache.processes.stop_request import StopRequest, leave


def main() -> None:
    """Run the command line; a run listens for SIGTERM from here on, before anything that takes long to import."""
    words = (argument for argument in sys.argv[1:] if not argument.startswith("-"))
    try:
        if next(words, None) == "train":
            StopRequest().listen()
        from threetowers.cli import main as run_command

        run_command()
    except Interrupted as error:
        leave(error)


if __name__ == "__main__":
    main()
