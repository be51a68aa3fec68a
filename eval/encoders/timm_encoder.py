"""timm's models, by name or folder, images only: the features before the classifier."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from threetowers.cache.encoders.teacher import load_teacher
from threetowers.eval.datasets.evaluation_set import EvaluationSet, Floats, Picture
from threetowers.eval.encoders.encoder import LoadOptions, ModelInfo, NoTextTower
from threetowers.eval.encoders.forward import PixelView, TeacherTransform, forward_pictures
from threetowers.eval.encoders.image_source import teacher_view


class ClassifierTower:
    """A timm model as the teacher of a cache would be. Its embedding is its feature."""

    sees_text = False
    logit_scale = 1.0

    def __init__(self, name: str, weights: str | None, loading: LoadOptions) -> None:
        """`name` may end in @SIZE, the input's side in pixels. Raises ValueError for what `load_teacher` refuses."""
        name, _, size = name.partition("@")
        if size and not size.isdecimal():
            raise ValueError(f"timm:{name}@{size}: expected the side of the input in pixels after '@'")
        if loading.precision == "float16":
            raise ValueError(f"timm:{name}: timm models are run in float32 or bfloat16, not in float16")
        self.loading = loading
        self.teacher = load_teacher(
            name,
            weights or "pretrained",
            int(size) if size else None,
            loading.torch_device(),
            precision=loading.precision,
        )
        self.dim = self.teacher.dim
        self.facts = ModelInfo(
            name=f"timm:{Path(name).name}",
            digest=self.teacher.weights_digest,
            step=None,
            precision=loading.precision,
            preprocessing=teacher_view(self.teacher.preprocessing),
        )

    def image_batches(self, data: EvaluationSet, pictures: Sequence[Picture], raw: bool) -> Iterator[Floats]:
        view = PixelView(data.tars, TeacherTransform(self.teacher.transform), self.loading.max_pixels)
        return forward_pictures(pictures, view, self.teacher.embed, self.loading.batch_size, self.loading.workers)

    def text_batches(self, captions: Sequence[str]) -> Iterator[Floats]:
        raise NoTextTower(f"{self.facts.name} sees images only: leave it out of tasks with captions or prompts")
