"""What `cache import` is asked for."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from threetowers.cache.builder.build_config import BuildConfig
from threetowers.cache.exchange.clip_retrieval import open_clip_retrieval
from threetowers.cache.exchange.datacompdr.view_size import ViewSize
from threetowers.cache.exchange.matrix import DEFAULT_COLUMNS, MatrixPart, open_matrices
from threetowers.cache.exchange.sample_keys import Match
from threetowers.cache.format.dtypes import DtypeName
from threetowers.cache.format.manifest import DecodeMode, EncoderPrecision, Side
from threetowers.cache.format.views import CENTER, Views
from threetowers.cache.webdataset.tar_list import OnBad


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Embeddings in files of another tool, the samples that they are of, and the encoder that made them."""

    tars: Sequence[str | Path]
    """The tars of the samples: paths or URLs, globs in quotes, and brace ranges."""

    encoder: str
    """What made the rows, KIND:NAME[@SIZE][:WEIGHTS] as for `cache build`. It is loaded for what the manifest says of
    it, and embeds nothing; `cache verify --depth recompute` then compares a sample of the rows with it."""

    output_dir: str | Path
    """Folder or URL of the cache; created if missing."""

    clip_retrieval: Path | None = None
    """A folder of clip-retrieval: img_emb/, text_emb/, metadata/."""

    rows: Sequence[Path] = ()
    """Instead: .npy files with a matrix each, a row for each key."""

    keys: Sequence[Path] = ()
    """Of each of --rows, what its rows are of: keys of samples, or captions (--of text). Text files with a key on each
    line, .npy files of strings, or Parquet files."""

    datacompdr: Sequence[str | Path] = ()
    """Instead: the tars of DataCompDR, which hold embeddings of augmented crops and of captions: paths or URLs, globs
    in quotes, and brace ranges. They may be --tars themselves."""

    columns: str | None = None
    """Of --datacompdr: the columns of the encoder's embeddings among those of all teachers, START:END, as 0:768;
    default: all."""

    view_size: ViewSize = "image"
    """Of --datacompdr: what the boxes of the crops are counted in: pixels of the image in the tars, or of the original
    one, whose size img2dataset has written into the json member when it made the image smaller."""

    view_scale: float = 0.08
    """Of --datacompdr: smallest share of the image's area in a crop, for the manifest."""

    view_augment: str = "randaugment:2:9"
    """Of --datacompdr: the policy that augmented the crops, none or randaugment:OPS:MAGNITUDE. Operations that it does
    not draw are refused."""

    key_column: str | None = None
    """Column with the keys or captions of a Parquet file; default: that of clip-retrieval (image_path, caption), else
    key, or caption."""

    match: Match = "key"
    """How images are found: by the sample's key, or by the name alone: the last part of the path, up to its first dot,
    of both. Captions are found by their words. In --datacompdr both are found so, and by uid too: the field uid of the
    json member is the name of the sample there."""

    of: Side = "image"
    """image or text: which side of the samples the rows are of."""

    feature: str | None = None
    """Which output of the encoder the rows are, as projected, or unit:projected where they were scaled to unit norm, as
    clip-retrieval does; default: its first."""

    precision: EncoderPrecision = "float32"
    """Arithmetic that the rows were computed in, as far as it is known."""

    decode: DecodeMode = "pillow"
    """How images were decoded, as far as it is known."""

    prompt: str | None = None
    """Put before each caption when it was embedded; default: the encoder's own."""

    max_length: int | None = None
    """Tokens to which captions were cut; default: the encoder's own."""

    captions: tuple[str, ...] = ()
    """Which captions of a sample the cache holds: extensions of text members, or json.FIELD; default: the first of txt,
    json.captions and json.caption that a sample has."""

    caption_per_line: bool = False
    """Each line of a text member is a caption."""

    image_member: str | None = None
    """The member that is the image of a sample, by its extension; default: its only image."""

    dtype: DtypeName = "float16"
    """Number format of the stored rows."""

    min_cosine: float | None = None
    """Stop where a row, as stored, has a smaller cosine with itself as it was found; default: a bound for each
    dtype."""

    samples_per_tar: int | None = None
    """As for `cache build`: samples for which each tar has room."""

    rows_per_tar: int | None = None
    """As for `cache build`: captions for which each tar has room."""

    missing: Literal["error", "filtered", "build"] = "filtered"
    """Samples without a row: filtered gives them a status and counts them, error stops, build leaves their tars to
    `cache build`."""

    on_bad: OnBad = "skip"
    """error stops at a sample that cannot be used, or a bad tar; skip gives such samples a status; skip_tars also
    leaves bad tars out."""

    device: str = "cpu"
    """Where the encoder is loaded."""

    def __post_init__(self) -> None:
        """Raise ValueError unless there is one source of rows, and for values out of range."""
        sources = {
            "--clip-retrieval": self.clip_retrieval is not None,
            "--rows": bool(self.rows),
            "--keys": bool(self.keys),
            "--datacompdr": bool(self.datacompdr),
        }
        given = [flag for flag, is_given in sources.items() if is_given]
        if given not in (["--clip-retrieval"], ["--rows", "--keys"], ["--datacompdr"]):
            raise ValueError(
                "expected --clip-retrieval FOLDER, or --rows with --keys, or --datacompdr TARS, found "
                f"{', '.join(given) or 'none'}"
            )
        if not self.datacompdr:
            self._refuse_flags_of_datacompdr()
        elif self.key_column is not None:
            raise ValueError("--key-column: samples of --datacompdr are found by --match, leave it out")
        elif self.of == "text" and (given := self._given_view_flags()):
            raise ValueError(f"{', '.join(given)} --of text: only crops of images are views, leave them out")
        self.column_range()
        self.build_config(1)

    def _refuse_flags_of_datacompdr(self) -> None:
        if self.of == "text" and self.match == "name":
            raise ValueError("--match name --of text: captions are found by their words, leave --match out")
        of_datacompdr = {"--columns": self.columns is not None, "--match uid": self.match == "uid"}
        given = [flag for flag, is_given in of_datacompdr.items() if is_given]
        if given := [*given, *self._given_view_flags()]:
            raise ValueError(f"{', '.join(given)}: expected --datacompdr TARS, whose flags these are")

    def _given_view_flags(self) -> list[str]:
        """Return the flags of crops that are not at their defaults."""
        names = ("view_size", "view_scale", "view_augment")
        return [f"--{name.replace('_', '-')}" for name in names if getattr(self, name) != getattr(ImportConfig, name)]

    def column_range(self) -> tuple[int, int] | None:
        """Return the first of --columns, and the one behind the last. Raises ValueError for what is no such range."""
        if self.columns is None:
            return None
        found = re.fullmatch(r"(\d{1,6}):(\d{1,6})", self.columns)
        start, stop = map(int, found.groups()) if found else (0, 0)
        if start >= stop:
            raise ValueError(f"--columns {self.columns}: expected START:END with START before END, as 0:768")
        return start, stop

    def parts(self) -> list[MatrixPart]:
        """Open the matrices that the rows are in. Raises BadSource where they cannot be used."""
        if self.datacompdr:
            return []
        if self.clip_retrieval is not None:
            return open_clip_retrieval(self.clip_retrieval, self.of, self.key_column)
        return open_matrices(self.rows, self.keys, self.key_column or DEFAULT_COLUMNS[self.of])

    def build_config(self, n_crops: int = 0) -> BuildConfig:
        """Return the build that would compute the same rows, of so many crops where these are imported.

        Raises:
            ValueError: For values out of range.
        """
        crops = self.datacompdr and self.of == "image"
        views = Views(f"crops:{n_crops}", 0, self.view_scale, self.view_augment) if crops else CENTER
        return BuildConfig(
            tars=self.tars,
            encoder=self.encoder,
            output_dir=self.output_dir,
            of=self.of,
            feature=self.feature,
            views=views,
            device=self.device,
            precision=self.precision,
            decode=self.decode,
            image_member=self.image_member,
            captions=self.captions,
            caption_per_line=self.caption_per_line,
            prompt=self.prompt,
            max_length=self.max_length,
            on_bad=self.on_bad,
            dtype=self.dtype,
            min_cosine=self.min_cosine,
            samples_per_tar=self.samples_per_tar,
            rows_per_tar=self.rows_per_tar,
        )
