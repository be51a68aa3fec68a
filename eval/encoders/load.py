"""Models by name: our runs and exports, open_clip and timm models, the rows of a cache."""

from collections.abc import Sequence
from pathlib import Path

from threetowers.cache.encoders.timm_models import SOURCES
from threetowers.eval.encoders.embedding_store import EmbeddingStore
from threetowers.eval.encoders.encoder import Encoder, LoadOptions
from threetowers.eval.encoders.ensemble import EnsembleEncoder, EnsembleOptions

MODEL_KINDS = ("open_clip", "timm", "cache")


def load_encoder(
    model: str | Path, options: LoadOptions | None = None, ensemble: EnsembleOptions | None = None
) -> Encoder:
    """Return a model as an encoder of images and captions.

    Args:
        model: One of

            - the folder of a finished run, or of an export;
            - `open_clip:NAME[:WEIGHTS]`: an open_clip model, `hf-hub:ORG/NAME`, or a folder it saved; WEIGHTS is one of
              its pretrained tags, a file, or TAG=FILE for a file with the preprocessing of that tag; without WEIGHTS
              those of hub or folder, otherwise random ones;
            - `timm:NAME[@SIZE][:WEIGHTS]`: a timm model, `hf-hub:ORG/NAME`, or a folder it saved, images only; WEIGHTS
              is as of `cache build --weights`, SIZE the side of the input in pixels;
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
        ('timm:test_resnet', 96, False)
    """
    options = options or LoadOptions()
    kind, colon, rest = str(model).partition(":")
    if kind in MODEL_KINDS and colon:
        if ensemble is not None:
            raise ValueError(f"{model}: an ensemble needs a run with a third tower")
        return _with_options(_load_other(kind, rest, options), options)
    path = Path(model)
    if not path.is_dir():
        raise ValueError(
            f"{model!r} is not a folder of a run or an export; other models: {', '.join(MODEL_KINDS)}:NAME"
        )
    from threetowers.eval.encoders.run_encoder import load_deployed_heads, load_third_tower_heads

    main = _with_options(load_deployed_heads(path, options), options)
    if ensemble is None:
        return main
    third = _with_options(load_third_tower_heads(path, ensemble.tower, options), options)
    return EnsembleEncoder(main, third, ensemble)


def check_options(encoders: Sequence[Encoder], options: LoadOptions) -> None:
    """Check that the options name only what the models have.

    Raises:
        ValueError: No model has a cached tower of a name in `caches`, or any for `live_teacher`; or none runs by the
            runtime that was asked for.
    """
    if options.runtime != "torch" and not any(encoder.info.name.startswith("timm:") for encoder in encoders):
        raise ValueError(f"--runtime {options.runtime}: found no timm:NAME among the models; leave the flag out")
    known = sorted({tower for encoder in encoders for tower in encoder.cached_towers})
    there = f"found the cached towers {known}" if known else "found no model with a cached tower"
    if unknown := [tower for tower in options.caches if tower not in known]:
        raise ValueError(f"--cache {unknown[0]}={options.caches[unknown[0]]}: no such tower; {there}")
    if options.live_teacher and not known:
        raise ValueError(f"--live-teacher: {there}; leave the flag out")


def _load_other(kind: str, rest: str, options: LoadOptions) -> Encoder:
    name, weights = _split_weights(rest)
    if not name:
        raise ValueError(f"'{kind}:{rest}': expected {kind}:NAME")
    if kind == "open_clip":
        from threetowers.eval.encoders.open_clip_encoder import OpenClipEncoder

        return OpenClipEncoder(name, weights or None, options)
    if kind == "timm":
        from threetowers.eval.encoders.timm_encoder import TimmEncoder

        return TimmEncoder(name, weights or None, options)
    from threetowers.eval.encoders.cache_rows import CacheEncoder

    return CacheEncoder(rest, options)


def _split_weights(rest: str) -> tuple[str, str]:
    """Return name and weights of `NAME[:WEIGHTS]`, where the name may be `hf-hub:ORG/NAME` or `local-dir:FOLDER`."""
    source = next((prefix for prefix in SOURCES if rest.startswith(prefix)), "")
    body = rest.removeprefix(source)
    if Path(body).is_dir():  # a folder with a colon in its own name
        return rest, ""
    name, _, weights = body.partition(":")
    return (source + name if name else ""), weights


def _with_options(encoder: Encoder, options: LoadOptions) -> Encoder:
    encoder.search_device = options.search_device
    if options.embeddings is not None:
        encoder.store = EmbeddingStore(options.embeddings)
    return encoder
