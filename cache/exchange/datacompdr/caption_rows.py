"""Which text row of a sample is of which caption: the rows of DataCompDR are in order, a cache finds them by words.

`text_emb` begins with the caption of the sample. In DataCompDR the synthetic captions follow, the list `syn_text` of
the `syn.json` member; other data sets of this layout have several lists there, and the rows of each in `LIST_emb`.
Source: apple/ml-mobileclip, `training/open_clip.patch` and `open_clip_v2.patch`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from threetowers.cache.exchange.datacompdr.bad_reinforcement import BadReinforcement
from threetowers.cache.exchange.datacompdr.embeddings import SUFFIX, TEXT_ROWS
from threetowers.cache.format.dtypes import Float32Array
from threetowers.cache.webdataset.captions import BadText, caption_hash, clean_caption, decode_text, json_object

SYN = "syn.json"
TXT = "txt"
SYNTHETIC = "syn_text"  # the list whose rows may follow in `text_emb`

CaptionRows = dict[int, Float32Array]  # (W,) by the hash of the caption


def rows_by_caption(
    members: Mapping[str, bytes], embeddings: Mapping[str, Float32Array], own_caption: str | None
) -> CaptionRows:
    """Return the (W,) row of each caption of a sample by the caption's hash.

    Args:
        members: `syn.json` and `txt` of the sample, as far as its tar has them.
        embeddings: What `read_embeddings` gives.
        own_caption: The caption of the sample, not a synthetic one, where its tar has no `txt`; None: there is none.

    Raises:
        BadReinforcement: A member is damaged, or there are not as many rows as captions.
    """
    found: CaptionRows = {}
    lists = _synthetic(members)
    text_rows = embeddings.get(TEXT_ROWS, np.zeros((0, 0), np.float32))
    if SYNTHETIC in lists and SYNTHETIC + SUFFIX not in embeddings:
        captions = lists.pop(SYNTHETIC)
        n_own = len(text_rows) - len(captions)
        _check_own(n_own, text_rows, captions)
        _add(found, captions, text_rows[n_own:])
        text_rows = text_rows[:n_own]
    else:
        _check_own(len(text_rows), text_rows, [])
    for name, captions in lists.items():
        rows = embeddings.get(name + SUFFIX)
        if rows is not None:
            if len(rows) != len(captions):
                raise BadReinforcement(f"{name + SUFFIX}: {len(rows)} rows of {len(captions)} captions in {SYN}")
            _add(found, captions, rows)
    if len(text_rows):
        own = _own(members) if TXT in members else own_caption
        if own is not None:
            found[caption_hash(own)] = text_rows[0]
    return found


def _synthetic(members: Mapping[str, bytes]) -> dict[str, list[Any]]:
    """Return the lists of synthetic captions by name."""
    if SYN not in members:
        return {}
    try:
        fields = json_object(members[SYN])
    except BadText as error:
        raise BadReinforcement(f"{SYN}: {error}") from None
    return {name: value for name, value in fields.items() if isinstance(value, list)}


def _own(members: Mapping[str, bytes]) -> str:
    try:
        return clean_caption(decode_text(members[TXT]))
    except BadText as error:
        raise BadReinforcement(f"{TXT}: {error}") from None


def _check_own(n_own: int, text_rows: Float32Array, synthetic: list[Any]) -> None:
    if n_own not in (0, 1):
        raise BadReinforcement(
            f"{TEXT_ROWS}: {len(text_rows)} rows, expected one of the caption and one of each of the {len(synthetic)} "
            f"synthetic captions in {SYN}"
        )


def _add(found: CaptionRows, captions: list[Any], rows: Float32Array) -> None:
    for caption, row_W in zip(captions, rows, strict=True):
        try:
            found.setdefault(caption_hash(clean_caption(caption)), row_W)
        except BadText:
            continue  # nobody can ask for it: to training it is no caption either
