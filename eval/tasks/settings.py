"""The settings of each task, as the `tasks` section of a data-set config holds them."""

from dataclasses import field
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as validated

from threetowers.eval.metrics import linear_probe, neighbour_votes, ridge_probe

Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
FORBID_EXTRA = ConfigDict(extra="forbid")


@validated(frozen=True, config=FORBID_EXTRA)
class RetrievalSettings:
    """Settings of `retrieval`.

    Attributes:
        group_field: JSON field that names the group of an image; images and captions of one group match. Without it, a
            caption matches its own image only.
        gallery_field: JSON field that splits the images into galleries, such as an art style; each gets a record.
        max_captions: Captions used per image, the first ones; None: all, as clip-benchmark does.
        duplicate_captions: Equal captions of one image or group: `once` searches for each text once, `each` for every
            caption that is there, as clip-benchmark does.
        index: FAISS factory string of the index that is searched beside the exact ranks.
        index_parameters: Search parameters of the index, such as `nprobe=16`.
        examples: Queries of each kind that the report shows.
        seed: Of the choice of examples.
    """

    group_field: str | None = None
    gallery_field: str | None = None
    max_captions: Count | None = 5
    duplicate_captions: Literal["once", "each"] = "once"
    index: str = "Flat"
    index_parameters: str = ""
    examples: CountOrZero = 6
    seed: int = 0


@validated(frozen=True, config=FORBID_EXTRA)
class ZeroShotSettings:
    """Settings of `zeroshot`: how many examples the report shows, and the seed of their choice."""

    examples: CountOrZero = 6
    seed: int = 0


@validated(frozen=True, config=FORBID_EXTRA)
class FewShotSettings:
    """Settings of `fewshot`: training images per class, seeds of their choice, and the ridge penalty.

    Without `shots`, those of 1, 5, 10 and 25 that every class has.
    """

    shots: list[Count] | None = None
    seeds: list[int] = field(default_factory=lambda: list(ridge_probe.SEEDS))
    l2: PositiveFloat = ridge_probe.L2


@validated(frozen=True, config=FORBID_EXTRA)
class ProbeSettings:
    """Settings of `probe`: the penalties that are tried, and the seed of the held-out fifth."""

    penalties: list[PositiveFloat] = field(default_factory=lambda: list(linear_probe.PENALTIES))
    seed: int = 0


@validated(frozen=True, config=FORBID_EXTRA)
class KnnSettings:
    """Settings of `knn`: numbers of neighbours, and the temperature of weighted votes.

    Without `ks`, those of 1, 5, 10 and 20 for which there are training images.
    """

    ks: list[Count] | None = None
    temperature: PositiveFloat = neighbour_votes.TEMPERATURE


@validated(frozen=True, config=FORBID_EXTRA)
class ShiftSettings:
    """Settings of `shift`: the task that is compared; with `of: retrieval` also its group field and captions."""

    of: Literal["zeroshot", "retrieval"] = "zeroshot"
    retrieval: RetrievalSettings = field(default_factory=RetrievalSettings)


@validated(frozen=True, config=FORBID_EXTRA)
class OodSettings:
    """Settings of `ood`: the neighbour whose cosine is the k-NN score; without `k` the 50th, or the last there is."""

    k: Count | None = None


@validated(frozen=True, config=FORBID_EXTRA)
class TasksConfig:
    """The tasks that a data set serves, each with its settings; `{}` for the defaults."""

    retrieval: RetrievalSettings | None = None
    zeroshot: ZeroShotSettings | None = None
    fewshot: FewShotSettings | None = None
    probe: ProbeSettings | None = None
    knn: KnnSettings | None = None
    shift: ShiftSettings | None = None
    ood: OodSettings | None = None
