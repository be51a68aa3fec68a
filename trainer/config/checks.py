"""What the types of a config cannot express: references between keys, and combinations that cannot be run.

Each check yields its messages: the key, what was found, what was expected, and what to change.
"""

from collections.abc import Iterator, Mapping
from dataclasses import fields

from threetowers.cache.webdataset.captions import CaptionFormat
from threetowers.trainer.config.schema import Duration, Head, Term, TermTeacher, TrainConfig
from threetowers.trainer.config.towers import CacheTower, HfTower, ImageTower, Inputs, TextTower, Tower, WeightedTower

# Arguments of `timm.create_model` that are the trainer's own.
OWNED_TIMM_ARGUMENTS = {
    "num_classes": "a tower ends before its classifier",
    "features_only": "a tower gives one vector an image",
    "out_indices": "a tower gives one vector an image",
    "in_chans": "images have three channels",
    "pretrained": "the tower's `init` names its weights",
    "checkpoint_path": "the tower's `init` names its weights",
}

# Keys of a head that say nothing of the other kinds.
MLP_KEYS = ("hidden", "depth", "norm", "activation", "gated", "dropout")
MEANINGLESS_KEYS = {"linear": MLP_KEYS, "mlp": (), "none": ("embed_dim", "input_norm", *MLP_KEYS)}

# Keys of a term, and the kind that they are for.
KEYS_OF_KINDS = {"teachers": "distill", "hard_weight": "distill", "drop_teachers": "distill", "beta": "smooth_l1"}


class ConfigError(ValueError):
    """A config that cannot be run. The message names the key, what it holds and what is expected."""


def check_config(config: TrainConfig, source: str) -> None:
    """Check a config beyond its types.

    Args:
        config: A config whose types are right.
        source: Where it comes from, for messages.

    Raises:
        ConfigError: With the first problem.
    """
    # The order matters: later checks rely on the references that earlier ones have found valid.
    checks = (
        _durations,
        _cooldown,
        _profile,
        _data,
        _random_views,
        _heads,
        _keys_of_heads,
        _batch_norms,
        _terms,
        _keys_of_terms,
        _teachers,
        _negatives,
        _deployed_heads,
        _unused,
        _timm_arguments,
        _hf_towers,
        _frozen,
        _inheritance,
        _shared_parameters,
        _masked_rows,
    )
    for problems in checks:
        for message in problems(config):
            raise ConfigError(f"{source}: {message}")


def _durations(config: TrainConfig) -> Iterator[str]:
    spans = {"duration": config.duration, "optim.warmup": config.optim.warmup, "optim.cooldown": config.optim.cooldown}
    if config.evaluation is not None:
        spans["evaluation.every"] = config.evaluation.every
    for key, span in spans.items():
        if isinstance(span, Duration) and len(span.units()) != 1:
            found = ", ".join(span.units()) or "none"
            yield f"{key}: found {found}, expected exactly one of epochs, samples, steps, percent; set others to null"
    if config.duration.percent is not None:
        yield "duration: found percent, which is relative to the run; give its length in epochs, samples or steps"


def _cooldown(config: TrainConfig) -> Iterator[str]:
    if config.optim.schedule == "cosine" and config.optim.cooldown != 0.0:
        yield (
            "optim.cooldown: a cosine decays by itself, without a cooldown; set optim.schedule to constant or rsqrt, "
            "or optim.cooldown to 0"
        )


def _profile(config: TrainConfig) -> Iterator[str]:
    if config.log.profile is not None and config.log.profile[0] > config.log.profile[1]:
        yield f"log.profile: expected the first and the last step, found {config.log.profile}"


def _data(config: TrainConfig) -> Iterator[str]:
    data = config.data
    if data.tars and data.datasets:
        yield "data: tars and datasets are both given; name all tars in one of them"
    for name, dataset in data.named_datasets.items():
        if not dataset.tars:
            key = f"data.datasets.{name}.tars" if name else "data.tars"
            yield f"{key}: expected at least one tar or pattern, found none"
    needed: dict[Inputs, tuple[str, int | str | None]] = {
        "images": ("image_size", data.image_size),
        "tokens": ("tokenizer", data.tokenizer),
    }
    for inputs, (key, value) in needed.items():
        towers = config.towers_reading(inputs)
        if value is None and towers and config.init is None:  # else it is that of the model
            yield f"data.{key}: expected a value, as the towers {towers} need it, found null"
    if data.caption_padding == "longest":
        for name, tower in config.towers.items():
            if tower.sees_padding:
                yield (
                    f"data.caption_padding: found longest, but towers.{name} sees the padding{_why_padding(tower)}, "
                    "so that embeddings would depend on the batch; set it to null or context_length"
                )
    for key, sources in _caption_sources(config).items():
        try:
            CaptionFormat(sources)
        except ValueError as error:
            yield f"{key}: {error}"
    if data.access == "sequential" and data.num_streams and config.global_batch_size % data.num_streams:
        yield streams_and_batch(data.num_streams, config.global_batch_size)


def _why_padding(tower: Tower) -> str:
    """Return the keys by which a tower sees the padding, in brackets; nothing for a tower without such keys."""
    if not isinstance(tower, TextTower):
        return ""
    causal, masked = str(tower.causal).lower(), str(tower.mask_padding).lower()
    return f" (pool: {tower.pool}, causal: {causal}, mask_padding: {masked})"


def streams_and_batch(num_streams: int, batch_size: int) -> str:
    """Return the message for a number of streams that does not divide the batch."""
    return f"data.num_streams: {num_streams} does not divide global_batch_size {batch_size}; change one of them"


def _caption_sources(config: TrainConfig) -> dict[str, Mapping[str, float]]:
    sources: dict[str, Mapping[str, float]] = {"data.captions": config.data.captions}
    for name, dataset in config.data.datasets.items():
        sources[f"data.datasets.{name}.captions"] = dataset.captions
    return sources


def _random_views(config: TrainConfig) -> Iterator[str]:
    data = config.data
    cached = [name for name in config.towers_reading("rows") if config.side_of(name) == "image"]
    if data.crop_scale < 1 and cached:
        yield (
            f"data.crop_scale: found {data.crop_scale}, but the cached towers {cached} hold the embedding of the "
            "uncropped view only; set crop_scale: 1.0"
        )
    if data.augment.flip and cached:
        yield (
            f"data.augment.flip: found {data.augment.flip}, but the cached towers {cached} hold embeddings of declared "
            "views; set flip: 0 and build the cache with --views center+flip: then every other epoch is mirrored"
        )


def _heads(config: TrainConfig) -> Iterator[str]:
    known = set(config.towers)
    for name, head in config.heads.items():
        if name in config.towers:
            yield f"heads.{name}: a tower has the same name; rename the head"
        if head.of not in known:
            yield f"heads.{name}.of: found {head.of!r}, expected a tower or an earlier head: {sorted(known)}"
        known.add(name)


def _keys_of_heads(config: TrainConfig) -> Iterator[str]:
    defaults = {key.name: key.default for key in fields(Head)}
    for name, head in config.heads.items():
        for key in MEANINGLESS_KEYS[head.kind]:
            value = getattr(head, key)
            if value != defaults[key]:
                kinds = "mlp" if key in MLP_KEYS else "linear or mlp"
                yield (
                    f"heads.{name}.{key}: found {value!r} with kind: {head.kind}, which has no use for it; set kind: "
                    f"{kinds}, or leave {key} out"
                )


def _batch_norms(config: TrainConfig) -> Iterator[str]:
    for name, head in config.heads.items():
        root = config.root_of(name)
        tower = config.towers[root]
        if not isinstance(tower, CacheTower) or tower.on_missing_row != "mask":
            continue
        for key in ("input_norm", "norm"):
            if getattr(head, key) == "batch":
                yield (
                    f"heads.{name}.{key}: batch would count the samples without an embedding in {root!r} "
                    f"(towers.{root}.on_missing_row: mask); set {key}: layer, or on_missing_row: skip or live"
                )


def _terms(config: TrainConfig) -> Iterator[str]:
    if not config.terms:
        yield "terms: expected at least one pair term, found none"
    for key, name in _head_references(config).items():
        if name not in config.heads:
            yield f"{key}: found {name!r}, expected one of the heads {sorted(config.heads)}"
    for name, term in config.terms.items():
        if term.x == term.y:
            yield f"terms.{name}: x and y are both {term.x!r}, expected two different heads"


def _keys_of_terms(config: TrainConfig) -> Iterator[str]:
    unused = Term("", "")
    for name, term in config.terms.items():
        for key, kind in KEYS_OF_KINDS.items():
            value = getattr(term, key)
            if term.kind != kind and value != getattr(unused, key):
                found = sorted(value) if isinstance(value, dict) else value
                yield (
                    f"terms.{name}.{key}: found {found} with kind: {term.kind}, which has no use for it; set kind: "
                    f"{kind}, or leave {key} out"
                )


def _teachers(config: TrainConfig) -> Iterator[str]:
    for name, term in config.terms.items():
        if term.kind == "distill" and config.pairing(term) != "samples":
            yield (
                f"terms.{name}.positives: found all with data.captions_per_sample: {config.data.captions_per_sample}, "
                "but teachers compare one caption of each sample; set positives: one"
            )
        if term.kind == "distill" and not term.teachers:
            yield f"terms.{name}.teachers: expected one teacher or more, found none; name one, or set kind: contrastive"
        if term.drop_teachers > 0 and len(term.teachers) == 1:
            yield (
                f"terms.{name}.drop_teachers: found {term.drop_teachers} with one teacher, {', '.join(term.teachers)}, "
                "but one always stays; name another teacher, or leave drop_teachers out"
            )
        for teacher_name, teacher in term.teachers.items():
            key = f"terms.{name}.teachers.{teacher_name}"
            yield from _trained_parts(config, f"{key}.x", teacher.x)
            yield from _trained_parts(config, f"{key}.y", teacher.y)
            yield from _standardized_apart(config, key, teacher)
            yield from _teacher_logits(config, key, teacher)


def _trained_parts(config: TrainConfig, key: str, head: str) -> Iterator[str]:
    """Say what a teacher's head has parameters of."""
    below = head
    while below in config.heads:
        if config.heads[below].kind != "none":
            yield (
                f"{key}: {head!r} has trained parameters, those of the head {below!r} of kind: "
                f"{config.heads[below].kind}, but a teacher stays as it is; name a head of kind: none"
            )
            return
        below = config.heads[below].of
    tower = config.towers[below]
    if tower.trained:
        yield (
            f"{key}: {head!r} is on the trained tower {below!r}, but a teacher stays as it is; name a head on a cache, "
            f"or set towers.{below}.frozen: true"
        )


def _standardized_apart(config: TrainConfig, key: str, teacher: TermTeacher) -> Iterator[str]:
    """Say where the two sides of a teacher are no longer in one space."""
    towers = {config.root_of(teacher.x), config.root_of(teacher.y)}
    for name in sorted(towers):
        tower = config.towers[name]
        if len(towers) == 2 and isinstance(tower, CacheTower) and tower.standardize != "none":
            yield (
                f"towers.{name}.standardize: found {tower.standardize}, which moves the rows of {name!r} out of the "
                f"space that they share with the other side of {key}; set none"
            )


def _teacher_logits(config: TrainConfig, key: str, teacher: TermTeacher) -> Iterator[str]:
    named = isinstance(teacher.temperature, str)
    if named and teacher.temperature not in config.scales():
        yield (
            f"{key}.temperature: found {teacher.temperature!r}, expected a number above 0, or a scale of the terms: "
            f"{config.scales()}"
        )
    if config.loss.kind == "softmax" or named:
        if teacher.bias is not None:
            reason = f"the scale {teacher.temperature!r} has its own" if named else "softmax is the same at any bias"
            yield f"{key}.bias: found {teacher.bias}, but {reason}; leave it out"
    elif teacher.bias is None:
        yield f"{key}.bias: the sigmoid loss needs the bias of the teacher's logits, found null; give its number"


def _negatives(config: TrainConfig) -> Iterator[str]:
    # A softmax over the sample itself alone is 1, with no loss and no gradient; the other losses need no negatives.
    contrastive = [name for name, term in config.terms.items() if term.has_scale]
    if config.global_batch_size == 1 and config.loss.kind == "softmax" and contrastive:
        yield (
            f"global_batch_size: found 1, but the terms {contrastive} compare a sample with the others of "
            "its batch and learn nothing without any; expected 2 or more, or loss.kind: sigmoid"
        )


def _deployed_heads(config: TrainConfig) -> Iterator[str]:
    for side, head in (("image", config.deploy.image), ("text", config.deploy.text)):
        tower = config.root_of(head)
        found = config.side_of(tower)
        if found != side:
            yield (
                f"deploy.{side}: the head {head!r} is on the tower {tower!r} of {found}; name one on a tower, or a "
                f"cache, of {side}"
            )
    deployed = {config.root_of(head) for head in (config.deploy.image, config.deploy.text)}
    known = sorted(deployed & set(config.towers_reading("rows")))
    for tower in config.evaluation.caches if config.evaluation else ():
        if tower not in known:
            yield (
                f"evaluation.caches: found {tower!r}, expected cached towers below deployed heads: "
                f"{', '.join(known) or 'there are none, leave it out'}"
            )


def _unused(config: TrainConfig) -> Iterator[str]:
    used = set(_head_references(config).values())
    towers = {config.root_of(name) for name in used}
    heads = used | {head.of for head in config.heads.values()}
    for key, unused in {"towers": set(config.towers) - towers, "heads": set(config.heads) - heads}.items():
        if unused:
            yield f"{key}: {sorted(unused)} are used by no term; remove them or add a term"


def _timm_arguments(config: TrainConfig) -> Iterator[str]:
    for name, tower in config.towers.items():
        if not isinstance(tower, ImageTower):
            continue
        for argument, reason in OWNED_TIMM_ARGUMENTS.items():
            if argument in tower.args:
                yield f"towers.{name}.args: found {argument}: {tower.args[argument]!r}, but {reason}; leave it out"


def _frozen(config: TrainConfig) -> Iterator[str]:
    for name, tower in config.towers.items():
        if isinstance(tower, CacheTower):
            continue
        begins = tower.init is not None or config.init is not None
        if tower.frozen and not begins:
            yield f"towers.{name}.frozen: a tower that is never updated needs weights; name them by towers.{name}.init"
        if tower.trainable_blocks is not None and not begins:
            yield (
                f"towers.{name}.trainable_blocks: blocks that are never updated need weights; name them by "
                f"towers.{name}.init"
            )
        for key, value in _keys_of_blocks(tower).items():
            if tower.frozen:
                yield f"towers.{name}.{key}: found {value}, but frozen: true updates no block; leave one of them out"


def _hf_towers(config: TrainConfig) -> Iterator[str]:
    for name, tower in config.towers.items():
        if not isinstance(tower, HfTower):
            continue
        if tower.model is None and "model_type" not in tower.config:
            yield f"towers.{name}.model: expected a model, or a model_type in towers.{name}.config, found neither"
        if tower.model is None and tower.init == "pretrained":
            yield f"towers.{name}.init: found pretrained, but towers.{name}.model names no files; name them there"
        if tower.of == "image" and tower.pool == "last":
            yield f"towers.{name}.pool: found last, which is of text; set cls, mean, pooler or null"


def _keys_of_blocks(tower: WeightedTower) -> dict[str, float]:
    """Return the keys of a tower that tell its blocks apart, where they do."""
    keys: dict[str, float] = {}
    if tower.trainable_blocks is not None:
        keys["trainable_blocks"] = tower.trainable_blocks
    if tower.layer_decay != 1:
        keys["layer_decay"] = tower.layer_decay
    return keys


def _inheritance(config: TrainConfig) -> Iterator[str]:
    for name, tower in config.towers.items():
        if not isinstance(tower, ImageTower | TextTower) or tower.inherit is None:
            continue
        sources = ["run:"] if isinstance(tower, TextTower) else ["pretrained", "package:", "timm:", "run:"]
        if tower.init is None or not tower.init.startswith(tuple(sources)):
            yield (
                f"towers.{name}.inherit: the larger tower must be named with its shape, by towers.{name}.init: "
                f"{', '.join(sources)}; found {tower.init or 'null'}"
            )
        if isinstance(tower, ImageTower) and tower.specialize is not None:
            yield f"towers.{name}.inherit: a tower with specialize inherits no weights; leave one of them out"


def _shared_parameters(config: TrainConfig) -> Iterator[str]:
    for name, tower in config.towers.items():
        if not isinstance(tower, TextTower) or tower.share is None:
            continue
        image_tower = config.towers.get(tower.share.tower)
        if not isinstance(image_tower, ImageTower):
            yield f"towers.{name}.share.tower: found {tower.share.tower!r}, expected an image tower of kind timm"
        elif image_tower.frozen != tower.frozen:
            yield f"towers.{name}.share: one of the two towers that share parameters is frozen; freeze both or neither"
        else:
            for side, one in ((name, tower), (tower.share.tower, image_tower)):
                for key, value in _keys_of_blocks(one).items():
                    yield (
                        f"towers.{side}.{key}: found {value}, but the parameters that towers.{name}.share names are in "
                        "blocks of two towers at once; leave it out, and name them in optim.param_groups"
                    )


def _masked_rows(config: TrainConfig) -> Iterator[str]:
    for name, tower in config.towers.items():
        if not isinstance(tower, CacheTower) or tower.on_missing_row != "mask":
            continue
        if all(name in map(config.root_of, term.all_heads) for term in config.terms.values()):
            yield (
                f"towers.{name}.on_missing_row: mask keeps a sample for the terms without {name!r}, but every term "
                "uses it; use skip"
            )


def _head_references(config: TrainConfig) -> dict[str, str]:
    references = {"deploy.image": config.deploy.image, "deploy.text": config.deploy.text}
    for name, term in config.terms.items():
        references[f"terms.{name}.x"] = term.x
        references[f"terms.{name}.y"] = term.y
        for teacher_name, teacher in term.teachers.items():
            references[f"terms.{name}.teachers.{teacher_name}.x"] = teacher.x
            references[f"terms.{name}.teachers.{teacher_name}.y"] = teacher.y
    return references
