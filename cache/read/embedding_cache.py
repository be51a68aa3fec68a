"""Read a cache: check that it belongs to some tars, then take rows by (tar, ordinal, key), by key, or a tar at a time.

A local cache is memory-mapped; of a remote one, the shards of whole tars are fetched, checked and kept, up to a bound
of memory. A row is returned only if the hash of its key is the one stored beside it, and that of its caption.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from cachetools import LRUCache

from threetowers.cache.format.done_record import DONE, DoneRecord, done_record_name, read_done_record
from threetowers.cache.format.dtypes import Float32Array
from threetowers.cache.format.layout import STORE, RowStatus, emb_name, params_name
from threetowers.cache.format.manifest import Manifest, ManifestError, Side, read_manifest
from threetowers.cache.format.shard import BadShard
from threetowers.cache.format.tar_table import TarEntry, TarTable, read_table
from threetowers.cache.format.views import params_problem
from threetowers.cache.read.caption_runs import CaptionRows, CaptionRuns
from threetowers.cache.read.shard_rows import MmapShardRows, ShardRows, open_shard_rows, read_column, read_shard_rows
from threetowers.cache.read.tar_columns import OK, TarColumns, read_tar_columns
from threetowers.cache.storage.storage import Storage, open_storage
from threetowers.cache.webdataset.tar_index import key_hash

Float64Array = npt.NDArray[np.float64]

Int64 = npt.NDArray[np.int64]


class EmbeddingCache:
    """A cache of embeddings, opened for reading.

    Rows are raw embeddings of width `dim` in float32, whatever the storage dtype. Samples are addressed by tar id (0 to
    len(tars) - 1) and ordinal (position of the sample in its tar). A sample of a cache of images has one row for each
    view (0 to n_views - 1): `row`. A sample of a cache of text has a run of rows, one for each caption: `captions`,
    `caption_row`, `caption_rows`. A cache is cheap to open, can be pickled, and can be used before and after a fork.

    Examples:
        >>> import io, tarfile, tempfile
        >>> import timm, torch
        >>> from PIL import Image
        >>> from threetowers.cache.builder.build import build_cache
        >>> from threetowers.cache.builder.build_config import BuildConfig
        >>> folder = tempfile.TemporaryDirectory()
        >>> with tarfile.open(f"{folder.name}/0.tar", "w") as tar:
        ...     for key, color in (("a", "red"), ("b", "blue"), ("c", "green")):
        ...         png = io.BytesIO()
        ...         Image.new("RGB", (64, 64), color).save(png, "png")
        ...         member = tarfile.TarInfo(f"{key}.png")
        ...         member.size = len(png.getvalue())
        ...         tar.addfile(member, io.BytesIO(png.getvalue()))
        >>> weights = f"{folder.name}/weights.pth"
        >>> torch.save(timm.create_model("test_resnet").state_dict(), weights)
        >>> tars = [f"{folder.name}/0.tar"]
        >>> out = f"{folder.name}/cache"
        >>> config = BuildConfig(tars=tars, output_dir=out, encoder=f"timm:test_resnet:{weights}", device="cpu")
        >>> report = build_cache(config)

        >>> cache = EmbeddingCache.open(out)
        >>> len(cache), cache.dim, cache.n_views
        (3, 96, 1)
        >>> tar_id, ordinal = cache.find("b")
        >>> tar_id, ordinal
        (0, 1)
        >>> row_D = cache.row(tar_id, ordinal, "b")
        >>> row_D.shape, row_D.dtype
        ((96,), dtype('float32'))
        >>> cache.rows([0, 0], [2, 0], ["c", "a"]).shape
        (2, 96)
        >>> cache.row(0, 0, "b")
        Traceback (most recent call last):
        ...
        threetowers.cache.format.manifest.ManifestError: ...
        >>> folder.cleanup()
    """

    def __init__(self, storage: Storage, manifest: Manifest, table: TarTable, open_tars: int, memory: int) -> None:
        self.storage = storage
        self.manifest = manifest
        self.table = table
        self.n_views = manifest.views.count
        self._of_text = manifest.of == "text"
        self._open_tars = open_tars
        self._memory = memory
        self._close()

    @classmethod
    def open(
        cls, path: str | Path | Storage, *, of: Side | None = None, open_tars: int = 256, memory: int = 1 << 30
    ) -> Self:
        """Open the cache in a folder or at an fsspec URL.

        Args:
            path: folder, URL or storage of the cache.
            of: what it must hold embeddings of; None: either.
            open_tars: tars that stay open at most, the least recently used being closed first.
            memory: bytes of rows that are kept of a remote cache, about.

        Raises:
            ManifestError: there is no cache, or one of the other side, or its manifest or tar table is damaged.
            StorageError: the storage cannot be read.
        """
        storage = open_storage(path)
        cache = cls(storage, read_manifest(storage), read_table(storage), open_tars, memory)
        if of is not None and cache.manifest.of != of:
            raise cache._side_error(of)
        return cache

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without open files: memory maps would be pickled by their contents."""
        state = self.__dict__.copy()
        for name in ("_columns", "_params", "_shards", "_rows_by_key"):
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the state; tars are opened again when needed."""
        self.__dict__.update(state)
        self._close()

    def _close(self) -> None:
        self._columns: LRUCache[int, TarColumns] = LRUCache(self._open_tars)
        self._params: LRUCache[tuple[int, int], Float32Array] = LRUCache(self._open_tars)
        # A shard counts at least the bytes that let `open_tars` shards fit in, and one shard always fits.
        memory = max(1, self._memory)
        least = max(1, self._memory // self._open_tars)
        self._shards: LRUCache[tuple[int, int], ShardRows | MmapShardRows] = LRUCache(
            memory, lambda shard: min(memory, max(shard.nbytes, least))
        )
        self._rows_by_key: tuple[npt.NDArray[np.uint64], Int64] | None = None

    @property
    def dim(self) -> int:
        """Width D of a row."""
        return self.manifest.dim

    @property
    def tars(self) -> tuple[TarEntry, ...]:
        """The tars of the cache; `tars[i].id == i`."""
        return self.table.entries

    def __len__(self) -> int:
        """Return the number of samples in the tars of the cache, with or without an embedding."""
        return sum(entry.n_samples for entry in self.tars)

    def finished(self) -> list[int]:
        """Return the ids of the tars that are built, by one listing."""
        names = self.storage.listdir(DONE)
        return sorted(int(name.removesuffix(".json")) for name in names if name.endswith(".json"))

    def record(self, tar_id: int) -> DoneRecord:
        """Return the done record of a tar.

        Raises:
            ManifestError: the tar is incomplete, or its record is invalid.
        """
        if tar_id in self._columns:
            return self._columns[tar_id].record
        return read_done_record(self.storage, self.manifest, self.tars[tar_id])

    def status(self, tar_id: int) -> npt.NDArray[np.uint8]:
        """Return the (n,) uint8 RowStatus of each sample of a tar."""
        return self.columns(tar_id).status_n.copy()

    def row(self, tar_id: int, ordinal: int, key: str, view: int = 0) -> Float32Array:
        """Return the raw embedding of the image of one sample, (D,) float32.

        Raises:
            ManifestError: the row belongs to another key, has no embedding (see `status`), or is damaged; or this is a
                cache of text.
        """
        if self._of_text:
            raise self._side_error("image")
        columns = self.columns(tar_id)
        if (
            not 0 <= ordinal < len(columns.status_n)
            or columns.key_hash_n[ordinal] != key_hash(key)
            or columns.status_n[ordinal] != OK
        ):
            raise self._row_error(tar_id, ordinal, key)
        row_D: Float32Array = self._decoded(tar_id, view, np.array([ordinal]))[0]
        return row_D

    def rows(
        self,
        tar_ids: Sequence[int] | Int64,
        ordinals: Sequence[int] | Int64,
        keys: Sequence[str] | None = None,
        view: int = 0,
        captions: Sequence[int] | Int64 | None = None,
    ) -> Float32Array:
        """Return the raw embeddings of m samples, (m, D) float32, in the given order.

        Args:
            tar_ids: (m,) ids of their tars.
            ordinals: (m,) positions in their tars.
            keys: their keys, to be compared; None to trust the addresses.
            view: which view of the images.
            captions: (m,) numbers of their captions, in a cache of text.

        Raises:
            ManifestError: as for `row` and `caption_row`; names the first sample without a row.
            ValueError: the arguments have different lengths, or there are captions for images, or none for text.
        """
        tars_m = np.asarray(tar_ids, np.int64)
        ordinals_m = np.asarray(ordinals, np.int64)
        captions_m = None if captions is None else np.asarray(captions, np.int64)
        if self._of_text != (captions_m is not None) or (captions_m is not None and captions_m.shape != tars_m.shape):
            raise ValueError(
                f"{self.storage}: captions: {'none' if captions_m is None else captions_m.shape} for rows of "
                f"{self.manifest.of}: expected one for each row of text, and none for images"
            )
        if tars_m.shape != ordinals_m.shape or tars_m.ndim != 1 or (keys is not None and len(keys) != len(tars_m)):
            raise ValueError(
                f"rows: tar ids of shape {tars_m.shape}, ordinals of shape {ordinals_m.shape}, "
                f"{'no' if keys is None else len(keys)} keys: expected one of each for each row"
            )
        found_mD = np.empty((len(tars_m), self.dim), np.float32)
        for tar_id in np.unique(tars_m).tolist():
            at = np.flatnonzero(tars_m == tar_id)
            self._check_samples(tar_id, ordinals_m[at], None if keys is None else [keys[i] for i in at.tolist()])
            rows = ordinals_m[at] if captions_m is None else self._run_rows(tar_id, ordinals_m[at], captions_m[at])
            found_mD[at] = self._decoded(tar_id, view, rows)
        return found_mD

    def captions(self, tar_id: int, ordinal: int, key: str) -> CaptionRows:
        """Return which captions of a sample have rows, without reading these.

        Raises:
            ManifestError: as for `caption_rows`.
        """
        return self._runs(tar_id, ordinal, key).captions(ordinal)

    def caption_row(self, tar_id: int, ordinal: int, key: str, number: int, caption: str | None = None) -> Float32Array:
        """Return the raw embedding of one caption of a sample, (D,) float32.

        Args:
            tar_id: id of the sample's tar.
            ordinal: its position there.
            key: its key, to be compared.
            number: of the caption among those of `captions`.
            caption: the caption, to be compared; None to trust the number.

        Raises:
            ManifestError: as for `caption_rows`; or the caption was changed, moved or added.
        """
        row = self._runs(tar_id, ordinal, key).row(ordinal, number, caption)
        if row is None:
            raise self._caption_error(tar_id, ordinal, key, number, caption)
        row_D: Float32Array = self._decoded(tar_id, 0, np.array([row]))[0]
        return row_D

    def caption_rows(self, tar_id: int, ordinal: int, key: str) -> Float32Array:
        """Return the raw embeddings of all captions of a sample, (k, D) float32, in the order of `captions`.

        Raises:
            ManifestError: the rows belong to another key, there are none (see `status`), or they are damaged; or this
                is a cache of images.
        """
        runs = self._runs(tar_id, ordinal, key)
        return self._decoded(tar_id, 0, np.arange(*runs.bound_N[ordinal : ordinal + 2]))

    def check_captions(
        self, tar_id: int, ordinal: int, key: str, captions_by_source: Mapping[str, Sequence[str]]
    ) -> None:
        """Check that a sample still has the captions that were embedded, in their order.

        Args:
            tar_id: id of the sample's tar.
            ordinal: its position there.
            key: its key.
            captions_by_source: its captions now, as `manifest.captions.caption_format` finds them.

        Raises:
            ManifestError: a caption was changed, added, removed or moved; or as for `caption_rows`.
        """
        rows = self.captions(tar_id, ordinal, key)
        if difference := rows.differences(self.manifest.caption_sources.names, captions_by_source):
            raise ManifestError(f"{self._where(tar_id, ordinal, key)}: {difference}")

    def tar(self, tar_id: int, view: int = 0) -> Float32Array:
        """Return all embeddings of a tar, read and checked at once.

        These are (n, D) float32 of n samples of images, NaN where a sample has none; or (r, D) of r captions.

        Raises:
            ManifestError: the tar is incomplete or damaged.
        """
        shard = self.shard_rows(tar_id, view)
        rows_nD = self.manifest.storage_dtype.decode(shard.rows_nD, shard.scale_n)
        if not self._of_text:
            rows_nD[self.columns(tar_id).status_n != RowStatus.OK] = np.nan
        return rows_nD

    def find(self, key: str) -> tuple[int, int]:
        """Return (tar id, ordinal) of a key among the tars that were finished at the first call.

        The first call reads the hashes of all keys and sorts them: 16 bytes a sample.

        Raises:
            ManifestError: there is no such key, or several tars have it.
        """
        if self._rows_by_key is None:
            hashes = [np.empty(0, np.uint64)]
            rows = [np.empty(0, np.int64)]
            for tar_id in self.finished():
                hashes.append(self.columns(tar_id).key_hash_n)
                rows.append(tar_id * self.manifest.samples_per_tar + np.arange(len(hashes[-1])))
            hashes_N = np.concatenate(hashes)
            order = np.argsort(hashes_N, kind="stable")
            self._rows_by_key = hashes_N[order], np.concatenate(rows)[order]
        hashes_N, rows_N = self._rows_by_key
        wanted = np.uint64(key_hash(key))
        first = np.searchsorted(hashes_N, wanted, "left")
        last = np.searchsorted(hashes_N, wanted, "right")
        if last == first:
            raise ManifestError(f"{self.storage}: no sample {key!r} in the {len(self.finished())} tars that are built")
        if last - first > 1:
            tars = [self.tars[row // self.manifest.samples_per_tar].path for row in rows_N[first:last].tolist()]
            raise ManifestError(
                f"{self.storage}: several tars have a sample {key!r}: {tars[:5]}: choose a tar and use `row`"
            )
        tar_id, ordinal = divmod(int(rows_N[first]), self.manifest.samples_per_tar)
        return tar_id, ordinal

    def array(self, view: int = 0) -> Any:
        """Return the Zarr array of a view, as stored.

        A `zarr.Array` of shape (tars x rows_per_tar, D), for NumPy's slicing, `dask.array.from_zarr` and the like. The
        row of an image is `tar_id * manifest.rows_per_tar + ordinal`; those of captions are where the array `row_end`
        says. bfloat16 is stored as uint16, int8 rows are multiples of the array `scale`; rows without an embedding
        have the fill value.
        """
        import zarr
        from zarr.storage import FsspecStore

        name = f"{STORE}/{emb_name(self._checked(view))}"
        path = self.storage.local_path(name)
        store = path if path is not None else FsspecStore.from_url(self.storage.uri(name), read_only=True)
        return zarr.open_array(store, mode="r")

    def view_params(self, tar_id: int, ordinal: int, view: int = 0) -> Float32Array:
        """Return how this view of a sample was made, (P,) for `views.render_view`; for caches of crops only.

        The parameters of a sample without an embedding are NaN, or those of the crops that were not embedded.

        Raises:
            ManifestError: the tar is incomplete or damaged, or its parameters are none that can be shown again.
        """
        address = tar_id, self._checked(view)
        params_nP = self._params.get(address)
        if params_nP is None:
            params_nP = self._params[address] = self._read_params(tar_id, view)
        found_P: Float32Array = params_nP[ordinal].copy()
        return found_P

    def _read_params(self, tar_id: int, view: int) -> Float32Array:
        """Return the (n, P) parameters of one view of a tar. Raises ManifestError as `view_params` does."""
        name = params_name(view)
        try:
            stored_nP = read_column(self.storage, self.manifest, self.columns(tar_id).record, name)
        except BadShard as error:
            raise self._damage_error(tar_id, error) from error
        params_nP = stored_nP.astype(np.float32)
        problem = params_problem(params_nP[~np.isnan(params_nP).all(axis=1)])
        if problem:
            raise ManifestError(
                f"{self.storage}: {name} of tar {self.tars[tar_id].path} ({tar_id}): {problem}; use the version that "
                "built the cache, or build it again"
            )
        return params_nP

    def moments(
        self, tar_ids: Sequence[int] | None = None, *, max_rows: int = 65536, seed: int = 0
    ) -> tuple[Float32Array, Float32Array]:
        """Return (D,) mean and (D,) population standard deviation of the embeddings of view 0, accumulated in float64.

        Exact if the tars have at most about `max_rows` rows; else over chunks drawn without replacement until they
        have that many rows. The result depends on the tars, `max_rows` and `seed` only.

        Args:
            tar_ids: which tars; by default all.
            max_rows: rows to read, about.
            seed: of the order of the chunks.

        Raises:
            ManifestError: a tar is incomplete or damaged, or no row has an embedding.
        """
        mean_D, square_D = self._statistics(tar_ids, max_rows, seed, lambda x_nD: (x_nD**2).sum(0))
        return mean_D.astype(np.float32), np.sqrt(np.maximum(square_D, 0)).astype(np.float32)

    def covariance(
        self, tar_ids: Sequence[int] | None = None, *, max_rows: int = 65536, seed: int = 0
    ) -> tuple[Float64Array, Float64Array]:
        """Return (D,) mean and (D, D) population covariance of the embeddings of view 0, in float64.

        Over the rows that `moments` takes, and with its errors; chunk by chunk, in memory for (D, D).
        """
        mean_D, covariance_DD = self._statistics(tar_ids, max_rows, seed, lambda x_nD: x_nD.T @ x_nD)
        return mean_D, covariance_DD

    def _statistics(
        self,
        tar_ids: Sequence[int] | None,
        max_rows: int,
        seed: int,
        sum_of_products: Callable[[Float64Array], Float64Array],
    ) -> tuple[Float64Array, Float64Array]:
        """Return the mean of the rows, and that of the products of centred ones, as their sum over some is computed."""
        count = 0
        total_D = np.zeros(self.dim)
        products: Float64Array = np.zeros(())
        shift_D: Float64Array | None = None
        for x_nD in self._drawn_chunks(tar_ids, seed):
            shift_D = x_nD[0] if shift_D is None else shift_D  # keeps the sums small where the mean is large
            count += len(x_nD)
            total_D += (x_nD - shift_D).sum(0)
            products = products + sum_of_products(x_nD - shift_D)
            if count >= max_rows:
                break
        if shift_D is None:
            raise ManifestError(f"{self.storage}: no row has an embedding: see `threetowers cache info`")
        mean_D = total_D / count
        return mean_D + shift_D, products / count - sum_of_products(mean_D[None])

    def _drawn_chunks(self, tar_ids: Sequence[int] | None, seed: int) -> Iterator[Float64Array]:
        """Yield the embeddings (n, D) of the chunks of some tars that have any, in an order drawn by the seed."""
        chunk_rows = self.manifest.chunk_rows
        entries = self.tars if tar_ids is None else [self.tars[tar_id] for tar_id in sorted(tar_ids)]
        chunks = []
        for entry in entries:
            n_rows = self.record(entry.id).n_rows if self._of_text else entry.n_samples
            n_chunks = -(-n_rows // chunk_rows)
            chunks += [(entry.id, i) for i in range(n_chunks)]
        for at in np.random.default_rng(seed).permutation(len(chunks)).tolist():
            tar_id, i = chunks[at]
            rows = self.columns(tar_id).embedded_rows(i * chunk_rows, (i + 1) * chunk_rows)
            if len(rows):
                yield self._decoded(tar_id, 0, rows).astype(np.float64)

    def columns(self, tar_id: int) -> TarColumns:
        """Return what is stored of a tar beside its embeddings.

        Raises:
            ManifestError: the tar is incomplete or damaged.
        """
        columns = self._columns.get(tar_id)
        if columns is None:
            record = self.record(tar_id)
            try:
                columns = self._columns[tar_id] = read_tar_columns(self.storage, self.manifest, record)
            except BadShard as error:
                raise self._damage_error(tar_id, error) from error
        return columns

    def shard_rows(self, tar_id: int, view: int = 0) -> ShardRows:
        """Read all rows of a tar as they are stored, in one read that is checked at once; they are not kept.

        Raises:
            ManifestError: the tar is incomplete or damaged.
        """
        try:
            return read_shard_rows(self.storage, self.manifest, self.columns(tar_id).record, self._checked(view))
        except BadShard as error:
            raise self._damage_error(tar_id, error) from error

    def _check_samples(self, tar_id: int, ordinals_m: Int64, keys: Sequence[str] | None) -> None:
        """Raise ManifestError for the first of these samples of a tar that has no embedding, or another key."""
        columns = self.columns(tar_id)
        good_m = (ordinals_m >= 0) & (ordinals_m < len(columns.status_n))
        good_m[good_m] = columns.status_n[ordinals_m[good_m]] == RowStatus.OK
        if keys is not None:
            hashes_m = np.array([key_hash(key) for key in keys], np.uint64)
            good_m[good_m] = columns.key_hash_n[ordinals_m[good_m]] == hashes_m[good_m]
        if not good_m.all():
            first = int(np.flatnonzero(~good_m)[0])
            raise self._row_error(tar_id, int(ordinals_m[first]), None if keys is None else keys[first])

    def _run_rows(self, tar_id: int, ordinals_m: Int64, captions_m: Int64) -> Int64:
        """Return the (m,) rows of captions of samples that have some. Raises ManifestError where there is none."""
        runs = self.columns(tar_id).runs
        assert runs is not None
        rows_m, outside = runs.rows(ordinals_m, captions_m)
        if len(outside):
            first = int(outside[0])
            raise self._caption_error(tar_id, int(ordinals_m[first]), None, int(captions_m[first]), None)
        return rows_m

    def _runs(self, tar_id: int, ordinal: int, key: str) -> CaptionRuns:
        """Return the runs of a tar, in which that of this sample is. Raises ManifestError as `caption_rows` does."""
        columns = self.columns(tar_id)
        if columns.runs is None:
            raise self._side_error("text")
        if not columns.is_at(ordinal, key) or columns.status_n[ordinal] != OK:
            raise self._row_error(tar_id, ordinal, key)
        return columns.runs

    def _decoded(self, tar_id: int, view: int, rows: Int64) -> Float32Array:
        """Return (m, D) float32 rows of a tar, which is kept open."""
        address = tar_id, self._checked(view)
        try:
            shard = self._shards.get(address)
            if shard is None:
                record = self.columns(tar_id).record
                shard = self._shards[address] = open_shard_rows(self.storage, self.manifest, record, view)
            stored = shard.take(rows)
        except BadShard as error:
            raise self._damage_error(tar_id, error) from error
        scale_n = shard.scale_n
        return self.manifest.storage_dtype.decode(stored, None if scale_n is None else scale_n[rows])

    def _checked(self, view: int) -> int:
        if not 0 <= view < self.n_views:
            raise ValueError(
                f"{self.storage}: view {view}: expected 0 to {self.n_views - 1} (views: {self.manifest.views.policy})"
            )
        return view

    def _row_error(self, tar_id: int, ordinal: int, key: str | None) -> ManifestError:
        return ManifestError(f"{self._where(tar_id, ordinal, key)}: {self.columns(tar_id).why_missing(ordinal, key)}")

    def _where(self, tar_id: int, ordinal: int, key: str | None) -> str:
        named = "" if key is None else f", key {key!r}"
        return f"{self.storage}: tar {self.tars[tar_id].path} ({tar_id}), ordinal {ordinal}{named}"

    def _caption_error(
        self, tar_id: int, ordinal: int, key: str | None, number: int, caption: str | None
    ) -> ManifestError:
        runs = self.columns(tar_id).runs
        assert runs is not None
        difference = runs.captions(ordinal).difference(number, caption)
        return ManifestError(f"{self._where(tar_id, ordinal, key)}: {difference}")

    def _side_error(self, expected: Side) -> ManifestError:
        found = self.manifest.of
        return ManifestError(
            f"{self.storage}: of: expected a cache of {expected}, found one of {found} ({self.manifest.encoder}): give "
            f"the path of another cache, or build one with --of {expected}"
        )

    def _damage_error(self, tar_id: int, error: BadShard) -> ManifestError:
        return ManifestError(
            f"{self.storage}: rows of tar {self.tars[tar_id].path} ({tar_id}) are damaged: {error}. Delete "
            f"{self.storage.uri(done_record_name(tar_id))} and run `threetowers cache build` again"
        )
