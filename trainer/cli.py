"""The commands `threetowers train`, `export` and `tokenizer train`.

They are typed functions, whose flags and help come from their signatures. Modules that are slow to import are imported
in the command that needs them.
"""

from pathlib import Path
from typing import Annotated, Literal

import tyro


def train(
    config_file: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")] = None,
    overrides: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="KEY=VALUE...")] = (),
    variant: str | None = None,
    dry_run: bool = False,
    ranks: int = 1,
    help_config: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="[SECTION...]")] = None,
) -> None:
    """Train a run, or resume it from its folder.

    Start one process a GPU with `deepspeed --module threetowers train CONFIG` or `torchrun --nproc-per-node N -m
    threetowers train CONFIG`; without a launcher, the run is a single process.

    Args:
        config_file: The config of the run, as in configs/.
        overrides: Changes to the config, as key.path=value: optim.lr=3e-4 engine.zero_stage=2
        variant: One of the named changes under the config's key `variants`.
        dry_run: Build everything without numbers, print the arithmetic of the run, and stop. Needs no data.
        ranks: World size for which a dry run counts.
        help_config: Print the reference of the config's keys, of all sections or of some, and stop.
    """
    from threetowers.trainer.config import ConfigError, load_config

    if help_config is not None:
        from threetowers.trainer.config.documentation import config_reference

        print(config_reference(help_config), end="")
        return
    if config_file is None:
        raise ConfigError("train: no config is given; name a YAML file as in configs/, or ask for --help-config")
    config = load_config(config_file, overrides, variant)
    if dry_run:
        from threetowers.trainer.estimate.dry_run import dry_run as page

        print("\n".join(page(config, ranks)))
        return

    from threetowers.cache.processes.preemption import Interrupted, ignore_sigterm
    from threetowers.cache.processes.world import World
    from threetowers.trainer.engine import finish_collectives, join_process_group, leave_process_group
    from threetowers.trainer.model.initial.whole_model import resolve_start
    from threetowers.trainer.train import Trainer

    config = resolve_start(config)
    evaluators = []
    if config.evaluation is not None:
        from threetowers.eval.online import RetrievalEvaluator

        evaluators.append(RetrievalEvaluator(config, config.evaluation))
    try:
        summary = Trainer(config, join_process_group(), evaluators).train()
    except Interrupted as interruption:
        if not interruption.at_once:
            leave_process_group()
        raise
    except Exception:  # perhaps on this rank alone: others may still be waiting for it in the group
        finish_collectives()
        raise
    ignore_sigterm()  # the run is finished
    leave_process_group()
    if World.from_env().first:
        rate = f"{summary.images_per_s:.0f} images/s, " if summary.images_per_s else ""  # known only after warm-up
        print(
            f"trained {summary.steps} steps, {summary.epochs:.1f} epochs of {summary.samples:,} samples "
            f"in {summary.seconds:.0f} s: {rate}{summary.bottleneck}"
        )


def export(
    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    output_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUTPUT_DIR")],
    format: Literal["threetowers", "open_clip", "timm", "onnx"] = "threetowers",
    records: tuple[Path, ...] = (),
) -> None:
    """Write the deployed model of a finished run, and check it by loading it again.

    Args:
        run: Folder of a finished run, or its URL.
        output_dir: Folder to write.
        format: threetowers: read like a run. open_clip: read as `local-dir:OUTPUT_DIR`. timm: the image tower, read as
            `local-dir:OUTPUT_DIR`. onnx: a graph of each side, for ONNX Runtime.
        records: Results of evaluations (JSON) that the model card shows.
    """
    from threetowers.eval.record import read_record
    from threetowers.trainer.export.export import export as write

    results = {}
    for path in records:
        record = read_record(path)
        results[f"{record.spec.task}, {record.spec.data}"] = record.metrics
    done = write(run, output_dir, format, results)
    print(
        f"{done.folder}: {done.parameters:,} parameters, {done.left_out:,} left out; loaded again, its embeddings "
        f"differ by at most {done.difference:.1e}"
    )


def train_tokenizer(
    tars: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TAR...")],
    output: Path,
    vocab_size: int = 4096,
    character_coverage: float = 0.9995,
    captions: Annotated[tuple[str, ...], tyro.conf.arg(metavar="SOURCE[=WEIGHT]...")] = (),
    caption_per_line: bool = False,
    input_sentences: int = 10_000_000,
    seed: int = 0,
    on_bad: Literal["error", "skip", "skip_tars"] = "skip",
) -> None:
    """Train a SentencePiece tokenizer on the captions in tars.

    Args:
        tars: Tars, globs or brace ranges; use the training tars only.
        output: The .model file to write.
        vocab_size: Number of pieces at most; a small corpus yields fewer.
        character_coverage: Share of the characters of the captions that have a piece; the rarest are unknown.
        captions: Sources of captions, as data.captions names them in training: the extension of a text member (txt,
            cap), or json.FIELD. All captions of all of them count, whatever their weights. By default those of the
            first of txt, json.captions, json.caption that has some.
        caption_per_line: Take each line of a text member for a caption, as data.caption_per_line does in training.
        input_sentences: Distinct captions that are used at most, a random sample of all; memory grows with it.
        seed: Of this sample.
        on_bad: A sample without a usable caption: error stops, skip leaves it out and counts it. skip_tars leaves out
            tars that cannot be read, too.
    """
    from threetowers.cache.encoders.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
    from threetowers.cache.storage.atomic import write_atomic
    from threetowers.cache.webdataset.captions import CaptionFormat
    from threetowers.trainer.data.caption_corpus import read_corpus
    from threetowers.trainer.tokenizer import train_tokenizer as train_on_captions

    if input_sentences < 1:
        raise ValueError(f"--input-sentences: found {input_sentences}, expected at least 1")
    wanted = CaptionFormat.parse(captions, caption_per_line)
    corpus = read_corpus(tars, wanted, limit=input_sentences, seed=seed, on_bad=on_bad)
    lines = corpus.lines()
    try:
        model = train_on_captions(corpus.captions, vocab_size, character_coverage)
    except ValueError as error:
        raise ValueError("\n".join([str(error), *lines])) from error
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(output, model)
    print("\n".join([f"{output}: {SentencePieceTokenizer(model).vocab_size:,} pieces", *lines]))
