"""A whole model to begin with: towers, heads, scale and bias of a model of open_clip, or of a run, by one key (`init`).

A run is checked against the model before anything is loaded, and everything that does not fit is named at once.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from threetowers.cache.encoders.names import EncoderName
from threetowers.cache.encoders.openclip.model_config import (
    OpenClipConfig,
    model_folder,
    other_architecture,
    read_open_clip_config,
)
from threetowers.cache.encoders.tokenizers.tokenizer import Tokenizer
from threetowers.trainer.config import (
    CacheTower,
    ConfigError,
    ImageTower,
    OpenClipTower,
    Term,
    TextTower,
    TrainConfig,
    load_config,
)
from threetowers.trainer.model.initial.initial_weights import RUN, run_and_part
from threetowers.trainer.model.initial.open_clip_names import IMAGE_HEADS, our_projection, our_text
from threetowers.trainer.model.initial.resampling import differences, fit_to_tower
from threetowers.trainer.run.finished_run import finished_run_folder

OPEN_CLIP = "open_clip:"
# Captions that tokenizers are told apart by: case, signs, entities, other scripts, a number, nothing.
PROBES = ("a photo of a cat", "Two Dogs & a CAT's toy!", "x &amp; y <b>1,234.5</b>", "naïve café 東京 🙂", "  ", "")
PROBE_LENGTH = 24
TOLERANCE = 1e-6  # of numbers that were once written as text


@dataclass
class Start:
    """What a run begins with.

    Attributes:
        parts: Tensors by the part of the model that they are of, such as `towers.image`, under the part's own names.
        problems: What does not fit.
        notes: What is to be known.
    """

    parts: dict[str, Mapping[str, Tensor]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def resolve_start(config: TrainConfig) -> TrainConfig:
    """Return the config with the tokenizer and the image size of the model that it begins with, where these are null.

    Raises:
        ConfigError: There is no such model, or it does not say.
    """
    data = config.data
    if config.init is None or (data.tokenizer is not None and data.image_size is not None):
        return config
    try:
        size, tokenizer = _stated(config.init)
    except ValueError as error:
        raise ConfigError(f"init: {error}") from error
    found = {"image_size": data.image_size or size, "tokenizer": data.tokenizer or tokenizer}
    needed = {"image_size": config.towers_reading("images"), "tokenizer": config.towers_reading("tokens")}
    for key, towers in needed.items():
        if towers and found[key] is None:
            raise ConfigError(f"data.{key}: {config.init} does not state it, and the towers {towers} need it; give it")
    used = {key: value if needed[key] else getattr(data, key) for key, value in found.items()}
    return replace(config, data=replace(data, **used))  # type: ignore[arg-type]


def load_whole_model(model: Any, tokenizer: Tokenizer | None) -> list[str]:
    """Load the weights that `init` of a run names, into its towers, heads, scales and biases.

    Args:
        model: The `TowerModel`, with random weights.
        tokenizer: The run's.

    Returns:
        What begins from what, what was resampled, and what stays random.

    Raises:
        ConfigError: The model does not fit the run. The message names everything that does not.
    """
    config: TrainConfig = model.config
    assert config.init is not None
    try:
        of_run = config.init.startswith(RUN)
        start = _of_run(config, tokenizer) if of_run else _of_open_clip(model, tokenizer)
    except ValueError as error:
        raise ConfigError(f"init: {error}") from error
    fitting = {}
    for part, state in start.parts.items():
        try:
            fitting[part], resampled = _fitted(model, part, state)
        except ValueError as error:
            start.problems.append(f"{part}: {error}")
        else:
            start.notes += [f"init: resampled {part}.{note}" for note in resampled]
            bad = [name for name, tensor in fitting[part].items() if not tensor.isfinite().all()]
            start.problems += [f"{part}: NaN or infinity in {', '.join(bad)}"] if bad else []
        tower = config.towers.get(part.removeprefix("towers."))
        if tower is not None and not isinstance(tower, CacheTower) and tower.init is not None:
            start.problems.append(f"{part}.init: found {tower.init} beside init, of which it is a part; leave one out")
    if start.problems:
        lines = "".join(f"\n  {problem}" for problem in start.problems)
        raise ConfigError(
            f"init: {config.init} does not fit this run; change these keys, or name the weights of single towers by "
            f"their own init:{lines}"
        )
    with torch.no_grad():
        for part, tensors in fitting.items():
            for name, tensor in _tensors(model, part).items():
                tensor.copy_(tensors[name])
    random = _random_parts(model, fitting)
    begun = f"init: {', '.join(fitting)} from {config.init}"
    return [begun, *start.notes, *([f"init: random weights in {', '.join(random)}"] if random else [])]


def _stated(init: str) -> tuple[int | None, str | None]:
    """Return the size of images and the tokenizer of the model that a run begins with, as far as they are stated."""
    if init.startswith(RUN):
        folder = finished_run_folder(run_and_part(init.removeprefix(RUN))[0])
        if not folder.config.exists():
            raise ValueError(f"{init} holds no finished run: {folder.config.name} is missing")
        data = load_config(folder.config).data
        return data.image_size, data.tokenizer
    name = _open_clip_name(init)
    size = read_open_clip_config(name.name).vision.get("image_size")
    return size if isinstance(size, int) else None, f"{OPEN_CLIP}{name.name}"


def _open_clip_name(init: str) -> EncoderName:
    """Return the name of a model of open_clip, of which a folder may be named alone."""
    if not init.startswith(OPEN_CLIP) and model_folder(init) is None:
        raise ValueError(
            f"found {init!r}, expected open_clip:NAME[:WEIGHTS], the folder of a model of open_clip, or run:FOLDER"
        )
    return EncoderName.parse(init if init.startswith(OPEN_CLIP) else OPEN_CLIP + init)


def _of_run(config: TrainConfig, tokenizer: Tokenizer | None) -> Start:
    """Return what a run begins with of another one: all towers, heads, scales and biases of the same names."""
    from threetowers.trainer.export.trained_model import load_model  # which builds models, and so imports this

    assert config.init is not None
    source = run_and_part(config.init.removeprefix(RUN))[0]
    trained = load_model(source, precision="float32")
    start = Start()
    for name, tower in config.towers.items():
        theirs = trained.config.towers.get(name)
        if theirs is not None and (theirs.kind, theirs.of) != (tower.kind, tower.of):
            start.problems.append(
                f"towers.{name}: of kind {tower.kind}, of {tower.of}; in the run of kind {theirs.kind}, of {theirs.of}"
            )
        elif isinstance(tower, OpenClipTower) and isinstance(theirs, OpenClipTower):
            start.parts[f"towers.{name}"] = trained.model.towers[name].state_dict()
            start.problems += _other_model(name, tower, read_open_clip_config(theirs.model, theirs.args))
        elif theirs is not None and not isinstance(tower, CacheTower):
            start.parts[f"towers.{name}"] = trained.model.towers[name].state_dict()
    for name in config.heads:
        if name in trained.model.heads:
            start.parts[f"heads.{name}"] = trained.model.heads[name].state_dict()
    for name in config.scales():
        for kind in ("log_scales", "biases"):
            values = getattr(trained.model, kind)
            if name in values and (kind == "log_scales" or config.loss.kind == "sigmoid"):
                start.parts[f"{kind}.{name}"] = {"": values[name].detach()}
    start.parts = {part: state for part, state in start.parts.items() if state}
    for part, key in _deployed_parts(config).items():
        kind, _, name = part.partition(".")
        if name not in getattr(trained.config, kind):
            known = sorted(getattr(trained.config, kind))
            start.problems.append(f"{part}: {key} stands on it, but it is none of the run's {kind} {known}")
    _check_scale(config, start)
    if tokenizer is not None and trained.tokenizer is not None:
        start.problems += _other_tokens(tokenizer, trained.tokenizer)
    return start


def _of_open_clip(model: Any, tokenizer: Tokenizer | None) -> Start:
    """Return what a run begins with of a model of open_clip: the deployed towers and heads, their scale and bias."""
    from threetowers.trainer.model.initial.open_clip_weights import named_model, source_config

    config: TrainConfig = model.config
    assert config.init is not None
    name = _open_clip_name(config.init)
    found = source_config(str(name))
    theirs: Any = named_model(str(name))
    start = Start()
    _image_side(model, theirs, found, start)
    _text_side(config, theirs, found, tokenizer, start)
    term = deployed_term(config)
    if term is not None:
        start.parts[f"log_scales.{term.scale}"] = {"": theirs.logit_scale.detach()}
        if config.loss.kind == "sigmoid" and theirs.logit_bias is None:
            start.notes.append(f"init: the model has no bias; biases.{term.scale} begins with loss.bias_init")
        elif config.loss.kind == "sigmoid":
            start.parts[f"biases.{term.scale}"] = {"": theirs.logit_bias.detach()}
        elif theirs.logit_bias is not None:
            start.notes.append("init: the bias of the model is left out, as loss.kind is softmax")
    _check_scale(config, start)
    resized = theirs.visual.preprocess_cfg["resize_mode"]
    if resized != "shortest":
        start.notes.append(f"init: the model resizes images by {resized}; this run takes their central square")
    if tokenizer is not None:
        start.problems += _not_the_tokenizer(name.name, tokenizer, start.notes)
    return start


def _other_model(name: str, tower: OpenClipTower, source: OpenClipConfig) -> list[str]:
    """Return how a tower of open_clip differs from the one that its weights are of."""
    ours = read_open_clip_config(tower.model, tower.args)
    return [f"towers.{name}: {reason}" for reason in other_architecture(ours, source, tower.of)]


def _image_side(model: Any, theirs: Any, found: OpenClipConfig, start: Start) -> None:
    """Add the image tower and its head."""
    from threetowers.trainer.export.open_clip_format import image_reasons
    from threetowers.trainer.model.initial.open_clip_weights import PIXELS, tower_weights

    config: TrainConfig = model.config
    name = config.root_of(config.deploy.image)
    tower = config.towers[name]
    if isinstance(tower, OpenClipTower):
        start.parts[f"towers.{name}"] = tower_weights(theirs, "image")
        start.problems += _other_model(name, tower, found)
        start.problems += heads_with_weights(config, config.deploy.image)
        return
    if not isinstance(tower, ImageTower) or not hasattr(theirs.visual, "trunk"):
        own = "timm's" if hasattr(theirs.visual, "trunk") else f"open_clip's own {type(theirs.visual).__name__}"
        start.problems.append(
            f"towers.{name}.kind: found {tower.kind}, the model's image tower is {own}; set kind: open_clip"
        )
        return
    start.problems += [f"towers.{name}: {reason}" for reason in image_reasons(config)]
    if start.problems:
        return
    state = theirs.visual.state_dict()
    trunk = "trunk."
    start.parts[f"towers.{name}"] = {
        f"model.{key.removeprefix(trunk)}": p for key, p in state.items() if key.startswith(trunk)
    }
    start.parts[f"heads.{config.deploy.image}"] = _image_head(model.heads[config.deploy.image], state)
    for key in PIXELS:
        ours, stated = getattr(model.towers[name], key).flatten(), torch.tensor(theirs.visual.preprocess_cfg[key])
        if not torch.allclose(ours.cpu(), stated, atol=TOLERANCE):
            start.problems.append(
                f"towers.{name}: images are normalised by the {key} {ours.tolist()}, those of the model by "
                f"{stated.tolist()}"
            )


def _image_head(head: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the head behind a timm trunk under the names of ours, which has as many linear layers."""
    layers = [name for name, module in head.named_modules() if isinstance(module, nn.Linear)]
    found: dict[str, Tensor] = {}
    for ours, theirs in zip(layers, IMAGE_HEADS[len(layers)], strict=True):
        prefix, place = f"{theirs}.", f"{ours}." if ours else ""
        found |= {place + name.removeprefix(prefix): p for name, p in state.items() if name.startswith(prefix)}
    return found


def _text_side(
    config: TrainConfig, theirs: Any, found: OpenClipConfig, tokenizer: Tokenizer | None, start: Start
) -> None:
    """Add the text tower and its head."""
    from threetowers.trainer.export.open_clip_format import text_reasons
    from threetowers.trainer.model.initial.open_clip_weights import text_part, tower_weights

    name = config.root_of(config.deploy.text)
    tower = config.towers[name]
    if isinstance(tower, OpenClipTower):
        start.parts[f"towers.{name}"] = tower_weights(theirs, "text")
        start.problems += _other_model(name, tower, found)
        start.problems += heads_with_weights(config, config.deploy.text)
        return
    if not isinstance(tower, TextTower):
        start.problems.append(f"towers.{name}.kind: found {tower.kind}, expected open_clip, or text")
        return
    start.problems += [f"towers.{name}: {reason}" for reason in text_reasons(config)]
    start.problems += [f"towers.{name}.{reason}" for reason in _other_architecture(tower, found, tokenizer)]
    state = text_part(theirs.state_dict())
    start.parts[f"towers.{name}"] = our_text(state)
    start.parts[f"heads.{config.deploy.text}"] = our_projection(state)


def _other_architecture(tower: TextTower, found: OpenClipConfig, tokenizer: Tokenizer | None) -> Iterator[str]:
    """Yield what differs of a text tower of ours from open_clip's, where the shapes of tensors do not tell."""
    text = found.text
    # The end token is the largest id: then both find the same position.
    argmax = tokenizer is not None and tokenizer.special.end == tokenizer.vocab_size - 1
    pool = "eos" if found.pooling == "argmax" and argmax else found.pooling
    theirs: dict[str, object] = {
        "pool": pool,
        "causal": not text.get("no_causal_mask", False),
        "activation": "quick_gelu" if found.model.get("quick_gelu") else "gelu",
        "heads": text.get("heads", 8),
    }
    for key, value in theirs.items():
        if getattr(tower, key) != value:
            yield f"{key}: found {getattr(tower, key)}, the model has {value}"
    eps = (text.get("norm_kwargs") or {}).get("eps", 1e-5)
    if (tower.norm_eps or 1e-6) != eps:
        yield f"norm_eps: found {tower.norm_eps}, the model has {eps}"


def heads_with_weights(config: TrainConfig, head: str) -> list[str]:
    """Return what is said of heads with weights, which a model of open_clip does not have above its towers."""
    problems = []
    while head in config.heads:
        if config.heads[head].kind != "none":
            found = config.heads[head].kind
            problems.append(
                f"heads.{head}.kind: found {found}, but the tower ends in the model's own projection; set kind: none"
            )
        head = config.heads[head].of
    return problems


def deployed_term(config: TrainConfig) -> Term | None:
    """Return the term with a scale between the deployed heads; None: there is none."""
    deployed = {config.deploy.image, config.deploy.text}
    return next((term for term in config.terms.values() if {term.x, term.y} == deployed and term.has_scale), None)


def _check_scale(config: TrainConfig, start: Start) -> None:
    """Refuse a scale that the run would clamp at once."""
    for part, state in start.parts.items():
        scale = float(state[""].exp()) if part.startswith("log_scales.") else 0.0
        if scale > config.loss.scale_max * (1 + TOLERANCE):
            start.problems.append(
                f"loss.scale_max: found {config.loss.scale_max:g}, the model's scale is {scale:.5g}; raise it"
            )


def _not_the_tokenizer(name: str, tokenizer: Tokenizer, notes: list[str]) -> list[str]:
    """Return how a run's tokenizer differs from that of a model of open_clip."""
    from threetowers.cache.encoders.tokenizers.open_clip_tokenizer import load_open_clip_tokenizer

    try:
        return _other_tokens(tokenizer, load_open_clip_tokenizer(name))
    except ValueError as error:
        notes.append(f"init: data.tokenizer is not compared with the model's: {error}")
        return []


def _other_tokens(ours: Tokenizer, theirs: Tokenizer) -> list[str]:
    """Return how two tokenizers differ: in their ids, or in those of a few captions of all sorts."""
    differ = []
    if ours.vocab_size != theirs.vocab_size:
        differ.append(f"{ours.vocab_size:,} ids, the model's {theirs.vocab_size:,}")
    if (ours.special.end, ours.special.pad) != (theirs.special.end, theirs.special.pad):
        differ.append(
            f"end {ours.special.end} and padding {ours.special.pad}, the model's {theirs.special.end} and "
            f"{theirs.special.pad}"
        )
    length = min(PROBE_LENGTH, getattr(theirs, "context_length", PROBE_LENGTH))
    pairs = zip(ours.tokenize(PROBES, length), theirs.tokenize(PROBES, length), strict=True)
    other = [text for text, (a, b) in zip(PROBES, pairs, strict=True) if list(a.ids) != list(b.ids)]
    if other and not differ:
        differ.append(f"other tokens for {other[0]!r}")
    return [f"data.tokenizer: {ours.name} has {'; '.join(differ)} ({theirs.name})"] if differ else []


def _deployed_parts(config: TrainConfig) -> dict[str, str]:
    """Return the parts with weights below the deployed heads, by the key that names the head."""
    parts = {}
    for side in ("image", "text"):
        name = getattr(config.deploy, side)
        while name in config.heads:
            if config.heads[name].kind != "none":
                parts[f"heads.{name}"] = f"deploy.{side}"
            name = config.heads[name].of
        if not isinstance(config.towers[name], CacheTower):
            parts[f"towers.{name}"] = f"deploy.{side}"
    return parts


def _fitted(model: Any, part: str, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors of a part in its own shapes, and what was resampled. Raises ValueError if they do not fit."""
    kind, _, name = part.partition(".")
    own = _tensors(model, part)
    scalars = {key: p.reshape(1) for key, p in state.items() if p.ndim == 0 and key in own and own[key].ndim == 1}
    whole = {**state, **scalars}
    if kind == "towers":
        return fit_to_tower(model.towers[name], model.config.towers[name], whole)
    found, expected = ({key: tuple(p.shape) for key, p in tensors.items()} for tensors in (whole, own))
    if found != expected:
        raise ValueError(differences(found, expected))
    return whole, []


def _tensors(model: Any, part: str) -> dict[str, Tensor]:
    """Return the tensors of a part of the model by name; a scale and a bias have the name ""."""
    kind, _, name = part.partition(".")
    if kind in ("log_scales", "biases"):
        return {"": getattr(model, kind)[name]}
    own: dict[str, Tensor] = getattr(model, kind)[name].state_dict()
    return own


def _random_parts(model: Any, begun: Collection[str]) -> list[str]:
    """Return the parts with parameters that keep their random weights."""
    config: TrainConfig = model.config
    parts = []
    for kind in ("towers", "heads", "log_scales", "biases"):
        for name, module in getattr(model, kind).items():
            given = config.towers.get(name) if kind == "towers" else None
            has_init = given is not None and not isinstance(given, CacheTower) and given.init is not None
            has_weights = kind in ("log_scales", "biases") or any(True for _ in module.parameters())
            if has_weights and not has_init and f"{kind}.{name}" not in begun:
                parts.append(f"{kind}.{name}")
    return parts
