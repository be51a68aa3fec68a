"""One training run as data: YAML -> frozen dataclasses, checked strictly.

A run is a set of named towers, of heads on them, and of pair terms between heads. CLIP, LiT, 3T and MS-CLIP differ in
this data alone. Unknown keys, wrong types and references to nothing are refused with the path of the offending key.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked

PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
STRICT = ConfigDict(extra="forbid")


class ConfigError(ValueError):
    """A config that cannot be run. The message names the key, what it holds and what it may hold."""


@checked(frozen=True, config=STRICT)
class Specialize:
    """What MS-CLIP-S gives a vision transformer of its own (arXiv 2207.12661)."""

    stem: bool = True  # early specialisation: convolutions in place of the patch embedding and the first block
    branch: bool = True  # a second, convolutional look at the image, added to the tokens at five depths by adapters


@checked(frozen=True, config=STRICT)
class ImageTower:
    """Any timm model; its features before the classifier."""

    kind: Literal["timm"]
    model: str
    args: dict[str, Any] = field(default_factory=dict)
    specialize: Specialize | None = None  # timm's plain vision transformers only
    # Where its weights come from: None, random; pretrained, timm's own; package:NAME; or a .safetensors file, of which
    # FILE#PREFIX takes the part under a name, as in runs/a/model.safetensors#towers.image
    init: str | None = None
    frozen: bool = False  # locked: evaluation mode, no gradient


@checked(frozen=True, config=STRICT)
class Share:
    """Parameters that a text tower has in common with an image tower, block by block from the last one back."""

    tower: str  # a timm vision transformer of the same width
    modules: tuple[Literal["attn", "mlp", "norm1", "norm2"], ...] = ("attn", "mlp")
    blocks: PositiveInt | None = None  # how many; None: as many as the smaller tower has


@checked(frozen=True, config=STRICT)
class TextTower:
    """A transformer of timm blocks over SentencePiece tokens."""

    kind: Literal["text"]
    width: PositiveInt
    depth: PositiveInt
    heads: PositiveInt
    mlp_ratio: float = 4.0
    dropout: Fraction = 0.0
    pool: Literal["eos", "mean", "last"] = "eos"  # the end token, the mean of all but padding, the last position
    causal: bool = False  # a token sees those before it only
    mask_padding: bool = True  # nobody looks at padding
    activation: Literal["gelu", "quick_gelu"] = "gelu"
    norm_eps: Annotated[float, Field(gt=0)] | None = None  # None: 1e-6 in the blocks, 1e-5 at the end
    share: Share | None = None
    init: str | None = None  # None: random; a .safetensors file, or FILE#PREFIX
    frozen: bool = False


@checked(frozen=True, config=STRICT)
class CacheTower:
    """A frozen pretrained classifier, present as the rows of an embedding cache: no parameters, no forward pass."""

    kind: Literal["cache"]
    path: str
    backbone: str | None = None  # if named, a cache of any other is refused; a dry run without the cache needs it
    # Centre and scale each feature by its moments over the cache. A linear head with bias can express the same map;
    # starting from there, it need not first learn away a large common offset.
    standardize: bool = True
    # A sample whose row has no embedding: error refuses to train, skip leaves the sample out, mask keeps it for the
    # terms without this tower, live computes the row by the teacher (in the loader, on the CPU).
    on_missing_row: Literal["error", "skip", "mask", "live"] = "error"
    weights: str | None = None  # of the teacher, for live; None: from where the cache was built


Tower = Annotated[ImageTower | TextTower | CacheTower, Field(discriminator="kind")]


@checked(frozen=True, config=STRICT)
class Head:
    """A map from a tower (or from another head, before that one's normalisation) to the shared space.

    One head may serve several terms.
    """

    of: str
    kind: Literal["linear", "mlp", "none"] = "linear"
    embed_dim: PositiveInt | None = None  # what it gives; None: the run's dim
    bias: bool = True
    hidden: PositiveInt | None = None  # mlp only: width of its hidden layers; None: that of what it stands on
    depth: PositiveInt = 1  # mlp only: number of hidden layers


@checked(frozen=True, config=STRICT)
class Term:
    """One loss between two heads. Contrastive terms that name the same scale share one learned temperature."""

    x: str
    y: str
    kind: Literal["contrastive", "l2"] = "contrastive"  # l2: mean squared distance of the unit-norm embeddings
    weight: float = 1.0
    scale: str = "scale"  # contrastive only


@checked(frozen=True, config=STRICT)
class Loss:
    kind: Literal["softmax", "sigmoid"] = "softmax"
    scale_init: Annotated[float, Field(gt=0)] = 14.3  # CLIP's 1 / 0.07
    scale_max: Annotated[float, Field(gt=0)] = 100.0
    bias_init: float = -10.0  # sigmoid only; SigLIP's start
    # mask: samples of one concept are no negatives of each other. keep: they are, as in sets without concepts.
    mask_false_negatives: bool = True
    # MiB a rank and pair term in which similarity tiles wait for backward: with room for all b x B x 4 bytes a softmax
    # step costs 3 products of that size instead of 4. The sigmoid needs none.
    logit_cache_mib: Annotated[int, Field(ge=0)] = 16
    ring: bool = False


@checked(frozen=True, config=STRICT)
class TrainDataset:
    """One of several sets that a run mixes."""

    tars: list[str]
    weight: Annotated[float, Field(gt=0)] = 1.0  # its share of every global batch, relative to the other sets'
    group_field: str | None = None  # None: data.group_field


@checked(frozen=True, config=STRICT)
class Augment:
    """Random changes to the square of bytes that an image tower sees, after the crop; off where 0."""

    flip: Fraction = 0.0  # probability of the mirror image
    brightness: Fraction = 0.0  # this and the next two: a factor from 1 - x to 1 + x
    contrast: Fraction = 0.0
    saturation: Fraction = 0.0
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0  # a turn of the colour circle from -x to x
    jitter: Fraction = 1.0  # probability that the four changes of colour above are made, in a random order
    grayscale: Fraction = 0.0  # probability of a grey picture
    blur: Fraction = 0.0  # probability of a Gaussian blur of 0.1 to 2 pixels' standard deviation

    @property
    def photometric(self) -> bool:
        """Whether anything but the geometry may change."""
        return any((self.brightness, self.contrast, self.saturation, self.hue, self.grayscale, self.blur))


@checked(frozen=True, config=STRICT)
class Data:
    tokenizer: str
    image_size: PositiveInt
    tars: list[str] = field(default_factory=list)  # or:
    datasets: dict[str, TrainDataset] = field(default_factory=dict)  # several sets, mixed by weight
    # random: every sample by its place in its tar, in any order. sequential: whole tars in a row through webdataset,
    # in `num_streams` streams. auto: random where all tars are local.
    access: Literal["auto", "random", "sequential"] = "auto"
    num_streams: PositiveInt = (
        16  # streamed: tars read side by side, over all ranks; a multiple of the ranks, divides `batch`
    )
    shuffle_buffer: PositiveInt = 10_000  # streamed: undecoded samples that wait to be drawn, over all lanes
    # A folder or URL where what the headers of tars say is kept from launch to launch, for any number of runs; without
    # it they are read at every start, for which a remote tar is streamed from end to end.
    index_dir: str | None = None
    context_length: PositiveInt = 32  # tokens per caption, end token included
    vocab_size: PositiveInt | None = None  # rows of the token embedding; None: the tokenizer's pieces
    crop_scale: Fraction = 1.0  # smallest area share of a random crop; 1.0 = no crop
    augment: Augment = field(default_factory=Augment)
    group_field: str | None = None  # JSON field naming what a sample shows; None: every sample is its own concept
    on_bad: Literal["error", "skip"] = "error"  # a sample that cannot be read; for rows see CacheTower.on_missing_row
    # Tars whose rows are not all built: error refuses to train, wait waits for them, skip begins each epoch with
    # those that are finished by then. Durations count the samples of all tars in any case.
    on_incomplete_cache: Literal["error", "wait", "skip"] = "error"
    workers: Annotated[int, Field(ge=0)] = 1
    max_pixels: PositiveInt = 50_000_000

    @property
    def named_sets(self) -> dict[str, TrainDataset]:
        """The sets by name; one without a name where `tars` are given."""
        return self.datasets or {"": TrainDataset(tars=self.tars)}

    @property
    def patterns(self) -> list[str]:
        """What names the tars of all sets."""
        return [pattern for part in self.named_sets.values() for pattern in part.tars]


@checked(frozen=True, config=STRICT)
class Duration:
    """A span of training; exactly one unit."""

    epochs: Annotated[float, Field(gt=0)] | None = None
    examples: PositiveInt | None = None
    steps: PositiveInt | None = None
    percent: Annotated[float, Field(gt=0, le=100)] | None = None  # of the run; the run itself cannot be given so

    def units(self) -> list[str]:
        """The units that are given."""
        return [f.name for f in dataclasses.fields(self) if getattr(self, f.name) is not None]

    def in_steps(self, samples: int, batch: int, total: int = 0) -> int:
        """Optimizer steps for a set of `samples` with a global batch of `batch`; an epoch is its whole batches.

        `total`: steps of the run, of which a percentage is taken.
        """
        if self.steps is not None:
            return self.steps
        if self.examples is not None:
            return max(1, self.examples // batch)
        if self.percent is not None:
            return max(1, round(total * self.percent / 100))
        assert self.epochs is not None
        return max(1, round(self.epochs * (samples // batch)))


@checked(frozen=True, config=STRICT)
class ParameterGroup:
    """Parameters by name, with a learning rate of their own. Names are as in model.safetensors."""

    match: str  # shell pattern: towers.image.*
    lr: Annotated[float, Field(ge=0)] = 1.0  # times the schedule's; 0 freezes
    weight_decay: Annotated[float, Field(ge=0)] | None = None  # of its matrices; None: the run's


@checked(frozen=True, config=STRICT)
class Optim:
    name: Literal["adamw", "adafactor"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    # Decoupled and, as everywhere in torch, multiplied by the learning rate. Vectors (norms, biases, scales) have none.
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    betas: tuple[Fraction, Fraction] = (0.9, 0.98)
    param_groups: list[ParameterGroup] = field(default_factory=list)  # the first that matches a parameter counts
    schedule: Literal["cosine", "constant", "rsqrt"] = "cosine"
    warmup: Fraction | Duration = 0.05  # a share of all steps, or a span
    cooldown: Fraction | Duration = 0.0  # linear to the end rate, after constant or rsqrt
    lr_end: Fraction = 0.0  # share of lr at which a cosine or a cooldown ends
    grad_clip_norm: Annotated[float, Field(ge=0)] = 1.0  # global gradient norm; 0 = off


@checked(frozen=True, config=STRICT)
class Engine:
    zero_stage: Literal[0, 1, 2, 3] = 1
    precision: Literal["float32", "bfloat16"] = "float32"
    # Samples that go forward and backward at a time on a rank; None: all of its batch. The loss is over the global
    # batch in any case. Costs a second forward pass.
    micro_batch_size: PositiveInt | None = None
    activation_checkpointing: bool = False  # keep a block's input alone, compute the rest again in backward
    on_nonfinite: Literal["stop", "skip"] = "stop"  # when a loss or gradient is NaN or infinite
    nonfinite_limit: PositiveInt = 10  # steps skipped in a row before the run stops after all
    deepspeed_extra: dict[str, Any] = field(default_factory=dict)  # merged last into the generated DeepSpeed config


@checked(frozen=True, config=STRICT)
class Log:
    every_steps: PositiveInt = 10
    tensorboard: bool = True
    # (first, last) step, from 1, of a torch.profiler trace in the run's folder
    profile: tuple[PositiveInt, PositiveInt] | None = None


@checked(frozen=True, config=STRICT)
class Checkpoint:
    """When to write one, beside the end and SIGTERM."""

    every_steps: PositiveInt | None = None
    every_minutes: Annotated[float, Field(gt=0)] | None = None
    keep: PositiveInt = 2


@checked(frozen=True, config=STRICT)
class OnlineEvaluation:
    """Retrieval on held-out tars while training: a quick look, not the numbers to report."""

    tars: list[str]
    every: Duration = field(default_factory=lambda: Duration(percent=10))
    max_samples: PositiveInt = 1000  # at most, the first ones
    group_field: str | None = None  # JSON field naming what an image shows; None: its own captions alone match it


@checked(frozen=True, config=STRICT)
class Deploy:
    """The two heads that make the model which is kept for inference."""

    image: str
    text: str


@checked(frozen=True, config=STRICT)
class TrainConfig:
    output_dir: str
    global_batch_size: PositiveInt  # global: over all ranks
    duration: Duration
    embed_dim: PositiveInt
    data: Data
    towers: dict[str, Tower]
    heads: dict[str, Head]
    terms: dict[str, Term]
    deploy: Deploy
    seed: int = 0
    loss: Loss = field(default_factory=Loss)
    optim: Optim = field(default_factory=Optim)
    engine: Engine = field(default_factory=Engine)
    log: Log = field(default_factory=Log)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    evaluate: OnlineEvaluation | None = None

    def towers_of(self, kind: str) -> list[str]:
        """Names of the towers of one kind, in the config's order."""
        return [name for name, tower in self.towers.items() if tower.kind == kind]

    def root_of(self, head: str) -> str:
        """The tower at the bottom of a chain of heads."""
        name = head
        while name in self.heads:
            name = self.heads[name].of
        return name

    def scales(self) -> list[str]:
        """Names of the learned temperatures, in the terms' order."""
        return list(dict.fromkeys(term.scale for term in self.terms.values() if term.kind == "contrastive"))


@dataclass(frozen=True)
class ConfigChange:
    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.old!r} -> {self.new!r}"


_adapter = TypeAdapter(TrainConfig)


def load(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Return the run described by a YAML file, with `key.path=value` overrides applied (values are YAML).

    Raises ConfigError for a file that cannot be read, an unknown or mistyped key, or a reference to nothing.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of keys, found {type(tree).__name__}")
    for override in overrides:
        _override(tree, override)
    return parse(tree, source=str(path))


def parse(tree: Mapping[str, Any], source: str = "config") -> TrainConfig:
    """Return the checked run of a plain tree of dicts; see `load`. A tower, head or term that is null is left out."""
    named = {key: tree[key] for key in ("towers", "heads", "terms") if isinstance(tree.get(key), dict)}
    tree = {**tree, **{key: {k: v for k, v in entries.items() if v is not None} for key, entries in named.items()}}
    try:
        run = _adapter.validate_python(tree)
    except ValidationError as error:
        lines = (f"  {'.'.join(map(str, e['loc']))}: {e['msg']} (found {e['input']!r})" for e in error.errors())
        raise ConfigError(f"{source} is not a valid run config:\n" + "\n".join(lines)) from None
    _check_references(run, source)
    return run


def dump(run: TrainConfig) -> dict[str, Any]:
    """Return the plain tree that `parse` turns into an equal run."""
    tree: dict[str, Any] = _adapter.dump_python(run, mode="json")
    return tree


def differences(old: TrainConfig, new: TrainConfig) -> list[ConfigChange]:
    """Return the leaves in which two runs differ, by dotted key."""
    a, b = _leaves(dump(old)), _leaves(dump(new))
    return [ConfigChange(k, a.get(k), b.get(k)) for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]


def _override(tree: dict[str, Any], override: str) -> None:
    path, sign, value = override.partition("=")
    keys = path.split(".")
    if not sign or not all(keys):
        raise ConfigError(f"override {override!r}: expected key.path=value, as in optim.lr=3e-4")
    node: Any = tree
    for key in keys[:-1]:
        node = node.setdefault(key, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {key} holds a value, not further keys")
    try:
        node[keys[-1]] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not YAML: {error}") from error


def _leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for key, sub in tree.items() for k, v in _leaves(sub, f"{prefix}.{key}" if prefix else key).items()}


def _check_references(run: TrainConfig, source: str) -> None:
    def refuse(message: str) -> None:
        raise ConfigError(f"{source}: {message}")

    _check_spans(run, refuse)
    _check_data(run, refuse)
    if not run.terms:
        refuse("terms: expected at least one pair term, found none")
    known = set(run.towers)
    for name, head in run.heads.items():
        if name in run.towers:
            refuse(f"heads.{name}: a tower has that name; give the head another")
        if head.of not in known:
            refuse(f"heads.{name}.of: {head.of!r} is no tower and no earlier head; known here: {sorted(known)}")
        known.add(name)
    references = {f"terms.{n}.{s}": getattr(t, s) for n, t in run.terms.items() for s in ("x", "y")}
    references |= {"deploy.image": run.deploy.image, "deploy.text": run.deploy.text}
    for key, name in references.items():
        if name not in run.heads:
            refuse(f"{key}: {name!r} is no head; heads are {sorted(run.heads)}")
    for name, term in run.terms.items():
        if term.x == term.y:
            refuse(f"terms.{name}: x and y are both {term.x!r}; a pair needs two heads")
    if run.towers[run.root_of(run.deploy.text)].kind != "text":
        refuse(f"deploy.text: {run.deploy.text!r} does not stand on a text tower")
    if run.towers[run.root_of(run.deploy.image)].kind == "text":
        refuse(f"deploy.image: {run.deploy.image!r} stands on a text tower")
    used = {run.root_of(name) for name in references.values()}
    if unused := sorted(set(run.towers) - used):
        refuse(f"towers: {unused} are used by no term; remove them or add a term")
    standing = {*references.values(), *(head.of for head in run.heads.values())}
    if unused := sorted(set(run.heads) - standing):
        refuse(f"heads: {unused} are used by no term; remove them or add a term")
    for name, tower in run.towers.items():
        if not isinstance(tower, CacheTower) and tower.frozen and tower.init is None:
            refuse(f"towers.{name}.frozen: a tower that stays as it is needs weights; name them by init")
        if not isinstance(tower, TextTower) or tower.share is None:
            continue
        donor = run.towers.get(tower.share.tower)
        if not isinstance(donor, ImageTower):
            refuse(f"towers.{name}.share.tower: {tower.share.tower!r} is no image tower of kind timm")
        elif donor.frozen != tower.frozen:
            refuse(f"towers.{name}.share: of the parameters' two owners one is frozen; freeze both or none")
    for name in run.towers_of("cache"):
        tower = run.towers[name]
        if (
            isinstance(tower, CacheTower)
            and tower.on_missing_row == "mask"
            and all(name in (run.root_of(term.x), run.root_of(term.y)) for term in run.terms.values())
        ):
            refuse(
                f"towers.{name}.on_missing_row: mask keeps a sample for the terms without {name!r}, but every term has "
                "it; use skip"
            )


def _check_data(run: TrainConfig, refuse: Callable[[str], None]) -> None:
    data, cached = run.data, run.towers_of("cache")
    if data.tars and data.datasets:
        refuse("data: tars and sets are both given; name all tars in one of them")
    for name, part in data.named_sets.items():
        if not part.tars:
            refuse(f"data.{f'sets.{name}.' if name else ''}tars: expected at least one tar or pattern, found none")
    if data.access == "sequential" and run.global_batch_size % data.num_streams:
        refuse(
            f"data.num_streams: {data.num_streams} does not divide global_batch_size {run.global_batch_size}; "
            "change one of them"
        )
    if data.crop_scale < 1 and cached:
        refuse(
            f"data.crop_scale: {data.crop_scale} asks for random crops, but {cached} hold the embedding of the "
            "uncropped view only; set crop_scale: 1.0"
        )
    if data.augment.flip and cached:
        refuse(
            f"data.augment.flip: {data.augment.flip} asks for mirror images at random, but {cached} hold embeddings of "
            "stated views; set flip: 0 and build the cache with --views center+flip: then every other epoch is mirrored"
        )


def _check_spans(run: TrainConfig, refuse: Callable[[str], None]) -> None:
    spans = {"duration": run.duration, "optim.warmup": run.optim.warmup, "optim.cooldown": run.optim.cooldown}
    if run.evaluate is not None:
        spans["evaluate.every"] = run.evaluate.every
    for key, span in spans.items():
        if isinstance(span, Duration) and len(span.units()) != 1:
            refuse(f"{key}: give exactly one of epochs, examples, steps, percent; found {span.units() or 'none'}")
    if run.duration.percent is not None:
        refuse("duration: percent of what? give the run's length in epochs, examples or steps")
    if run.optim.schedule == "cosine" and run.optim.cooldown != 0.0:
        refuse("optim.cooldown: a cosine comes down by itself; take schedule: constant or rsqrt, or no cooldown")
    if run.log.profile is not None and run.log.profile[0] > run.log.profile[1]:
        refuse(f"log.profile: expected (first, last) step, found {run.log.profile}")
