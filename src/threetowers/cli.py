"""The command line: `threetowers cache | tokenizer | train | export | eval`.

Commands are typed functions; their flags and help come from the signatures. What is heavy is imported where it runs,
so that `threetowers --help` is quick.
"""

import errno
import logging
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.extras import SubcommandApp

from threetowers.cache import cli as command
from threetowers.eval import cli as evaluate
from threetowers.trainer.interruption import EXIT_CODE, Interrupted

UNWRITABLE = {errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST}

app = SubcommandApp()
cache, tokenizer, evaluation = SubcommandApp(), SubcommandApp(), SubcommandApp()
for function in (command.build, command.info, command.verify, command.remap, command.estimate, command.measure_views):
    cache.command(function)
evaluation.command(evaluate.retrieval)
evaluation.command(evaluate.search)
evaluation.command(evaluate.compare)
for described in (
    evaluate.zeroshot,
    evaluate.fewshot,
    evaluate.probe,
    evaluate.knn,
    evaluate.shift,
    evaluate.ood,
    evaluate.suite,
):
    evaluation.command(described)
app.command(cache, name="cache")
app.command(tokenizer, name="tokenizer")
app.command(evaluation, name="eval")


@app.command
def train(
    config: tyro.conf.Positional[Path],
    overrides: tyro.conf.Positional[tuple[str, ...]] = (),
    dry_run: bool = False,
    ranks: int = 1,
) -> None:
    """Train a run, or resume it: its folder holds all that is needed.

    Start one process a GPU with `deepspeed --module threetowers train CONFIG` or `torchrun --nproc-per-node N -m
    threetowers train CONFIG`; alone, it runs as a single process.

    Args:
        config: The run, as in configs/.
        overrides: Changes to the config, as key.path=value: optim.lr=3e-4 engine.zero_stage=2
        dry_run: Build everything without numbers, print the arithmetic of the run, and stop. Needs no data.
        ranks: For how many processes a dry run counts.
    """
    from threetowers.trainer.config import load

    if dry_run:
        from threetowers.trainer.estimate.dry_run import dry_run as page

        print("\n".join(page(load(config, overrides), ranks)))
        return
    from threetowers.trainer.engine import leave_process_group
    from threetowers.trainer.train import train as run_training

    run = load(config, overrides)
    evaluators = []
    if run.evaluate is not None:
        from threetowers.eval.online import RetrievalEvaluator

        evaluators.append(RetrievalEvaluator(run, run.evaluate))
    try:
        summary = run_training(run, evaluators)
    except Interrupted:  # on every rank; after other errors the others may still be waiting for this one
        leave_process_group()
        raise
    leave_process_group()
    if is_first_rank():
        print(
            f"trained {summary.steps} steps, {summary.epochs:.1f} epochs of {summary.samples:,} samples "
            f"in {summary.seconds:.0f} s: {summary.images_per_s:.0f} images/s, {summary.verdict}"
        )


@app.command
def export(
    run: tyro.conf.Positional[Path],
    out: tyro.conf.Positional[Path],
    format: Literal["threetowers", "open_clip", "timm"] = "threetowers",
    records: tuple[Path, ...] = (),
) -> None:
    """Write the model of a finished run, without what was there to train it, and prove it by loading it again.

    Args:
        run: Folder of a finished run.
        out: Folder to write.
        format: threetowers: read as a run is. open_clip: by `local-dir:OUT`. timm: the image tower, by `local-dir:OUT`.
        records: Results of evaluations (JSON) that the model card is to show.
    """
    from threetowers.eval.record import read_record
    from threetowers.trainer.export.export import export as write

    found = [read_record(path) for path in records]
    results = {f"{record.spec.task}, {record.spec.data}": record.metrics for record in found}
    done = write(run, out, format, results)
    print(
        f"{done.folder}: {done.parameters:,} parameters, {done.left_out:,} left behind; loaded again, its embeddings "
        f"differ by at most {done.difference:.1e}"
    )


@tokenizer.command(name="train")
def tokenizer_train(
    tars: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TAR...")],
    out: Path,
    vocab_size: int = 4096,
) -> None:
    """Make a SentencePiece tokenizer from the captions in tars.

    Args:
        tars: Tars, globs or brace ranges; use the training tars only.
        out: The .model file to write.
        vocab_size: Pieces at most; a small corpus yields fewer.
    """
    from threetowers.cache.webdataset.tar_index import expand, index_tar
    from threetowers.trainer.data.sample_set import read_annotation
    from threetowers.trainer.tokenizer import Tokenizer, train_tokenizer

    indexes = [index_tar(path) for path in expand(tars)]
    captions = [
        c for tar in indexes for ordinal in range(len(tar.samples)) for c in read_annotation(tar, ordinal).captions
    ]
    # A caption counts once, however many pictures carry it.
    distinct = list(dict.fromkeys(captions))
    model = train_tokenizer(distinct, vocab_size)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(model)
    pieces = Tokenizer(model).vocab_size
    print(
        f"{out}: {pieces:,} pieces from {len(distinct):,} distinct of {len(captions):,} captions in {len(indexes)} tars"
    )


def is_first_rank() -> bool:
    """Whether this process speaks for its launch."""
    return os.environ.get("RANK", "0") == "0"


def main() -> None:
    """Run the command line. Bad input ends in one message and exit code 2, not in a traceback."""
    # The deepspeed launcher puts --local_rank first; LOCAL_RANK in the environment says the same.
    arguments = [a for a in sys.argv[1:] if not a.startswith(("--local_rank=", "--local-rank="))]
    level = logging.INFO if is_first_rank() else logging.ERROR
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    logging.getLogger("threetowers").setLevel(level)
    # DeepSpeed calls it under its old name, on every rank.
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.* is deprecated", category=FutureWarning)
    try:
        code = app.cli(prog="threetowers", args=arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("threetowers: interrupted; what is finished is kept", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # the reader, `head` perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (ValueError, OSError, FloatingPointError, Interrupted) as error:
        rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
        # The system's own errors name the file and not the way out.
        hint = "; choose another path for it, or make room" if getattr(error, "errno", None) in UNWRITABLE else ""
        print(f"threetowers: {rank}{type(error).__name__}: {error}{hint}", file=sys.stderr)
        sys.exit(EXIT_CODE if isinstance(error, Interrupted) else 2)
    sys.exit(code)
