"""Models by name: our runs and exports, frozen encoders, the rows of a cache."""

from collections.abc import Sequence
from pathlib import Path

from threetowers.cache.encoders.names import EncoderName, encoder_kinds
from threetowers.eval.encoders.embedding_store import EmbeddingStore
from threetowers.eval.encoders.encoder import Encoder, LoadOptions
from threetowers.eval.encoders.ensemble import EnsembleEncoder, EnsembleOptions
from threetowers.trainer.run.finished_run import finished_run_folder

CACHE, RUN = "cache", "run"


def load_encoder(
    model: str | Path, options: LoadOptions | None = None, ensemble: EnsembleOptions | None = None
) -> Encoder:
    """Return a model as an encoder of images and captions.

    Args:
        model: One of

            - the folder of a finished run, or of an export, also as `run:FOLDER`;
            - `KIND:NAME[@SIZE][:WEIGHTS]`: a frozen encoder, as of `load_frozen_encoder`. Without a joint space of
              images and text, as timm's, it sees images only;
            - `cache:PATH`: the rows of a cache, images only.
        options: How the model is run; by default in float32, on a GPU if there is one, without keeping embeddings.
        ensemble: For a run with a third tower: mix that tower in.

    Returns:
        The encoder. `texts` gives unit-norm embeddings (n, dim) float32 of n captions, `images` and `features` those of
        the images of an `ImageSet`.

    Raises:
        ValueError: There is no model of this name, or an ensemble is given for a model without a third tower.

    Examples:
        >>> import tempfile, timm, torch
        >>> from safetensors.torch import save_file
        >>> weights = f"{tempfile.mkdtemp()}/weights.safetensors"
        >>> save_file(timm.create_model("test_resnet", pretrained=False).state_dict(), weights)
        >>> encoder = load_encoder(f"timm:test_resnet@32:{weights}")
        >>> encoder.info.name, encoder.dim, encoder.sees_text
        ('timm:test_resnet:weights', 96, False)
    """
    options = options or LoadOptions()
    kind, colon, rest = str(model).partition(":")
    if colon and kind in (CACHE, *encoder_kinds()) and kind != RUN:
        if ensemble is not None:
            raise ValueError(f"{model}: an ensemble needs a run with a third tower")
        return _with_options(_load_frozen(str(model), options), options)
    path = finished_run_folder(rest if colon and kind == RUN else model).path
    if not path.is_dir():
        kinds = sorted({CACHE, *encoder_kinds()} - {RUN})
        raise ValueError(f"{model!r} is not a folder of a run or an export; other models: {', '.join(kinds)}:NAME")
    from threetowers.eval.encoders.run_encoder import load_deployed_heads, third_tower_heads

    deployed = load_deployed_heads(path, options)
    main = _with_options(deployed, options)
    if ensemble is None:
        return main
    third = _with_options(third_tower_heads(deployed, ensemble.tower), options)
    return EnsembleEncoder(main, third, ensemble)


def check_options(encoders: Sequence[Encoder], options: LoadOptions) -> None:
    """Check that the options name only what the models have.

    Raises:
        ValueError: No model has a cached tower of a name in `caches`, or any for `live_teacher`; or none runs by the
            runtime that was asked for.
    """
    if options.runtime != "torch" and not any(encoder.by_runtime for encoder in encoders):
        raise ValueError(f"--runtime {options.runtime}: found no KIND:NAME among the models; leave the flag out")
    known = sorted({tower for encoder in encoders for tower in encoder.cached_towers})
    there = f"found the cached towers {known}" if known else "found no model with a cached tower"
    if unknown := [tower for tower in options.caches if tower not in known]:
        raise ValueError(f"--cache {unknown[0]}={options.caches[unknown[0]]}: no such tower; {there}")
    if options.live_teacher and not known:
        raise ValueError(f"--live-teacher: {there}; leave the flag out")


def _load_frozen(model: str, options: LoadOptions) -> Encoder:
    """Return a frozen encoder, or the rows of a cache."""
    if model.startswith(f"{CACHE}:"):
        from threetowers.eval.encoders.cache_rows import CacheEncoder

        return CacheEncoder(model.removeprefix(f"{CACHE}:"), options)
    from threetowers.eval.encoders.frozen_model import FrozenModel

    return FrozenModel(EncoderName.parse(model), options)


def _with_options(encoder: Encoder, options: LoadOptions) -> Encoder:
    encoder.search_device = options.search_device
    if options.embeddings is not None:
        encoder.store = EmbeddingStore(options.embeddings)
    return encoder
