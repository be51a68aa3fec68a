"""Takes the rows of images and captions from the tars of DataCompDR, sample by sample."""

from collections.abc import Sequence

import numpy as np
import xxhash

from threetowers.cache.exchange.datacompdr.bad_reinforcement import BadReinforcement
from threetowers.cache.exchange.datacompdr.caption_rows import SYN, TXT, CaptionRows, rows_by_caption
from threetowers.cache.exchange.datacompdr.crops import PAUG, read_crops
from threetowers.cache.exchange.datacompdr.reinforced_tars import Members, ReinforcedTars
from threetowers.cache.exchange.datacompdr.view_size import Size, ViewSize, original_size
from threetowers.cache.exchange.row_finder import NO_KEY, JoinedTar, KeyRowFinder, finish, no_caption_row
from threetowers.cache.exchange.sample_keys import Match
from threetowers.cache.exchange.source_rows import MIN_REPEAT_COSINE
from threetowers.cache.format.dtypes import Float32Array, cosines
from threetowers.cache.format.image_row_buffer import ImageRowBuffer
from threetowers.cache.format.layout import RowStatus
from threetowers.cache.format.manifest import Manifest
from threetowers.cache.format.rand_augment import RandAugment
from threetowers.cache.format.text_row_buffer import TextRowBuffer
from threetowers.cache.format.views import Params
from threetowers.cache.storage.object_file import open_object
from threetowers.cache.webdataset.captions import FIELD_EXTENSIONS, CaptionFormat, caption_hash
from threetowers.cache.webdataset.images import BadImage, read_stored_size
from threetowers.cache.webdataset.sample import Annotation, describe_missing_captions, read_fields
from threetowers.cache.webdataset.sample_stream import stream_all, stream_annotations
from threetowers.cache.webdataset.tar_index import TarIndex

BLOCK_SAMPLES = 64  # that are stored at a time, with all of their crops
BLOCK_CAPTIONS = 4096


class CropRowFinder(KeyRowFinder):
    """Finds the rows of augmented crops, with the parameters by which they are replayed."""

    def __init__(
        self,
        source: ReinforcedTars,
        indexes: Sequence[TarIndex],
        match: Match,
        view_size: ViewSize,
        min_cosine: float | None = None,
    ) -> None:
        super().__init__(source, indexes, match, min_cosine)
        self._tars = source
        self._view_size = view_size

    def take(self, index: TarIndex, manifest: Manifest) -> JoinedTar:
        """Return the rows of a tar."""
        rows = ImageRowBuffer(index, manifest, self._min_cosine)
        row_n = self.find(index)
        self._source.used_N[row_n[row_n >= 0]] = True
        digest = xxhash.xxh3_128()
        missing: list[tuple[int, str]] = []
        images: dict[int, tuple[int, int, Size]] = {}  # ordinal, hash and size by the number of what is found
        with open_object(index.location) as file:
            for ordinal, members in stream_all(index, file, digest, FIELD_EXTENSIONS):
                sample = index.samples[ordinal]
                if sample.image is None or sample.defect is not None:
                    continue
                image_hash = xxhash.xxh3_64_intdigest(members[sample.image])
                rows.set_image(ordinal, image_hash)
                number = int(row_n[ordinal])
                if number < 0:
                    missing.append((ordinal, NO_KEY))
                    continue
                try:
                    images[number] = (ordinal, image_hash, self._seen_size(index, ordinal, members))
                except BadImage as error:
                    rows.reject(ordinal, RowStatus.of(error.defect), str(error))
                except BadReinforcement as error:
                    missing.append((ordinal, str(error)))
        rows.reject_defects()

        policy = RandAugment.parse(manifest.views.augment)

        def parse(number: int, members: Members) -> tuple[Float32Array, Params]:
            rows_VD = self._tars.image_rows(members)
            if PAUG not in members:
                raise BadReinforcement(f"no {PAUG}, which has the crops")
            params_VP = read_crops(members[PAUG], images[number][2], policy)
            if len(params_VP) != len(rows_VD):
                raise BadReinforcement(f"{PAUG}: {len(params_VP)} crops, expected one for each of {len(rows_VD)} rows")
            return rows_VD, params_VP

        ordinals: list[int] = []
        block: list[Float32Array] = []
        for number, found in self._tars.read(np.array(list(images), np.int64), parse):
            ordinal, image_hash, _ = images[number]
            if isinstance(found, BadReinforcement):
                missing.append((ordinal, f"{self._source.name(number)}: {found}"))
                continue
            rows.set_image(ordinal, image_hash, found[1])
            ordinals.append(ordinal)
            block.append(found[0])
            if len(block) == BLOCK_SAMPLES:
                rows.set_embeddings(ordinals, np.stack(block))
                ordinals, block = [], []
        if block:
            rows.set_embeddings(ordinals, np.stack(block))
        return finish(rows, digest.hexdigest(), missing)

    def _seen_size(self, index: TarIndex, ordinal: int, members: Members) -> Size:
        """Return the width and height at which the teachers saw an image.

        Raises:
            BadImage: It is no image.
            BadReinforcement: They saw it turned, or its original size is not known.
        """
        size, turned = read_stored_size(members[str(index.samples[ordinal].image)])
        if turned:
            raise BadReinforcement("its EXIF turns the image, the teachers saw it as it is stored")
        if self._view_size == "image":
            return size
        fields, _ = read_fields(index, ordinal, members.__getitem__)
        return original_size(fields, size)


class ReinforcedCaptionFinder(KeyRowFinder):
    """Finds the rows of captions: by the key of the sample, and in it by the words of the caption."""

    def __init__(
        self,
        source: ReinforcedTars,
        indexes: Sequence[TarIndex],
        match: Match,
        captions: CaptionFormat,
        min_cosine: float | None = None,
    ) -> None:
        super().__init__(source, indexes, match, min_cosine)
        self._tars = source
        self._captions = captions

    def take(self, index: TarIndex, manifest: Manifest) -> JoinedTar:
        """Return the rows of a tar; a sample gets its rows if each of its captions has one."""
        rows = TextRowBuffer(index, manifest, self._min_cosine)
        row_n = self.find(index)
        self._source.used_N[row_n[row_n >= 0]] = True
        missing: list[tuple[int, str]] = []
        annotations: dict[int, tuple[int, Annotation]] = {}  # with the ordinal, by the number of what is found
        for ordinal, annotation in stream_annotations(index, self._captions):
            if not annotation.captions:
                members = index.samples[ordinal].members
                reason = describe_missing_captions(members, annotation.fields, annotation.notes)
                rows.reject(ordinal, RowStatus.NO_CAPTION, reason)
            elif row_n[ordinal] < 0:
                missing.append((ordinal, NO_KEY))
            else:
                annotations[int(row_n[ordinal])] = ordinal, annotation

        def parse(number: int, members: Members) -> CaptionRows:
            own = annotations[number][1].captions_by_source.get(TXT, ())
            embeddings = self._tars.text_rows(members)
            return rows_by_caption(members, embeddings, own[0] if len(own) == 1 else None)

        taken: CaptionRows = {}
        for number, found in self._tars.read(np.array(list(annotations), np.int64), parse):
            ordinal, annotation = annotations[number]
            why = str(found) if isinstance(found, BadReinforcement) else self._take_sample(annotation, found, taken)
            if why:
                missing.append((ordinal, f"{self._source.name(number)}: {why}"))
                continue
            rows.set_captions(ordinal, annotation.captions_by_source)
            rows.notes.update(annotation.notes)
        for start in range(0, len(rows.hashes), BLOCK_CAPTIONS):
            places = range(start, min(start + BLOCK_CAPTIONS, len(rows.hashes)))
            rows.set_embeddings(places, np.stack([taken[rows.hashes[place]] for place in places]))
        return finish(rows, "", missing)

    def _take_sample(self, annotation: Annotation, found: CaptionRows, taken: CaptionRows) -> str:
        """Add the rows of a sample to those of the tar, in the teacher's columns; or return why it has not all of them.

        Equal captions have equal embeddings, so another one shows that rows and captions are not in the same order.
        """
        own: CaptionRows = {}
        for caption in annotation.captions:
            hash_of_caption = caption_hash(caption)
            if hash_of_caption not in found:
                return f"{no_caption_row(caption)} (members {TXT} and {SYN})"
            row_1D = self._tars.of_teacher(found[hash_of_caption][None])
            before_D = taken.get(hash_of_caption)
            if before_D is not None and not _same(before_D[None], row_1D):
                return f"{no_caption_row(caption)} that is as in a sample before"
            own[hash_of_caption] = row_1D[0] if before_D is None else before_D
        taken.update(own)
        return ""


def _same(a_1D: Float32Array, b_1D: Float32Array) -> bool:
    finite = np.isfinite(a_1D).all() and np.isfinite(b_1D).all()
    return bool(finite) and bool(cosines(a_1D, b_1D)[0] >= MIN_REPEAT_COSINE)
