"""The teachers of a distill term, as the loss takes them at one step."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from threetowers.kernels import Teacher
from threetowers.trainer.config import Term, TermTeacher, TrainConfig
from threetowers.trainer.model.model import Outputs


def kept_teachers(seed: int, step: int, term_name: str, term: Term) -> list[str]:
    """Return the names of a term's teachers that take part in a step.

    Each is left out with the probability `drop_teachers`, but one drawn at random always stays: a plain form of the
    teacher dropping of UNIC (Sariyildiz et al. 2024, arXiv 2408.05088), which drops by sample. A function of its
    arguments alone: the same on all ranks, and in a resumed run.
    """
    names = list(term.teachers)
    if term.drop_teachers == 0:
        return names
    random = np.random.default_rng(np.random.SeedSequence([seed, step, *term_name.encode()]))
    always = random.integers(len(names))
    drops_K = random.random(len(names)) < term.drop_teachers
    return [name for k, name in enumerate(names) if k == always or not drops_K[k]]


def step_teachers(
    config: TrainConfig, term_name: str, outputs: Outputs, step: int, take: Callable[[str], Tensor]
) -> list[Teacher]:
    """Return a term's teachers at a step.

    Args:
        config: The run.
        term_name: The term.
        outputs: Embeddings and scales of the local batch.
        step: Number of the step.
        take: Gives a head's embeddings (b, D) of the samples of the term.
    """
    term = config.terms[term_name]
    teachers = []
    for name in kept_teachers(config.seed, step, term_name, term):
        teacher = term.teachers[name]
        u_bE, v_bE = (take(head).detach() for head in (teacher.x, teacher.y))
        log_scale, bias = _logit_map(config, teacher, outputs, u_bE.device)
        teachers.append(Teacher(u_bE, v_bE, log_scale, bias, teacher.weight))
    return teachers


def _logit_map(
    config: TrainConfig, teacher: TermTeacher, outputs: Outputs, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Return a teacher's log-scale [1], and for the sigmoid loss its bias [1]."""
    if isinstance(teacher.temperature, str):
        bias = outputs.biases.get(teacher.temperature)
        return outputs.log_scales[teacher.temperature].detach(), None if bias is None else bias.detach()
    # Filled on the device: a tensor made on the host would have to be copied, and waited for.
    log_scale = torch.full((1,), -float(np.log(teacher.temperature)), device=device)
    if config.loss.kind == "softmax":
        return log_scale, None
    assert teacher.bias is not None  # the config is refused without it
    return log_scale, torch.full((1,), teacher.bias, device=device)
