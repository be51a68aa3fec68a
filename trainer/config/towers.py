"""The towers that a run may have: a dataclass for each kind, in which the string below a key describes it.

What the rest of the trainer asks of a tower, whatever it is built of, are properties that every kind has: `of`, the
side of a sample that it is a tower of; `reads`, what its inputs are; `trained`, whether steps may change it; and
`sees_padding`.
"""

from dataclasses import field
from typing import Annotated, Any, Literal, get_args, get_type_hints

from pydantic import Field
from pydantic.dataclasses import dataclass

from threetowers.cache.encoders.openclip.model_config import read_open_clip_config
from threetowers.cache.format.manifest import Side
from threetowers.trainer.config.values import SECTION, LayerDecay, PositiveFloat, PositiveInt, UnitFloat

Inheritance = Literal["even"]
Standardization = Literal["moments", "phi-s", "none"]
HfPooling = Literal["cls", "mean", "last", "pooler"]
Inputs = Literal["images", "tokens", "rows"]
"""What a tower reads of a sample: pixels of its image, tokens of its captions, or rows of a cache of either."""


def _origin(init: str | None, inherits: bool = False) -> str | None:
    if init is None:
        return None
    return f"inherits from {init}" if inherits else f"from {init}"


@dataclass(frozen=True, config=SECTION)
class Specialize:
    """The image-specific layers that MS-CLIP-S adds to a vision transformer (arXiv 2207.12661)."""

    stem: bool = True
    """Early specialization: convolutions in place of the patch embedding and of the first block."""
    branch: bool = True
    """A parallel convolutional branch, whose features adapters add to the tokens at five depths."""


@dataclass(frozen=True, config=SECTION)
class ImageTower:
    """An image tower: any timm model, used up to the features before its classifier."""

    kind: Literal["timm"]
    """The kind of tower."""
    model: str
    """Name of the model in timm, `hf-hub:ORG/NAME`, or a folder that timm saved it to."""
    args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of `timm.create_model`. With them the model must still give one vector an image."""
    specialize: Specialize | None = None
    """MS-CLIP-S's image-specific layers, for timm's plain vision transformers only; null: none."""
    init: str | None = None
    """Initial weights. null: random. `pretrained`: timm's own. `package:NAME`: those in an installed Python package.
    `timm:NAME[:WEIGHTS]`: those of another model of timm that fits. `run:FOLDER`: those of the image tower of a
    finished run; `run:FOLDER#towers.NAME` where it has several. FILE (safetensors, or a checkpoint of torch), in which
    the model is found by its names; FILE#PREFIX for the part whose names begin with PREFIX, as in
    `runs/a/model.safetensors#towers.image`."""
    inherit: Inheritance | None = None
    """Take the weights of `init`, which is then `pretrained`, `package:`, `timm:` or `run:`, from a deeper or wider
    model of the same family (vision transformer, ResNet, EfficientNet): even, block floor(i m / n) of each series of m
    blocks for block i of n, the first channels, and the first heads, which must be as wide (TinyCLIP, arXiv
    2309.12314). null: the model must be the tower's own. With `pretrained` and `package:`, `model` is the larger one,
    and `args` make the tower smaller."""
    frozen: bool = False
    """Never update the tower; it stays in evaluation mode. Needs `init`."""
    trainable_blocks: PositiveInt | None = None
    """Update only the last so many blocks and what follows them (final norm, pooling); all below is frozen, as in a
    `frozen` tower. Blocks are timm's: of a transformer its own, of a convolutional network those of its stages. Needs
    `init`. null: all is updated."""
    layer_decay: LayerDecay = 1.0
    """Factor of the learning rate from one block to the one below: of n blocks, block i counted from 0 has
    layer_decay^(n - i), what is before the first one layer_decay^(n + 1), and heads 1 (BEiT, arXiv 2106.08254). Times
    `optim.param_groups`. 1.0: one rate for all."""

    @property
    def description(self) -> str:
        """What it is, for the start-up page."""
        return self.model

    @property
    def origin(self) -> str | None:
        """What it begins with, for the start-up page; None: random weights."""
        return _origin(self.init, inherits=self.inherit is not None)

    @property
    def of(self) -> Side:
        """It is a tower of images."""
        return "image"

    @property
    def reads(self) -> Inputs:
        """Its inputs are images."""
        return "images"

    @property
    def trained(self) -> bool:
        """Whether steps may change its weights."""
        return not self.frozen

    @property
    def sees_padding(self) -> bool:
        """Images have none."""
        return False


@dataclass(frozen=True, config=SECTION)
class Share:
    """Parameters that a text tower has in common with an image tower, block by block counted from the last."""

    tower: str
    """Name of the image tower, a timm vision transformer of the same width."""
    modules: tuple[Literal["attn", "mlp", "norm1", "norm2"], ...] = ("attn", "mlp")
    """The modules of a block that are shared."""
    blocks: PositiveInt | None = None
    """Number of blocks, counted from the last; null: as many as the shallower tower has."""


@dataclass(frozen=True, config=SECTION)
class TextTower:
    """A text tower: a transformer of timm blocks over tokens."""

    kind: Literal["text"]
    """The kind of tower."""
    width: PositiveInt
    """Width of the token embeddings and of the blocks."""
    depth: PositiveInt
    """Number of blocks."""
    heads: PositiveInt
    """Attention heads of a block; they divide `width`."""
    mlp_ratio: float = 4.0
    """Width of a block's hidden layer relative to `width`."""
    dropout: UnitFloat = 0.0
    """Dropout probability."""
    pool: Literal["eos", "mean", "last"] = "eos"
    """The feature of a caption: eos, the end token; mean, the mean of all tokens but padding; last, the last
    position."""
    causal: bool = False
    """Let a token attend only to itself and to tokens before it."""
    mask_padding: bool = True
    """Exclude padding from attention."""
    activation: Literal["gelu", "quick_gelu"] = "gelu"
    """Activation function of the blocks; quick_gelu is that of OpenAI's CLIP."""
    norm_eps: PositiveFloat | None = None
    """Epsilon of the layer norms; null: 1e-6 in the blocks, 1e-5 in the final norm."""
    share: Share | None = None
    """Parameters in common with an image tower, as in MS-CLIP; null: none."""
    init: str | None = None
    """Initial weights. null: random. `run:FOLDER`: those of the text tower of a finished run; `run:FOLDER#towers.NAME`
    where it has several. FILE (safetensors, or a checkpoint of torch), in which the tower is found by its names;
    FILE#PREFIX for the part whose names begin with PREFIX."""
    inherit: Inheritance | None = None
    """Take the weights of `init: run:FOLDER` from a deeper or wider text tower with the same vocabulary: even, block
    floor(i m / n) of its m blocks for block i of n, the first channels, and the first heads, which must be as wide
    (TinyCLIP, arXiv 2309.12314). null: the tower of the run must be as large."""
    frozen: bool = False
    """Never update the tower; it stays in evaluation mode. Needs `init`."""
    trainable_blocks: PositiveInt | None = None
    """Update only the last so many blocks and the final norm; all below is frozen, as in a `frozen` tower. Needs
    `init`. null: all is updated."""
    layer_decay: LayerDecay = 1.0
    """Factor of the learning rate from one block to the one below, as of an image tower; token and position embeddings
    have the lowest. 1.0: one rate for all."""

    @property
    def description(self) -> str:
        """What it is, for the start-up page."""
        return f"text, {self.depth} blocks of width {self.width}"

    @property
    def origin(self) -> str | None:
        """What it begins with, for the start-up page; None: random weights."""
        return _origin(self.init, inherits=self.inherit is not None)

    @property
    def of(self) -> Side:
        """It is a tower of text."""
        return "text"

    @property
    def reads(self) -> Inputs:
        """Its inputs are the tokens of captions."""
        return "tokens"

    @property
    def trained(self) -> bool:
        """Whether steps may change its weights."""
        return not self.frozen

    @property
    def sees_padding(self) -> bool:
        """Whether the feature of a caption depends on the padding behind it."""
        return self.pool == "last" or not (self.mask_padding or self.causal)


@dataclass(frozen=True, config=SECTION)
class CacheTower:
    """A frozen pretrained encoder, as the rows of an embedding cache: no parameters and no forward pass."""

    kind: Literal["cache"]
    """The kind of tower."""
    path: str
    """Folder or URL of the cache."""
    of: Side = "image"
    """image: the cache holds embeddings of the images. text: of the captions, of which each sample has those of the
    one that is drawn for it."""
    encoder: str | None = None
    """The encoder whose embeddings the cache must hold, as `timm:resnet50`, or `timm:resnet50@160` at this side of its
    input only; null: any. A dry run without the cache needs it, or `dim`."""
    dim: PositiveInt | None = None
    """Width of the rows that the cache must hold; null: any. A dry run without the cache needs it, unless timm knows
    the encoder."""
    # A linear head with bias can express the same map; starting from there, it need not first learn away a large
    # common offset.
    standardize: Standardization = "moments"
    """Standardization of the rows by their statistics over the cache. moments: each feature by its mean and standard
    deviation. phi-s: less their mean, by a rotation and one common scale that give all features a variance of 1
    (PHI-S, arXiv 2410.01680); for widths with a Hadamard matrix, as all multiples of 64 up to 2048. none: the rows as
    they are, as similarities between images and text need them."""
    on_missing_row: Literal["error", "skip", "mask", "live"] = "error"
    """A sample without an embedding in the cache: error refuses to train, skip leaves the sample out, mask keeps it
    for the terms without this tower, live computes its embedding with the teacher (in the loader, on the CPU)."""
    weights: str | None = None
    """Weights of the teacher for `on_missing_row: live`; null: those that the cache was built with."""

    @property
    def reads(self) -> Inputs:
        """Its inputs are rows of the cache, of images or of captions."""
        return "rows"

    @property
    def trained(self) -> bool:
        """It has no weights."""
        return False

    @property
    def sees_padding(self) -> bool:
        """Rows have none."""
        return False


@dataclass(frozen=True, config=SECTION)
class OpenClipTower:
    """A tower of a model of open_clip, with the model's own projection to the space of images and text.

    Heads on it may be of kind none. Needs the extra `open_clip`.
    """

    kind: Literal["open_clip"]
    """The kind of tower."""
    of: Side
    """image: the model's image tower. text: its text tower, which takes tokens as open_clip does; so
    `data.tokenizer` is that of the model, `open_clip:NAME`."""
    model: str
    """Name of the model in open_clip, `hf-hub:ORG/NAME`, a folder with an `open_clip_config.json`, or a JSON file with
    the config of a model. Of it all is taken but the sizes of images and captions, which are `data.image_size` and
    `data.context_length`; and the rows of the token embedding, where `data.vocab_size` is given. The run keeps the
    config, and needs the files no more."""
    args: dict[str, Any] = field(default_factory=dict)
    """Other values for keys of the model's config, such as `{vision_cfg: {patch_dropout: 0.5}}`."""
    init: str | None = None
    """Initial weights. null: random. `pretrained`: those of the folder or of the hub, or the only ones that open_clip
    has for the model. `open_clip:NAME:WEIGHTS`: those of a model of open_clip that fits, where WEIGHTS is a pretrained
    tag, a file, or TAG=FILE; of a folder or a model of the hub it is left out. `run:FOLDER`: those of such a tower of a
    finished run; `run:FOLDER#towers.NAME` where it has several. FILE (safetensors, or a checkpoint of torch), in which
    the tower is found by its names; FILE#PREFIX for the part whose names begin with PREFIX. Of another size of images
    or captions, positions are resampled."""
    frozen: bool = False
    """Never update the tower; it stays in evaluation mode. Needs `init`."""
    trainable_blocks: PositiveInt | None = None
    """Update only the last so many blocks and what follows them (final norm, pooling, projection); all below is frozen,
    as in a `frozen` tower. Needs `init`. null: all is updated."""
    layer_decay: LayerDecay = 1.0
    """Factor of the learning rate from one block to the one below, as of a timm tower; the projection has that of the
    heads. 1.0: one rate for all."""

    @property
    def description(self) -> str:
        """What it is, for the start-up page."""
        return f"{self.of} tower of open_clip's {self.model}"

    @property
    def origin(self) -> str | None:
        """What it begins with, for the start-up page; None: random weights."""
        return _origin(self.init)

    @property
    def reads(self) -> Inputs:
        """Its inputs are images, or the tokens of captions."""
        return "images" if self.of == "image" else "tokens"

    @property
    def trained(self) -> bool:
        """Whether steps may change its weights."""
        return not self.frozen

    @property
    def sees_padding(self) -> bool:
        """Whether the feature of a caption depends on the padding behind it.

        Raises:
            ValueError: There is no such model, or open_clip is needed to find it.
        """
        return self.of == "text" and read_open_clip_config(self.model, self.args).sees_padding


@dataclass(frozen=True, config=SECTION)
class HfTower:
    """A tower of transformers: a model of images or of text, or that side of a model of both, without its heads.

    Needs the extra `hf`. No code of a model hub is run.
    """

    kind: Literal["hf"]
    """The kind of tower."""
    of: Side
    """image, or text: which side of a sample it is of."""
    model: str | None = None
    """A folder that `save_pretrained` wrote, a name on the hub, perhaps with @REVISION, or `package:NAME` for a model
    inside a pip package (`package:all-minilm-l6-v2`, extra `text-demo`). null: `config` says all. The run keeps the
    config, and needs the files no more."""
    config: dict[str, Any] = field(default_factory=dict)
    """Values for keys of the model's config of transformers, such as `{hidden_dropout_prob: 0.0}`. With a `model_type`
    among them it is the config by itself, and no files are read for it: `{model_type: bert}` is BERT-base."""
    init: str | None = None
    """Initial weights. null: random. `pretrained`: those of `model`. `package:NAME`: those inside a pip package.
    `run:FOLDER`: those of such a tower of a finished run; `run:FOLDER#towers.NAME` where it has several. FILE
    (safetensors, or a checkpoint of torch), in which the model is found by its names; FILE#PREFIX for the part whose
    names begin with PREFIX. Images are normalised as `pretrained` and `run:` say, else by 0.5 and 0.5."""
    pool: HfPooling | None = None
    """The feature. cls: the first token. mean: the mean of all tokens but padding, or of all patches. last: the last
    token, of text. pooler: the model's own vector. null: as the files of a model of sentence-transformers say; else
    the model's own vector where it was trained by it, last for decoders, mean for other text, cls for other images
    with a class token."""
    frozen: bool = False
    """Never update the tower; it stays in evaluation mode. Needs `init`."""
    trainable_blocks: PositiveInt | None = None
    """Update only the last so many blocks and what follows them, as of a timm tower. Needs `init`. null: all is
    updated."""
    layer_decay: LayerDecay = 1.0
    """Factor of the learning rate from one block to the one below, as of a timm tower. 1.0: one rate for all."""

    @property
    def description(self) -> str:
        """What it is, for messages."""
        return f"{self.model or self.config['model_type']} of transformers"

    @property
    def origin(self) -> str | None:
        """What it begins with, for the start-up page; None: random weights."""
        return _origin(self.init)

    @property
    def reads(self) -> Inputs:
        """Its inputs are images, or the tokens of captions."""
        return "images" if self.of == "image" else "tokens"

    @property
    def trained(self) -> bool:
        """Whether steps may change its weights."""
        return not self.frozen

    @property
    def sees_padding(self) -> bool:
        """Padding is masked."""
        return False


WeightedTower = ImageTower | TextTower | OpenClipTower | HfTower
AnyTower = WeightedTower | CacheTower
Tower = Annotated[AnyTower, Field(discriminator="kind")]
TOWER_KINDS = frozenset(get_type_hints(tower)["kind"].__args__[0] for tower in get_args(AnyTower))
