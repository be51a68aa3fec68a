"""What a cached tower of a run takes in evaluation: rows of a cache, or what the live teacher computes."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from threetowers.cache.encoders.encoder import FrozenEncoder
from threetowers.cache.encoders.live import LiveTeachers
from threetowers.cache.format.manifest import Manifest, ManifestError, teacher_mismatch
from threetowers.cache.read.embedding_cache import EmbeddingCache
from threetowers.eval.encoders.encoder import LoadOptions
from threetowers.trainer.config import CacheTower, TrainConfig

REMEDY = "give it as --cache {tower}=PATH, or use --live-teacher"


class CachedInput:
    """Where the input of a cached tower comes from.

    Rows are read from `options.caches[tower]`; without that they are computed under `options.live_teacher`, else read
    from the cache that the run was trained on, which may hold the evaluated tars too.

    Attributes:
        tower: Name of the tower.
        manifest: Of the cache that the run was trained on.
        path: Of the cache whose rows are read.
        reads_rows: Whether rows are read of what the evaluated tars hold.
        computes: Whether the live teacher may embed what no cache holds.
    """

    def __init__(
        self,
        config: TrainConfig,
        tower: str,
        manifest: Manifest,
        teachers: LiveTeachers,
        options: LoadOptions,
        remedy: str = REMEDY,
    ) -> None:
        """Choose the source.

        Args:
            config: Of the run.
            tower: A cached tower of it.
            manifest: See the class.
            teachers: Those of the run's cached towers.
            options: How the run is evaluated.
            remedy: How a cache is named, for messages.
        """
        settings = config.towers[tower]
        assert isinstance(settings, CacheTower)
        self.tower = tower
        self.manifest = manifest
        self.path: str | Path = options.caches.get(tower, settings.path)
        self.reads_rows = tower in options.caches or not options.live_teacher
        self.computes = options.live_teacher
        self._teachers = teachers
        self._run = config.output_dir
        self._remedy = remedy.format(tower=tower)

    @property
    def teacher(self) -> FrozenEncoder:
        """The live teacher; loaded when it is first asked for.

        Raises:
            ManifestError: The encoder that is there now is not the one that the run was trained on.
            ValueError: It cannot be loaded.
        """
        return self._teachers.teacher(self.tower)

    @property
    def evaluated_manifest(self) -> Manifest:
        """The manifest of the cache whose rows are read, which may have another dtype, precision or views.

        It is that of training for the live teacher, and where there is no cache: then `cache` raises the error.
        """
        if self.reads_rows:
            with contextlib.suppress(ManifestError):
                return EmbeddingCache.open(self.path).manifest
        return self.manifest

    def cache(self) -> EmbeddingCache:
        """Open the cache whose rows are read.

        Raises:
            ManifestError: There is none, or one of another teacher; its tars and dtype may differ from those of
                training.
        """
        with self.explained():
            cache = EmbeddingCache.open(self.path)
        if lines := teacher_mismatch(self.manifest, cache.manifest):
            raise ManifestError(f"{self.path}: not the teacher that {self._run} was trained on: {'; '.join(lines)}")
        if cache.manifest.views.cropped:
            raise ManifestError(
                f"{self.path}: views: expected center or center+flip, found {cache.manifest.views}: evaluation takes "
                "uncropped images; build a cache of the held-out tars with views center"
            )
        return cache

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Add to the error of a row that is not there what else could give it."""
        try:
            yield
        except ManifestError as error:
            things = "images" if self.manifest.of == "image" else "captions"
            raise ManifestError(
                f"{error}. A run whose {self.manifest.of} tower is a cached teacher needs rows for the evaluation "
                f"{things}: build a cache of them and {self._remedy}"
            ) from error

    def __str__(self) -> str:
        """Return the teacher, its feature, and whether rows are read or computed."""
        return f"{self.manifest.encoder} {self.manifest.feature} ({'cached' if self.reads_rows else 'live'})"


def teachers_of(config: TrainConfig, manifests: Mapping[str, Manifest], options: LoadOptions) -> LiveTeachers:
    """Return the teachers of a run's cached towers, of which `manifests` are those of the caches, by tower."""
    towers = {name: config.towers[name] for name in manifests}
    weights = {name: tower.weights for name, tower in towers.items() if isinstance(tower, CacheTower)}
    return LiveTeachers(manifests, weights, str(options.torch_device()))
