"""Retrieval between the images and the captions of a gallery: recalls both ways, and examples."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from threetowers.cache.webdataset.groups import BAD_GROUP, BadField, field_name, sample_group
from threetowers.cache.webdataset.sample import describe_missing_captions
from threetowers.eval.datasets.dataset import DatasetPart, EvalDataset
from threetowers.eval.datasets.dataset_config import DatasetError, UnfitForTask
from threetowers.eval.datasets.image_set import EvalImage, ImageSet
from threetowers.eval.encoders.embedding_store import Embeddings
from threetowers.eval.encoders.encoder import Encoder
from threetowers.eval.left_out import NO_CAPTION
from threetowers.eval.metrics.recall import RECALL_KS, count_duplicates, evaluate_retrieval, hit_rate
from threetowers.eval.record import EvalResult, Example, ExampleItem
from threetowers.eval.report.thumbnails import ThumbnailStore
from threetowers.eval.search.index import Device, VectorIndex, build_index, recall_against_exact
from threetowers.eval.tasks.settings import RetrievalSettings

BAD_GALLERY = "gallery_field: a list or an object"  # counts samples whose field is no name
GroupIds = npt.NDArray[np.int64]

DIRECTION_NAMES = ("image_to_text", "text_to_image")
INDEX_NEIGHBOURS = max(RECALL_KS)
EXAMPLE_ANSWERS = 5
MAP_POINTS = 1000  # of each kind
TO_IMAGES = "Caption → images"
TO_CAPTIONS = "Image → captions"
MISSED = "Missed most: "
SEVERAL_LINES = "a caption of several lines (caption_per_line takes each line of a text member as one)"


@dataclass(frozen=True)
class Gallery:
    """What is searched: some images, and their captions.

    By default each distinct caption of a group is searched for once; with `duplicate_captions: each` every caption of
    every image is.

    Attributes:
        images: The images.
        groups: Name of the group of each image.
        captions: The captions.
        image_group_N: Number of the group of each image.
        text_group_M: Number of the group of each caption.
        given: Every caption of the images up to the limit, with the number of its group; equal ones are not merged.
        beyond_limit: Captions beyond the limit per image, which are not used.
    """

    images: list[EvalImage]
    groups: list[str]
    captions: list[str]
    image_group_N: GroupIds
    text_group_M: GroupIds
    given: list[tuple[int, str]]
    beyond_limit: int

    @classmethod
    def of(cls, part: DatasetPart, settings: RetrievalSettings) -> "Gallery":
        """Return the gallery of a part in which each image has a caption and a group, see `captioned_part`."""
        images = part.images()
        groups = []
        for image in images:
            tar = part.data.tars[image.tar]
            groups.append(sample_group(tar, image.ordinal, image.fields, settings.group_field).name)
        numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
        given: list[tuple[int, str]] = []
        beyond_limit = 0
        for image, group in zip(images, groups, strict=True):
            used = image.captions[: settings.max_captions]
            given += [(numbers[group], caption) for caption in used]
            beyond_limit += len(image.captions) - len(used)
        # Several images of one group bring the same captions.
        searched = list(dict.fromkeys(given)) if settings.duplicate_captions == "once" else given
        return cls(
            images=images,
            groups=groups,
            captions=[caption for _, caption in searched],
            image_group_N=np.array([numbers[group] for group in groups]),
            text_group_M=np.array([number for number, _ in searched]),
            given=given,
            beyond_limit=beyond_limit,
        )

    def caption_counts(self) -> dict[str, int]:
        """Return how many captions the images have: beyond the limit, merged with an equal one, and duplicates."""
        duplicates = count_duplicates([caption for _, caption in self.given], [number for number, _ in self.given])
        # One caption of five lines or five captions: other recalls, and only the user knows which is meant
        several = sum(any("\n" in caption for caption in image.captions) for image in self.images)
        return {
            **({f"notes/{SEVERAL_LINES}": several} if several else {}),
            "captions_beyond_limit": self.beyond_limit,
            "captions_merged": len(self.given) - len(self.captions),
            **{f"caption_{name}": count for name, count in duplicates.items()},
        }


def retrieval(
    encoder: Encoder, dataset: EvalDataset, settings: RetrievalSettings, thumbnails: ThumbnailStore
) -> EvalResult:
    """Return recalls from exact ranks in both directions, and beside them those of a FAISS index.

    Items hold the rank and the hits of each query, and a map of the embeddings. Examples are queries drawn at random,
    the same for every model, and the model's own worst.
    """
    data = dataset.test.data
    gallery = Gallery.of(dataset.test, settings)
    image_ND = encoder.images(data, gallery.images)
    text_MD = encoder.captions(data, gallery.captions)

    # Recalls from exact ranks.
    exact = evaluate_retrieval(
        image_ND,
        text_MD,
        gallery.image_group_N,
        gallery.text_group_M,
        image_hashes=[xxhash.xxh3_64_intdigest(data.encoded(image)) for image in gallery.images],
    )
    items = dict(exact.items()) | embedding_map(image_ND, text_MD, settings.seed)
    # A group is no independent evidence: it has the same number in every gallery of the data set.
    hashes = {}
    for group, number in zip(gallery.groups, gallery.image_group_N.tolist(), strict=True):
        hashes[number] = xxhash.xxh3_64_intdigest(group.encode()) >> 1
    for direction, group_N in (("image_to_text", gallery.image_group_N), ("text_to_image", gallery.text_group_M)):
        items[f"{direction}/group"] = np.array([hashes[number] for number in group_N.tolist()], dtype=np.int64)

    # Recalls of the index, and examples found with it.
    search = _IndexedGallery(data, gallery, image_ND, text_MD, settings, thumbnails, encoder.search_device)
    metrics = exact.metrics() | search.metrics()
    examples = search.text_examples(items["text_to_image/rank"]) + search.image_examples(items["image_to_text/rank"])
    part = replace(dataset.test, group_field=settings.group_field)
    return EvalResult(metrics, exact.counts() | gallery.caption_counts() | part.notes, items, examples)


def captioned_part(part: DatasetPart, settings: RetrievalSettings) -> tuple[DatasetPart, list[str]]:
    """Return the images of a part that can be searched, and why each other one cannot.

    An image needs a caption, and a value of the gallery field where there is one; a list or an object is no group and
    no gallery. Without a value of the group field an image is its own group.

    Raises:
        UnfitForTask: No image can be searched, or none has the group field.
    """
    usable: list[int] = []
    problems: list[str] = []
    left_out = Counter(part.left_out)
    has_group = settings.group_field is None
    for position, image in enumerate(part.images()):
        has_group = has_group or settings.group_field in image.fields
        reason, problem = _unsearchable(image, part, settings)
        if problem:
            left_out[reason] += 1
            problems.append(f"{part.data.name(image)}: {problem}")
        else:
            usable.append(position)
    if not has_group:
        first = part.images()[0]
        raise UnfitForTask(
            f"none of {len(part.rows)} images can be grouped; {part.data.name(first)}: group_field: no field "
            f"{settings.group_field!r}, only {sorted(first.fields)}"
        )
    if not usable:
        raise UnfitForTask(
            f"none of {len(part.rows)} images can be used for retrieval; the first of {len(problems)} problems: "
            f"{problems[0]}"
        )
    return replace(part.select(usable), left_out=left_out), problems


def captioned(dataset: EvalDataset, settings: RetrievalSettings) -> tuple[EvalDataset, list[str]]:
    """Return a data set with those images of each part that can be searched, and why each other one cannot.

    Raises:
        UnfitForTask: No image of a part can be searched.
        DatasetError: An image cannot, and `on_bad` is `error`.
    """
    test, problems = captioned_part(dataset.test, settings)
    shifted = {}
    for name, part in dataset.shifted.items():
        shifted[name], more = captioned_part(part, settings)
        problems += more
    if problems and dataset.config.on_bad == "error":
        raise DatasetError(f"{problems[0]}; set on_bad: skip to leave such samples out")
    return replace(dataset, test=test, shifted=shifted), problems


def _unsearchable(image: EvalImage, part: DatasetPart, settings: RetrievalSettings) -> tuple[str, str]:
    """Return why an image cannot be searched, as a name to count by and in words; nothing where it can."""
    for key, field in (("group_field", settings.group_field), ("gallery_field", settings.gallery_field)):
        if field is None:
            continue
        try:
            name = field_name(image.fields, field)
        except BadField as error:
            return BAD_GROUP if key == "group_field" else BAD_GALLERY, f"{key}: {error}"
        if name is None and key == "gallery_field":
            found = f"no value in field {field!r}" if field in image.fields else f"no field {field!r}"
            return "no gallery field", f"{key}: {found}, only {sorted(image.fields)}"
    if not image.captions:
        members = part.data.tars[image.tar].samples[image.ordinal].members
        found = describe_missing_captions(members, image.fields, image.notes)
        return NO_CAPTION, f"{found} (captions, --captions, names the sources)"
    return "", ""


def split_galleries(
    dataset: EvalDataset, settings: RetrievalSettings
) -> tuple[list[tuple[EvalDataset, RetrievalSettings]], list[str]]:
    """Split a data set into its galleries, each with its share of the examples.

    Returns:
        The galleries in the order of their names, and the problem of each image that is left out.

    Raises:
        UnfitForTask, DatasetError: As `captioned` does.
    """
    dataset, problems = captioned(dataset, settings)
    part = dataset.test
    if settings.gallery_field is None:
        return [(dataset, settings)], problems
    positions: dict[str, list[int]] = {}
    for position, image in enumerate(part.images()):
        name = field_name(image.fields, settings.gallery_field)
        assert name is not None  # see captioned_part
        positions.setdefault(name, []).append(position)
    share, extra = divmod(settings.examples, len(positions))
    galleries = []
    for number, name in enumerate(sorted(positions)):
        gallery = replace(
            dataset,
            name=f"{dataset.name}/{name}" if dataset.name else name,
            test=part.select(positions[name]),
        )
        galleries.append((gallery, replace(settings, examples=share + (number < extra))))
    return galleries, problems


class _IndexedGallery:
    """A gallery with a model's embeddings, indexed in both directions."""

    def __init__(
        self,
        data: ImageSet,
        gallery: Gallery,
        image_ND: Embeddings,
        text_MD: Embeddings,
        settings: RetrievalSettings,
        thumbnails: ThumbnailStore,
        device: Device,
    ) -> None:
        self.data = data
        self.gallery = gallery
        self.image_ND = image_ND
        self.text_MD = text_MD
        self.settings = settings
        self.thumbnails = thumbnails
        self.device = device
        self.images = build_index(image_ND, settings.index, parameters=settings.index_parameters, device=device)
        self.texts = build_index(text_MD, settings.index, parameters=settings.index_parameters, device=device)

    def metrics(self) -> dict[str, float]:
        """Return the recall@k of matches by index, and of an approximate one its recall of the exact neighbours."""
        gallery = self.gallery
        sides: list[tuple[str, VectorIndex, Embeddings, Embeddings, GroupIds, GroupIds]] = [
            ("image_to_text", self.texts, self.text_MD, self.image_ND, gallery.image_group_N, gallery.text_group_M),
            ("text_to_image", self.images, self.image_ND, self.text_MD, gallery.text_group_M, gallery.image_group_N),
        ]
        metrics = {}
        for direction, index, vectors, queries, query_groups, gallery_groups in sides:
            neighbours = min(INDEX_NEIGHBOURS, index.size)
            found_NK = index.search(queries, neighbours).ids_NK
            if not index.exact:
                recall = recall_against_exact(index, vectors, queries, neighbours, device=self.device)
                metrics[f"{direction}/index_finds@{neighbours}"] = recall
            ks = [k for k in RECALL_KS if k <= neighbours]
            for k, hits in hit_rate(found_NK, query_groups, gallery_groups, ks).items():
                metrics[f"{direction}/recall@{k}_index"] = hits
        return metrics

    def text_examples(self, rank_M: npt.NDArray[np.float32]) -> list[Example]:
        """Return captions with the images they find: some drawn at random, then the worst by rank."""
        examples = []
        for heading, rows in self._chosen(TO_IMAGES, rank_M, self.settings.seed):
            for row in rows:
                query = ExampleItem(self.gallery.captions[row])
                examples.append(Example(heading, query, self._images_found(row), _as_int(rank_M[row])))
        return examples

    def image_examples(self, rank_N: npt.NDArray[np.float32]) -> list[Example]:
        """Return images with the captions they find: some drawn at random, then the worst by rank."""
        examples = []
        for heading, rows in self._chosen(TO_CAPTIONS, rank_N, self.settings.seed + 1):
            for row in rows:
                image = self.gallery.images[row]
                query = ExampleItem(image.key, self._thumbnail(image))
                examples.append(Example(heading, query, self._captions_found(row), _as_int(rank_N[row])))
        return examples

    def _chosen(self, heading: str, rank_N: npt.NDArray[np.float32], seed: int) -> list[tuple[str, Sequence[int]]]:
        """Return (heading, rows) of queries drawn at random, and of the worst."""
        count = self.settings.examples
        drawn = np.random.default_rng(seed).permutation(len(rank_N))[:count].tolist()
        by_rank = np.argsort(-rank_N, kind="stable").tolist()
        worst = [row for row in by_rank if rank_N[row] > 1][:count]
        return [(heading, drawn), (MISSED + heading.lower(), worst)]

    def _images_found(self, row: int) -> tuple[ExampleItem, ...]:
        found = self.images.search(self.text_MD[row : row + 1], min(EXAMPLE_ANSWERS, self.images.size))
        hit_N = self.gallery.image_group_N == self.gallery.text_group_M[row]
        answers = []
        for number, score in zip(found.ids_NK[0], found.scores_NK[0], strict=True):
            if number >= 0:
                image = self.gallery.images[number]
                answers.append(ExampleItem(image.key, self._thumbnail(image), float(score), bool(hit_N[number])))
        return tuple(answers)

    def _captions_found(self, row: int) -> tuple[ExampleItem, ...]:
        found = self.texts.search(self.image_ND[row : row + 1], min(EXAMPLE_ANSWERS, self.texts.size))
        hit_M = self.gallery.text_group_M == self.gallery.image_group_N[row]
        answers = []
        for number, score in zip(found.ids_NK[0], found.scores_NK[0], strict=True):
            if number >= 0:
                answers.append(ExampleItem(self.gallery.captions[number], None, float(score), bool(hit_M[number])))
        return tuple(answers)

    def _thumbnail(self, image: EvalImage) -> str:
        return self.thumbnails.add(self.data.encoded(image))


def embedding_map(image_ND: Embeddings, text_MD: Embeddings, seed: int) -> dict[str, npt.NDArray[Any]]:
    """Return some images and captions projected on the two main axes of both together (PCA).

    Args:
        image_ND: Image embeddings.
        text_MD: Caption embeddings.
        seed: Of the choice of at most 1,000 of each.

    Returns:
        `map/images` and `map/texts` (n, 2), and `map/explained` (2,), the share of the variance of each axis.
    """
    rng = np.random.default_rng(seed)
    parts = []
    for x_ND in (image_ND, text_MD):
        rows = np.sort(rng.permutation(len(x_ND))[:MAP_POINTS])
        parts.append(np.asarray(x_ND[rows], dtype=np.float64))
    joint_ND = np.concatenate(parts)
    centred_ND = joint_ND - joint_ND.mean(axis=0)
    _, lengths, axes = np.linalg.svd(centred_ND, full_matrices=False)
    axes = axes[:2] if len(axes) > 1 else np.concatenate([axes, np.zeros_like(axes)])
    # The sign of an axis is arbitrary: its largest entry shall be positive.
    axes = axes * np.sign(axes[np.arange(2), np.abs(axes).argmax(axis=1)] + 1e-300)[:, None]
    points = (centred_ND @ axes.T).astype(np.float32)
    explained = np.pad(lengths**2, (0, 2))[:2] / max(float((lengths**2).sum()), 1e-300)
    return {
        "map/images": points[: len(parts[0])],
        "map/texts": points[len(parts[0]) :],
        "map/explained": explained.astype(np.float32),
    }


def _as_int(rank: float) -> int | None:
    return None if np.isnan(rank) else int(rank)
