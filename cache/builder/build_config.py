"""Configuration of the cache commands: which samples, which encoders, and how the embeddings are stored.

The dataclasses are the command line (`threetowers.cache.cli`) and the Python interface at once; each command takes the
smallest of them that has what it needs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, get_args

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from threetowers.cache.format.dtypes import DtypeName, storage_dtype
from threetowers.cache.format.manifest import CaptionSources, DecodeMode, EncoderPrecision, EncoderRuntime, Side
from threetowers.cache.format.rand_augment import NO_AUGMENT
from threetowers.cache.format.views import CENTER, Views
from threetowers.cache.storage.storage import Storage
from threetowers.cache.webdataset.dataset_sample import DatasetSample, sample_dataset
from threetowers.cache.webdataset.images import MAX_PIXELS
from threetowers.cache.webdataset.tar_list import OnBad

if TYPE_CHECKING:
    from threetowers.cache.encoders.encoder import FrozenEncoder


def _several(metavar: str, parse: Callable[[str], Any] = str) -> PrimitiveConstructorSpec[Any]:
    """Read a flag with one or more values, where Python callers may also give a single value."""
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar=f"{metavar} ...",
        instance_from_str=lambda arguments: tuple(parse(argument) for argument in arguments),
        is_instance=lambda value: True,
        str_from_instance=lambda value: [str(value)],
    )


def _views_from_flags(
    views: str = "center", view_seed: int = 0, view_scale: float = 1.0, view_augment: str = NO_AUGMENT
) -> Views:
    """Build `Views` from flat flags.

    Args:
        views: Views of each image to embed: center (the teacher's own transform), center+flip, or crops:K.
        view_seed: Seed of the random crops.
        view_scale: Smallest share of the image's area in a crop, like data.crop_scale of a run.
        view_augment: What is done to the crops: none, or randaugment:OPS:MAGNITUDE, as randaugment:2:9.
    """
    return Views(views, view_seed, view_scale, view_augment)


class Source(NamedTuple):
    """What a cache holds: one feature of one side of an encoder. A feature that is None is the encoder's default."""

    encoder: str
    of: Side
    feature: str | None


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Samples, and the encoder that embeds them.

    `encoder`, `of` and `feature` take one value, or one for each of several caches.
    """

    tars: Annotated[Sequence[str | Path], _several("TAR")]
    """Paths or URLs, globs in quotes, and brace ranges like 'data/{000..099}.tar'."""

    encoder: Annotated[str | Sequence[str], _several("ENCODER")]
    """KIND:NAME[@SIZE][:WEIGHTS], as timm:resnet50 or open_clip:ViT-B-32:openai: NAME is a model of that library, or
    its folder, SIZE the side of its input in pixels, WEIGHTS a file, FILE#PREFIX for a part of one, or package:NAME."""

    of: Annotated[Side | Sequence[Side], _several("SIDE")] = "image"
    """image or text: which side of the samples, and of the encoder."""

    feature: Annotated[str | Sequence[str] | None, _several("FEATURE")] = None
    """Which output of the encoder, as pooled or projected; default: its first."""

    device: str | None = None
    """cpu, cuda or cuda:N; default: a GPU if there is one."""

    precision: EncoderPrecision | None = None
    """Arithmetic of the forward pass; default: the cache's own, else bfloat16 on a GPU that has it, else float32."""

    runtime: EncoderRuntime | None = None
    """What runs the forward pass. onnx is faster for some convolutional networks on the CPU, and takes the extra of
    that name; default: the cache's own, else torch."""

    decode: DecodeMode = "pillow"
    """pillow-draft decodes large JPEGs at a fraction of their size: faster, not exact."""

    compile: bool = False
    """Run encoders of images through torch.compile."""

    image_member: str | None = None
    """The member that is the image of a sample, by its extension, as jpg or left.jpg; default: its only image."""

    captions: Annotated[Sequence[str], _several("SOURCE")] = ()
    """Where captions are: extensions of text members, or json.FIELD, all of which are embedded; default: the first of
    txt, json.captions and json.caption that a sample has."""

    caption_per_line: bool = False
    """Each line of a text member is a caption."""

    prompt: str | None = None
    """Put before each caption, as an instruction; default: the encoder's own, mostly none."""

    max_length: int | None = None
    """Tokens to which captions are cut, special ones included; default: the encoder's own."""

    max_pixels: int = MAX_PIXELS
    """Images with more pixels are bad samples, a protection against decompression bombs."""

    on_bad: OnBad = "skip"
    """error stops at a bad sample or tar; skip continues without bad samples, whose rows have a status instead of an
    embedding; skip_tars also without bad tars."""

    def __post_init__(self) -> None:
        """Raise ValueError for values that are unknown or out of range."""
        if self.on_bad not in get_args(OnBad):
            raise ValueError(f"--on-bad {self.on_bad}: expected {', '.join(get_args(OnBad))}")
        if self.max_pixels < 1:
            raise ValueError(f"--max-pixels {self.max_pixels}: expected at least 1")
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"--max-length {self.max_length}: expected at least 1")
        self._check_sides()
        self.caption_sources()
        if self.runtime == "onnx":
            from threetowers.cache.encoders.onnx_runtime import require_onnx_runtime

            require_onnx_runtime()
            if self.compile:
                raise ValueError("--runtime onnx, --compile: expected one of them, torch.compile is torch's")

    def sources(self) -> list[Source]:
        """Return what each cache holds.

        Raises:
            ValueError: Of encoders, sides and features there are different numbers, other than one.
        """
        given = {
            "--encoder": as_tuple(self.encoder),
            "--of": as_tuple(self.of),
            "--feature": as_tuple(self.feature),
        }
        count = max(map(len, given.values()))
        for flag, values in given.items():
            if len(values) not in (1, count):
                found = ", ".join(f"{len(each)} {name}" for name, each in given.items())
                raise ValueError(f"{found}: expected one of each, or as many {flag} as there are caches")
        encoders, sides, features = (values * (count // len(values)) for values in given.values())
        for side in sides:
            if side not in get_args(Side):
                raise ValueError(f"--of {side}: expected {' or '.join(get_args(Side))}")
        return [Source(*source) for source in zip(encoders, sides, features, strict=True)]

    def _check_sides(self) -> None:
        """Raise ValueError for what only the other side of encoders knows."""
        sides = set(as_tuple(self.of))
        of_text = {
            "--captions": bool(self.captions),
            "--caption-per-line": self.caption_per_line,
            "--prompt": self.prompt is not None,
            "--max-length": self.max_length is not None,
        }
        given = [flag for flag, is_given in of_text.items() if is_given]
        if given and "text" not in sides:
            raise ValueError(f"{', '.join(given)}: expected a cache of text (--of text), found {sorted(sides)}")
        if self.runtime == "onnx" and "image" not in sides:
            raise ValueError("--runtime onnx: expected a cache of images, text runs by torch")

    def caption_sources(self) -> CaptionSources:
        """Return which captions a cache of text holds. Raises ValueError for what is no source, or is given twice."""
        sources = as_tuple(self.captions)
        if weighted := [source for source in sources if "=" in source]:
            raise ValueError(
                f"--captions: found {weighted[0]!r}, expected SOURCE: a cache holds the captions of all sources, and "
                "weights are a run's"
            )
        try:
            return CaptionSources(sources, self.caption_per_line)
        except ValueError as error:
            raise ValueError(f"--captions: {error}") from None

    def sample_images(self, sample: int, seed: int) -> DatasetSample:
        """Draw a sample, as `draw` does. Raises ValueError if captions are to be embedded."""
        if "text" in as_tuple(self.of):
            raise ValueError("--of text: expected --of image, what is measured here are images and their views")
        return self.draw(sample, seed)

    def draw(self, sample: int, seed: int) -> DatasetSample:
        """Draw a sample of the samples. Raises what `sample_dataset` raises."""
        return sample_dataset(
            self.tars,
            sample,
            seed,
            image_member=self.image_member,
            max_pixels=self.max_pixels,
            on_bad=self.on_bad,
        )

    def load_encoders(self, device: str) -> "dict[str, FrozenEncoder]":
        """Load each encoder onto `device`, by its name. Raises ValueError as `load_frozen_encoder` does."""
        from threetowers.cache.encoders.device_defaults import default_precision
        from threetowers.cache.encoders.names import EncoderOptions, load_frozen_encoder

        options = EncoderOptions(
            device=device,
            precision=self.precision or default_precision(device),
            runtime=self.runtime or "torch",
            decode=self.decode,
            compiled=self.compile,
            prompt=self.prompt,
            max_length=self.max_length,
        )
        names = dict.fromkeys(source.encoder for source in self.sources())
        return {name: load_frozen_encoder(name, options) for name in names}

    def load_encoder(self, device: str) -> "FrozenEncoder":
        """Load the only encoder onto `device`.

        Raises:
            ValueError: There are several; or as for `load_frozen_encoder`.
        """
        if len(self.sources()) != 1:
            raise ValueError(f"--encoder {' '.join(as_tuple(self.encoder))}: expected exactly one cache")
        (encoder,) = self.load_encoders(device).values()
        return encoder


@dataclass(frozen=True, kw_only=True)
class EmbeddingConfig(EncoderConfig):
    """An encoder, the views it embeds, and the resources it uses."""

    views: Annotated[Views, tyro.conf.arg(constructor=_views_from_flags, name="")] = CENTER
    """Views of each image to embed."""

    batch_size: int | None = None
    """Images or captions per forward pass; default: as the cache was begun with, else 64 on the CPU, and 256 images or
    512 captions on a GPU. Only CPUs of one kind, at equal batch size, --runtime and --compile, give equal bits."""

    threads: int | None = None
    """Threads that read headers, and decode and resize where no processes do; default: this process's share of the
    cores."""

    workers: int | None = None
    """Processes that decode and resize, which threads of the process that feeds a GPU would slow down; 0: threads do.
    Default: this process's share of the cores beside a GPU, 0 on the CPU."""

    def __post_init__(self) -> None:
        """Raise ValueError for values out of range."""
        super().__post_init__()
        if self.views != CENTER and "image" not in as_tuple(self.of):
            raise ValueError(f"--views {self.views}: expected a cache of images (--of image), captions have no views")
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"--workers {self.workers}: expected at least 0")
        if any(number is not None and number < 1 for number in (self.batch_size, self.threads)):
            raise ValueError(f"--batch-size {self.batch_size}, --threads {self.threads}: expected at least 1")


@dataclass(frozen=True, kw_only=True)
class BuildConfig(EmbeddingConfig):
    """One cache to build, or several over the same tars.

    Examples:
        >>> config = BuildConfig(tars=["data/*.tar"], output_dir="cache", encoder="timm:vit_base_patch16_224")
        >>> config.dtype
        'float16'
    """

    output_dir: Annotated[str | Path | Storage | Sequence[str | Path], _several("DIR")]
    """Folder or URL of the cache, or of each of several; created if missing."""

    dtype: DtypeName = "float16"
    """Number format of the stored rows; int8 has a scale per row, float32 and bfloat16 exceed 65504."""

    min_cosine: float | None = None
    """Stop where a row, as stored, has a smaller cosine with itself as computed; default: a bound for each dtype."""

    samples_per_tar: int | None = None
    """Samples for which each tar has room; default: as the largest has. More leaves room for larger ones later."""

    rows_per_tar: int | None = None
    """Captions for which each tar has room in a cache of text; default: four times those of the densest of 16 tars."""

    lease_timeout: float = 120
    """Seconds without a heartbeat after which another worker may take over a tar."""

    wait_seconds: tyro.conf.Suppress[float] = 3600
    """Seconds that other ranks wait for rank 0 to index the tars and to write the manifest."""

    progress: tyro.conf.Suppress[bool] = False
    """Show a progress bar on rank 0."""

    def __post_init__(self) -> None:
        """Raise ValueError for values that are unknown or out of range."""
        super().__post_init__()
        storage_dtype(self.dtype)
        if self.samples_per_tar is not None and self.samples_per_tar < 1:
            raise ValueError(f"--samples-per-tar {self.samples_per_tar}: expected at least 1")
        sides = set(as_tuple(self.of))
        if self.rows_per_tar is not None and (self.rows_per_tar < 1 or "text" not in sides):
            raise ValueError(
                f"--rows-per-tar {self.rows_per_tar}: expected at least 1, and a cache of text (--of text): "
                "--samples-per-tar is for caches of images too"
            )

    def output_dirs(self) -> tuple[str | Path | Storage, ...]:
        """Return where each cache is built.

        Raises:
            ValueError: There is not one for each encoder, side and feature.
        """
        outputs = as_tuple(self.output_dir)
        sources = self.sources()
        if len(outputs) != len(sources):
            raise ValueError(
                f"{len(outputs)} --output-dir for {len(sources)} caches by --encoder, --of and --feature: expected one "
                "output for each"
            )
        return outputs


def as_tuple(value: Any) -> tuple[Any, ...]:
    """Return several values as a tuple, and a single one as a tuple of one."""
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
