"""Models by name: our runs and exports, open_clip and timm models, the rows of a cache."""

from pathlib import Path

from threetowers.eval.encoders.encoder import Batched, Encoder, LoadOptions, Tower
from threetowers.eval.encoders.ensemble import Mixed, Mixing

KINDS = ("open_clip", "timm", "cache")


def load_encoder(spec: str | Path, loading: LoadOptions | None = None, mixing: Mixing | None = None) -> Encoder:
    """Return a model by what names it.

    a folder                    a finished run, or an export
    open_clip:NAME[:WEIGHTS]    an open_clip model; WEIGHTS a file or one of its pretrained tags, none: random
    timm:NAME[@SIZE][:WEIGHTS]  a timm model or a folder it saved, images only; WEIGHTS as of `cache build --weights`
    cache:PATH                  the rows of a cache as they are, images only

    Raises ValueError for a spec or folder that names no model, and for mixing in a model without a third tower.
    """
    loading = loading or LoadOptions()
    kind, colon, rest = str(spec).partition(":")
    if kind in KINDS and colon:
        if mixing is not None:
            raise ValueError(f"{spec}: mixing needs a run with a third tower")
        name, _, weights = rest.partition(":")
        if not name:
            raise ValueError(f"{spec!r}: expected {kind}:NAME")
        return _kept(_other(kind, name, weights or None, loading, rest), loading)
    path = Path(spec)
    if not path.is_dir():
        raise ValueError(f"{spec!r} is no folder of a run or an export; other models: {', '.join(KINDS)}:NAME")
    from threetowers.eval.encoders.run_encoder import main_pair, third_pair

    main = _kept(main_pair(path, loading), loading)
    return main if mixing is None else Mixed(main, _kept(third_pair(path, mixing.tower, loading), loading), mixing)


def _other(kind: str, name: str, weights: str | None, loading: LoadOptions, rest: str) -> Tower:
    if kind == "open_clip":
        from threetowers.eval.encoders.open_clip_encoder import OpenClipTower

        return OpenClipTower(name, weights, loading)
    if kind == "timm":
        from threetowers.eval.encoders.timm_encoder import ClassifierTower

        return ClassifierTower(name, weights, loading)
    from threetowers.eval.encoders.cache_rows import CachedRows

    return CachedRows(rest, loading)


def _kept(tower: Tower, loading: LoadOptions) -> Encoder:
    encoder = Batched(tower)
    if loading.embeddings is None:
        return encoder
    from threetowers.eval.encoders.embedding_store import Kept

    return Kept(encoder, loading.embeddings)
