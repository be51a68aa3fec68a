"""The command line: `threetowers cache | tokenizer | train | export | eval`, assembled from the packages' commands."""

import errno
import logging
import os
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Sequence

from tyro.extras import SubcommandApp

import threetowers
from threetowers.cache import cli as cache
from threetowers.cache.processes.world import World
from threetowers.eval import cli as evaluation
from threetowers.trainer import cli as trainer

UNWRITABLE = {errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST}

app = SubcommandApp()

cache_app = SubcommandApp()
app.command(cache_app, name="cache")
cache_app.command(cache.build)
cache_app.command(cache.info)
cache_app.command(cache.verify)
cache_app.command(cache.remap)
cache_app.command(name="import")(cache.import_)
cache_app.command(cache.export)
cache_app.command(cache.estimate)
cache_app.command(cache.measure_views)

tokenizer_app = SubcommandApp()
app.command(tokenizer_app, name="tokenizer")
tokenizer_app.command(name="train")(trainer.train_tokenizer)

eval_app = SubcommandApp()
app.command(eval_app, name="eval")
eval_app.command(evaluation.retrieval)
eval_app.command(evaluation.search)
eval_app.command(evaluation.compare)
eval_app.command(evaluation.zeroshot)
eval_app.command(evaluation.fewshot)
eval_app.command(evaluation.probe)
eval_app.command(evaluation.knn)
eval_app.command(evaluation.shift)
eval_app.command(evaluation.ood)
eval_app.command(evaluation.suite)

app.command(trainer.train)
app.command(trainer.export)


def refuse_repeated_flags(arguments: Sequence[str]) -> None:
    """Raise ValueError for a flag that is given twice: argparse would take the last one, and drop the others' values.

    Examples:
        >>> refuse_repeated_flags(["eval", "retrieval", "--cache", "a=x", "b=y"])
        >>> refuse_repeated_flags(["eval", "retrieval", "--cache", "a=x", "--cache", "b=y"])
        Traceback (most recent call last):
        ValueError: --cache is given twice, expected once; several values follow one flag: --cache A B
    """
    flags = [each.partition("=")[0].replace("_", "-") for each in arguments if each.startswith("--")]
    for flag, count in Counter(flags).items():
        if count > 1:
            times = "twice" if count == 2 else f"{count} times"
            raise ValueError(f"{flag} is given {times}, expected once; several values follow one flag: {flag} A B")


def main() -> None:
    """Run the command line. Bad input ends in one message and exit code 2, not in a traceback."""
    # The deepspeed launcher puts --local_rank first; LOCAL_RANK in the environment says the same.
    arguments = [a for a in sys.argv[1:] if not a.startswith(("--local_rank=", "--local-rank="))]
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    # DeepSpeed calls it under its old name, on every rank.
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.* is deprecated", category=FutureWarning)
    if arguments == ["--version"]:
        print(f"threetowers {threetowers.__version__}")
        sys.exit(0)
    try:
        refuse_repeated_flags(arguments)
        logging.getLogger("threetowers").setLevel(logging.INFO if World.from_env().first else logging.ERROR)
        code = app.cli(prog="threetowers", args=arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("threetowers: interrupted; finished work is kept", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # the reader, `head` perhaps, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (ValueError, OSError, FloatingPointError) as error:
        rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
        # The system's own errors name the file but not the remedy.
        hint = "; choose another path for it, or make room" if getattr(error, "errno", None) in UNWRITABLE else ""
        print(f"threetowers: {rank}{type(error).__name__}: {error}{hint}", file=sys.stderr)
        sys.exit(2)
    sys.exit(code)
