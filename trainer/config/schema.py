"""The keys of a run's config: frozen dataclasses, checked strictly, in which the string below a key describes it.

A run is a set of named towers, of heads on them, and of pair terms between heads. CLIP, LiT, 3T and MS-CLIP differ in
this data alone. `docs/config.md` and `threetowers train --help-config` are generated from this file and towers.py.
"""

from dataclasses import field, fields
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from threetowers.cache.format.manifest import Side
from threetowers.cache.webdataset.captions import CaptionFormat
from threetowers.cache.webdataset.images import MAX_PIXELS
from threetowers.cache.webdataset.tar_list import OnBad
from threetowers.trainer.config.towers import Inputs, Tower
from threetowers.trainer.config.values import SECTION, PositiveFloat, PositiveInt, UnitFloat, Weight

Precision = Literal["float32", "mixed", "bfloat16"]
HeadNorm = Literal["batch", "layer"]
Pairing = Literal["samples", "captions", "texts"]
"""What a term compares: a row of each sample on both sides; samples on one and all their captions on the other; all
captions on both."""


@dataclass(frozen=True, config=SECTION)
class Duration:
    """A span of training, in exactly one unit."""

    epochs: PositiveFloat | None = None
    """Passes over the data. An epoch is the complete global batches of all tars."""
    samples: PositiveInt | None = None
    """Samples, counted over all ranks and rounded down to complete global batches."""
    steps: PositiveInt | None = None
    """Optimizer steps."""
    percent: Annotated[float, Field(gt=0, le=100)] | None = None
    """Percentage of the run's steps. The length of the run itself cannot be given in it."""

    def units(self) -> list[str]:
        """Return the units that are given."""
        return [unit.name for unit in fields(self) if getattr(self, unit.name) is not None]

    def in_steps(self, samples: int, batch: int, total: int = 0) -> int:
        """Return the span in optimizer steps, at least one.

        Args:
            samples: Samples of one epoch.
            batch: The global batch size.
            total: Steps of the run, of which a percentage is taken.
        """
        if self.steps is not None:
            return self.steps
        if self.samples is not None:
            return max(1, self.samples // batch)
        if self.percent is not None:
            return max(1, round(total * self.percent / 100))
        assert self.epochs is not None
        return max(1, round(self.epochs * (samples // batch)))


@dataclass(frozen=True, config=SECTION)
class TrainDataset:
    """One of several data sets that a run mixes."""

    tars: list[str]
    """Tars of the data set: paths, URLs, globs or brace ranges."""
    weight: Annotated[Weight, Field(gt=0)] = 1.0
    """Its share of every global batch, relative to the weights of the other data sets. A fraction such as `1/3` is
    accepted."""
    group_field: str | None = None
    """JSON field that names the group of a sample; null: `data.group_field`."""
    captions: dict[str, Annotated[Weight, Field(gt=0)]] = field(default_factory=dict)
    """Sources of its captions, by weight; {}: `data.captions`."""
    caption_per_line: bool | None = None
    """Whether each line of its text members is a caption; null: `data.caption_per_line`."""
    image_member: str | None = None
    """Extension of the member that is the image of a sample; null: `data.image_member`."""


@dataclass(frozen=True, config=SECTION)
class Augment:
    """Random changes to the image that an image tower sees, after the crop. A change is off where its key is 0."""

    flip: UnitFloat = 0.0
    """Probability of mirroring the image."""
    brightness: UnitFloat = 0.0
    """x: multiply the brightness by a random factor from 1 - x to 1 + x."""
    contrast: UnitFloat = 0.0
    """x: multiply the contrast by a random factor from 1 - x to 1 + x."""
    saturation: UnitFloat = 0.0
    """x: multiply the saturation by a random factor from 1 - x to 1 + x."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """x: shift the hue by a random share of the colour circle from -x to x."""
    jitter: UnitFloat = 1.0
    """Probability that the four changes of colour above are applied, in a random order."""
    grayscale: UnitFloat = 0.0
    """Probability of converting the image to grey."""
    blur: UnitFloat = 0.0
    """Probability of a Gaussian blur with a standard deviation of 0.1 to 2 pixels."""


@dataclass(frozen=True, config=SECTION)
class Data:
    """The training data and how it is read. Give either `tars` or `datasets`."""

    tokenizer: str | None = None
    """A SentencePiece model (.model; `threetowers tokenizer train` writes one), `hf:FOLDER_OR_FILE` (a tokenizer.json
    of transformers, or `hf:package:NAME` for that in a pip package; extra `hf`), or `open_clip:NAME` (that of a model
    of open_clip, as `open_clip:ViT-B-32` for CLIP's; extra `open_clip`). null in a run without a text tower of its
    own."""
    image_size: PositiveInt | None = None
    """Side of the square image that the image towers see, in pixels; null in a run without an image tower of its
    own."""
    tars: list[str] = field(default_factory=list)
    """Tars of a single data set: paths, URLs, globs or brace ranges."""
    datasets: dict[str, TrainDataset] = field(default_factory=dict)
    """Several data sets by name, mixed by weight."""
    access: Literal["auto", "random", "sequential"] = "auto"
    """random: read each sample by its position in its tar, in any order. sequential: read complete tars one after the
    other through webdataset, in `num_streams` streams. auto: random if all tars are local, otherwise sequential."""
    num_streams: PositiveInt | None = None
    """Sequential access: tars read side by side, over all ranks. A multiple of the world size that divides
    `global_batch_size`, and a part of what the run is. null: as many as there are tars, but 64 to 512, as far as that
    divides the batch."""
    shuffle_buffer: PositiveInt = 10_000
    """Sequential access: undecoded samples that wait to be drawn, over all streams."""
    index_dir: str | None = None
    """Folder or URL that keeps the indexes of tars between launches; any number of runs may share it. null: index the
    tars at every start, for which a remote tar is streamed from end to end."""
    context_length: PositiveInt = 32
    """Tokens per caption at most, including the end token; longer captions are cut."""
    caption_padding: Literal["longest", "context_length"] | None = None
    """To what length captions are padded: longest, that of the longest caption of a rank's batch, up to a multiple of 8
    and `context_length`, or context_length. The embeddings are the same up to rounding, and short captions take less
    time. null: longest, unless a text tower sees the padding (`pool: last`, or neither `causal` nor `mask_padding`)."""
    vocab_size: PositiveInt | None = None
    """Rows of the token embedding; null: one for each id of the tokenizer."""
    crop_scale: UnitFloat = 1.0
    """Smallest share of the image's area that a random crop covers; 1.0: no random crop."""
    augment: Augment = field(default_factory=Augment)
    """Random changes to the image, after the crop."""
    group_field: str | None = None
    """JSON field that names the group of a sample, i.e. what it shows; null: each sample is its own group. A sample
    without a value (no such field, null, blank, NaN) is its own group, too."""
    captions: dict[str, Annotated[Weight, Field(gt=0)]] = field(default_factory=dict)
    """Sources of captions, by weight, as in `{txt: 1, json.recaption: 2}`: the extension of a text member, or
    `json.FIELD`; `syn.json.FIELD` is a field of the member `syn.json`. In each epoch one of those that a sample has is
    drawn. {}: the `txt` member where it has a caption, otherwise the `json` member's `captions`, otherwise its
    `caption`."""
    captions_per_sample: PositiveInt = 1
    """How many captions of a sample each epoch draws: as many different ones, or all where it has fewer. Each is a
    positive of the sample's image, see `terms.T.positives`."""
    caption_per_line: bool = False
    """Read each line of a text member as a caption of its own. Otherwise a text member is a single caption."""
    image_member: str | None = None
    """Extension of the member that is the image of a sample, such as `jpg` or `left.jpg`; null: the only member with
    the extension of an image. Caches must have been built from the same member."""
    on_bad: OnBad = "error"
    """A sample or tar that cannot be used: error stops the run, skip leaves bad samples out, skip_tars bad tars, too.
    Missing rows of a cache are handled by the tower's `on_missing_row`."""
    on_incomplete_cache: Literal["error", "wait", "skip"] = "error"
    """Tars whose rows are not all built: error refuses to train, wait waits for them, skip begins each epoch with the
    tars that are built by then. Durations count the samples of all tars in any case."""
    workers: Annotated[int, Field(ge=0)] | None = None
    """Processes per rank that read and decode samples; 0: the training process itself does. null: on GPUs the cores of
    a rank but one, 16 at most; on CPUs, where they would compete with the training, 1."""
    max_pixels: PositiveInt = MAX_PIXELS
    """Images with more pixels are bad samples, a protection against decompression bombs."""

    @property
    def named_datasets(self) -> dict[str, TrainDataset]:
        """The data sets by name; `tars` are a single one with an empty name."""
        return self.datasets or {"": TrainDataset(tars=self.tars)}

    def image_member_of(self, dataset: TrainDataset) -> str | None:
        """Return the extension of the images of a data set; None: each sample's only image."""
        return dataset.image_member or self.image_member

    def caption_format(self, dataset: TrainDataset | None = None) -> CaptionFormat:
        """Return where the captions of a data set are, or of all where none is given.

        Raises:
            ValueError: What is named is no source.
        """
        if dataset is None:
            return CaptionFormat(self.captions, self.caption_per_line)
        per_line = self.caption_per_line if dataset.caption_per_line is None else dataset.caption_per_line
        return CaptionFormat(dataset.captions or self.captions, per_line)

    @property
    def side(self) -> int:
        """The side of the image in pixels, which a config with an image tower gives."""
        assert self.image_size is not None
        return self.image_size

    @property
    def patterns(self) -> list[str]:
        """The paths and patterns of the tars of all data sets."""
        return [pattern for dataset in self.named_datasets.values() for pattern in dataset.tars]


@dataclass(frozen=True, config=SECTION)
class Head:
    """A map from a tower, or from another head before its normalization, to the shared space.

    One head may serve several terms.
    """

    of: str
    """The tower or the earlier head whose features are mapped."""
    kind: Literal["linear", "mlp", "none"] = "linear"
    """linear: one layer. mlp: `depth` hidden layers and a linear one. none: the features as they are."""
    embed_dim: PositiveInt | None = None
    """Width of its output; null: the `embed_dim` of the run."""
    bias: bool = True
    """Give its layers a bias."""
    input_norm: HeadNorm | None = None
    """linear, mlp: normalization of the features before the first layer, with a learned scale and offset; null: none.
    layer: of each sample over its features. batch: of each feature over the samples of a rank's micro-batch."""
    hidden: PositiveInt | None = None
    """mlp: width of the hidden layers; null: the width of its input."""
    depth: PositiveInt = 1
    """mlp: number of hidden layers."""
    norm: HeadNorm | None = None
    """mlp: normalization in each hidden layer, before its activation function; null: none."""
    activation: Literal["gelu", "relu", "relu6", "silu"] = "gelu"
    """mlp: activation function of the hidden layers. relu6 is min(relu, 6)."""
    gated: bool = False
    """mlp: multiply each hidden layer's output by a second linear map of its input, without norm and activation
    function (a gated linear unit)."""
    dropout: UnitFloat = 0.0
    """mlp: dropout probability after each hidden layer."""


@dataclass(frozen=True, config=SECTION)
class TermTeacher:
    """A teacher of a distill term: two heads without parameters on frozen towers, whose similarities are learned.

    Both may be on one tower: images then learn how similar images are to each other.
    """

    x: str
    """The head that stands for the term's x: of kind none, on a cached or a frozen tower."""
    y: str
    """The head that stands for the term's y, of the same width."""
    temperature: Annotated[PositiveFloat | str, Field(union_mode="left_to_right")]
    """What the teacher's cosines are divided by: a number, such as 0.01 for OpenAI's CLIP; or the name of a learned
    scale, the inverse temperature, which is taken as it stands at each step and gets no gradient from here."""
    weight: Annotated[Weight, Field(gt=0)] = 1.0
    """Its share in the target, relative to the weights of the other teachers. A fraction such as `1/3` is accepted."""
    bias: float | None = None
    """loss.kind sigmoid: bias of the teacher's logits, such as -12.9; with a learned scale that scale's own is taken,
    and this is null."""


@dataclass(frozen=True, config=SECTION)
class Term:
    """A loss between two heads. Terms that name the same scale share one learned temperature."""

    x: str
    """The first head."""
    y: str
    """The second head."""
    kind: Literal["contrastive", "distill", "l2", "cosine", "smooth_l1"] = "contrastive"
    """contrastive: the loss of the section `loss`. distill: the same loss with the similarities of teachers as its
    target. Of the normalized embeddings of a sample, without negatives: l2, the squared distance; cosine, one less the
    cosine; smooth_l1, the Huber function of each difference divided by `beta`, summed over the features."""
    weight: Weight = 1.0
    """Factor of the term in the sum of all terms. A fraction such as `1/3` is accepted."""
    scale: str = "scale"
    """contrastive, distill: name of the learned scale (inverse temperature)."""
    teachers: dict[str, TermTeacher] = field(default_factory=dict)
    """distill: teachers by name. The target is the mean of their distributions over the batch, by weight. A teacher
    that is null is left out."""
    hard_weight: UnitFloat = 0.0
    """distill: share of the samples' own pairs, the target of a contrastive term, in the target; the rest is the
    teachers'. Where it is above 0, pairs of one group leave the loss as they leave a contrastive term."""
    drop_teachers: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """distill: probability at each step that a teacher is left out (UNIC, arXiv 2408.05088); one of them always stays.
    """
    beta: PositiveFloat = 1.0
    """smooth_l1: the difference at which the loss turns from a square into a line."""
    positives: Literal["one", "all"] = "all"
    """With `data.captions_per_sample` above 1, in a term with a head of text: all captions that are drawn of a sample,
    or the first one alone."""

    @property
    def has_scale(self) -> bool:
        """Whether similarities over the batch are compared, which needs a scale."""
        return self.kind in ("contrastive", "distill")

    @property
    def masks_groups(self) -> bool:
        """Whether samples of one group are no negatives of each other."""
        return self.kind == "contrastive" or (self.kind == "distill" and self.hard_weight > 0)

    @property
    def left_out_share(self) -> float:
        """In which share of the steps each teacher is left out: one of them, drawn at random, always stays."""
        return self.drop_teachers * (1 - 1 / len(self.teachers)) if self.teachers else 0.0

    @property
    def all_heads(self) -> list[str]:
        """The heads that the term takes embeddings of: its own, and its teachers'."""
        teachers = [head for teacher in self.teachers.values() for head in (teacher.x, teacher.y)]
        return list(dict.fromkeys([self.x, self.y, *teachers]))


@dataclass(frozen=True, config=SECTION)
class Deploy:
    """The two heads that make the model kept for inference."""

    image: str
    """The image head, on an image tower or on a cache of images."""
    text: str
    """The text head, on a text tower or on a cache of text."""


@dataclass(frozen=True, config=SECTION)
class Loss:
    """The loss of contrastive and distill terms, over the global batch."""

    kind: Literal["softmax", "sigmoid"] = "softmax"
    """softmax: InfoNCE, as in CLIP. sigmoid: as in SigLIP."""
    scale_init: PositiveFloat = 14.3  # CLIP's 1 / 0.07
    """Initial scale (inverse temperature)."""
    scale_max: PositiveFloat = 100.0
    """Largest scale; a larger one is clamped."""
    bias_init: float = -10.0  # SigLIP's
    """sigmoid: initial bias of the logits."""
    mask_false_negatives: bool = True
    """Leave pairs of samples of one group out of the negatives."""
    logit_cache_mib: Annotated[int, Field(ge=0)] = 16
    """Memory in which similarity tiles wait for the backward pass, in MiB per rank and term. With room for all b x B x
    4 bytes a softmax step costs 3 products of that size instead of 4. The sigmoid loss needs none."""
    ring: bool = False
    """Pass column features from rank to rank instead of gathering them: O(b·D) memory a rank instead of O(B·D), for a
    global batch B and a local batch b. Features are sent again in the backward pass."""


@dataclass(frozen=True, config=SECTION)
class ParameterGroup:
    """Parameters, chosen by name, with a learning rate or weight decay of their own."""

    match: str
    """Shell pattern of parameter names as in model.safetensors, such as `towers.image.*`."""
    lr: Annotated[float, Field(ge=0)] = 1.0
    """Factor of the scheduled learning rate. 0 freezes the parameters, and a module of which all are frozen stays in
    evaluation mode, as a `frozen` tower does: no dropout, fixed statistics."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """Weight decay of its matrices; null: `optim.weight_decay`."""


@dataclass(frozen=True, config=SECTION)
class Optim:
    """The optimizer and its learning-rate schedule."""

    name: Literal["adamw", "adafactor"] = "adamw"
    """The optimizer. adafactor needs `engine.zero_stage: 0`, in float32 or mixed precision."""
    lr: PositiveFloat = 1e-3
    """Learning rate after warm-up."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled weight decay, multiplied by the learning rate as everywhere in torch. Vectors (norms, biases, scales)
    have none."""
    betas: tuple[UnitFloat, UnitFloat] = (0.9, 0.98)
    """Decay rates of the running means of the gradient and of its square."""
    param_groups: list[ParameterGroup] = field(default_factory=list)
    """Settings for some parameters; the first group that matches a parameter counts."""
    schedule: Literal["cosine", "constant", "rsqrt"] = "cosine"
    """The learning rate after warm-up: a cosine to its end, constant, or proportional to 1 / sqrt(step)."""
    warmup: UnitFloat | Duration = 0.05
    """Linear warm-up: a share of all steps, or a duration."""
    cooldown: UnitFloat | Duration = 0.0
    """Linear decay at the end, after `constant` or `rsqrt`: a share of all steps, or a duration."""
    lr_end: UnitFloat = 0.0
    """Learning rate at the end of a cosine or of a cooldown, as a share of `lr`."""
    grad_clip_norm: Annotated[float, Field(ge=0)] = 1.0
    """Largest global norm of the gradient; a larger gradient is scaled down. 0: no clipping."""


@dataclass(frozen=True, config=SECTION)
class Engine:
    """The execution of a step: DeepSpeed, precision, memory."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage: partition nothing (0), optimizer state (1), gradients too (2), parameters too (3)."""
    precision: Precision | None = None
    """Arithmetic of towers and heads. float32. mixed: float32 weights, products in bfloat16 (autocast). bfloat16:
    weights in bfloat16 too, with a float32 copy in the optimizer; for ZeRO 1 and 2. null: mixed where there is a GPU,
    float32 where there is none; a run that has begun keeps its own. Scales, biases and the loss's sums are float32 in
    any."""
    micro_batch_size: PositiveInt | None = None
    """Samples that go forward and backward at a time on a rank (gradient caching); null: the complete local batch. The
    loss is over the global batch in any case. Costs a second forward pass."""
    activation_checkpointing: bool = False
    """Keep only the input of each block and recompute the rest in the backward pass."""
    compile: Literal[False, "blocks", "model"] = False
    """torch.compile, for ZeRO 0 to 2. blocks: each transformer block, and whole towers without such blocks. model:
    everything from inputs to embeddings at once, which is faster and takes longer to compile."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A NaN or infinite loss or gradient: stop the run, or skip the step."""
    nonfinite_limit: PositiveInt = 10
    """skip: consecutive skipped steps after which the run stops."""
    deepspeed_extra: dict[str, Any] = field(default_factory=dict)
    """DeepSpeed settings merged into the generated DeepSpeed config, such as `zero_optimization.reduce_bucket_size` or
    `comms_logger`. Those that a key of ours decides are refused, and so are unknown ones."""


@dataclass(frozen=True, config=SECTION)
class Log:
    """What a run records of itself."""

    every_steps: PositiveInt = 10
    """Steps between two lines of metrics."""
    tensorboard: bool = True
    """Write TensorBoard files beside metrics.jsonl."""
    wandb: str | None = None
    """The Weights & Biases project that is told the metrics, too; null: none. Needs the extra `wandb`."""
    trackio: str | None = None
    """The Trackio project that is told the metrics, too; null: none. Needs the extra `trackio`."""
    profile: tuple[PositiveInt, PositiveInt] | None = None
    """First and last step, counted from 1, of a torch.profiler trace in the run folder; null: no trace."""


@dataclass(frozen=True, config=SECTION)
class Checkpoint:
    """When checkpoints are written, in addition to the end of the run and SIGTERM."""

    every_steps: PositiveInt | None = None
    """Steps between two checkpoints; null: not by steps."""
    every_minutes: PositiveFloat | None = None
    """Minutes between two checkpoints; null: not by time."""
    keep: PositiveInt = 2
    """Number of checkpoints kept, the newest ones."""
    staging_dir: str | None = None
    """Where `output_dir` is a URL, the local folder in which files are staged; null: the one for temporary files."""


@dataclass(frozen=True, config=SECTION)
class OnlineEvaluation:
    """Retrieval on held-out tars while training, to follow progress; not for final numbers."""

    tars: list[str]
    """Held-out tars: paths, URLs, globs or brace ranges."""
    every: Duration = field(default_factory=lambda: Duration(percent=10))
    """Span between two evaluations; by default 10 percent of the run."""
    max_samples: PositiveInt = 1000
    """Samples used at most, the first ones."""
    group_field: str | None = None
    """JSON field that names the group of a sample; null: only its own captions match an image."""
    caches: dict[str, str] = field(default_factory=dict)
    """Where a deployed head stands on a cached tower: a cache of the held-out tars, by tower. Without one, the tower's
    own cache must hold them too."""


@dataclass(frozen=True, config=SECTION)
class TrainConfig:
    """A run: its data, towers, heads, pair terms and settings."""

    output_dir: str
    """The run folder, a path or a URL (s3://, gs://, ...). A run that was interrupted resumes from it."""
    global_batch_size: PositiveInt
    """Samples of a step, over all ranks; a multiple of the world size."""
    duration: Duration
    """Length of the run, in epochs, samples or steps. A run whose schedule is constant or rsqrt may be extended."""
    embed_dim: PositiveInt
    """Width of the embeddings that heads produce."""
    data: Data
    """The training data and how it is read."""
    towers: dict[str, Tower]
    """Towers by name. A tower that is null is left out."""
    heads: dict[str, Head]
    """Heads by name, each after the head it is built on. A head that is null is left out."""
    terms: dict[str, Term]
    """Pair terms by name; the loss is their weighted sum. A term that is null is left out."""
    deploy: Deploy
    """The two heads that make the model kept for inference."""
    init: str | None = None
    """A whole model to begin with: towers, heads, scale and bias, whose own `init` is then null.
    `open_clip:NAME[:WEIGHTS]`: a model of open_clip, named as in `towers.T.init`. FOLDER: one that it was saved to, as
    by `threetowers export --format open_clip`; the deployed towers may then also be of the kinds timm and text.
    `run:FOLDER`: a finished run or an export, of which all parts of the same names are taken. `data.tokenizer` and
    `data.image_size` may be null: they are the model's. Whatever does not fit is refused; what the model does not have
    begins at random. null: towers begin by themselves."""
    seed: int = 0
    """Seed of the initial weights, the order of samples and the augmentation."""
    loss: Loss = field(default_factory=Loss)
    """The loss of contrastive and distill terms."""
    optim: Optim = field(default_factory=Optim)
    """The optimizer and its learning-rate schedule."""
    engine: Engine = field(default_factory=Engine)
    """The execution of a step: DeepSpeed, precision, memory."""
    log: Log = field(default_factory=Log)
    """What a run records of itself."""
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    """When checkpoints are written."""
    evaluation: OnlineEvaluation | None = None
    """Retrieval on held-out tars while training; null: none."""

    @property
    def caption_padding(self) -> Literal["longest", "context_length"]:
        """To what length captions are padded."""
        if self.data.caption_padding is not None:
            return self.data.caption_padding
        return "context_length" if any(tower.sees_padding for tower in self.towers.values()) else "longest"

    def towers_reading(self, inputs: Inputs) -> list[str]:
        """Return the names of the towers that read this of a sample, in the config's order."""
        return [name for name, tower in self.towers.items() if tower.reads == inputs]

    def side_of(self, tower: str) -> Side:
        """Return what a tower sees: images or text."""
        return self.towers[tower].of

    def captions_of(self, tower: str) -> int:
        """Return how many rows a sample has at most in the inputs of a tower: those of its captions, or one."""
        return self.data.captions_per_sample if self.side_of(tower) == "text" else 1

    def pairing(self, term: Term) -> Pairing:
        """Return what a row of each side of a term is of."""
        sides = [self.side_of(self.root_of(head)) for head in (term.x, term.y)]
        if self.data.captions_per_sample == 1 or term.positives == "one" or "text" not in sides:
            return "samples"
        return "captions" if "image" in sides else "texts"

    def root_of(self, head: str) -> str:
        """Return the name of the tower below a head or a chain of heads."""
        name = head
        while name in self.heads:
            name = self.heads[name].of
        return name

    def scales(self) -> list[str]:
        """Return the names of the learned scales, in the order of the terms."""
        return list(dict.fromkeys(term.scale for term in self.terms.values() if term.has_scale))
