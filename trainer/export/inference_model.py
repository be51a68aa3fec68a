"""The model that is kept: the two deployed heads and the towers they stand on. What trained them is left behind."""

from dataclasses import replace

from torch import nn

from threetowers.trainer.config import ImageTower, Term, TextTower, TrainConfig
from threetowers.trainer.export.trained_model import TrainedModel
from threetowers.trainer.model.model import TowerModel
from threetowers.trainer.model.state_dict import load_distinct


def deployed(trained: TrainedModel) -> TrainedModel:
    """Return a model of the deployed towers and heads alone, with the weights of `trained` and equal embeddings.

    Its one term is that between the deployed heads, for its scale and bias.
    """
    run = _deployed_run(trained.run)
    manifests = {name: manifest for name, manifest in trained.manifests.items() if name in run.towers}
    widths = {name: manifest.dim for name, manifest in manifests.items()}
    model = TowerModel(run, trained.tokenizer.embedding_rows(run.data.vocab_size), widths)
    everything = trained.model.state_dict()
    load_distinct(model, {name: everything[name] for name in model.state_dict()})
    return TrainedModel(run, model.to(trained.device).eval(), trained.tokenizer, manifests)


def parameters_left_out(trained: TrainedModel, kept: TrainedModel) -> int:
    """Return how many parameters the kept model does without."""
    return _count(trained.model) - _count(kept.model)


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _deployed_run(run: TrainConfig) -> TrainConfig:
    image, text = run.deploy.image, run.deploy.text
    heads, roots = set[str](), set[str]()
    for name in (image, text):
        while name in run.heads:
            heads.add(name)
            name = run.heads[name].of
        roots.add(name)
    between = [term for term in run.terms.values() if {term.x, term.y} == {image, text}]
    scales = run.scales()
    if not between:  # a run without an image-text term: its deployed heads were brought together by a third
        between = [Term(image, text, scale=scales[0]) if scales else Term(image, text, kind="l2")]
    towers = {}
    for name, tower in run.towers.items():
        if isinstance(tower, ImageTower | TextTower):
            tower = replace(tower, init=None, frozen=False)  # the weights are here
        if isinstance(tower, TextTower) and tower.share is not None and tower.share.tower not in roots:
            tower = replace(tower, share=None)
        if name in roots:
            towers[name] = tower
    return replace(
        run,
        towers=towers,
        heads={name: head for name, head in run.heads.items() if name in heads},
        terms={"image-text": between[0]},
    )
