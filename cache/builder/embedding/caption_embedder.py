"""Embedding captions: the different ones of a tar, sorted by length, in batches that several outputs share.

Batches have a number of captions, as those of images have a number of images: one flag, one bound on memory (that of
the longest captions), and the same rows whatever the lengths of others. Sorted, a batch is padded from its shortest to
its longest caption, and these steps add up to no more than the longest caption of the tar: its padding is at most one
batch of that. Batches never cross tars, so that the rows of a tar do not depend on what else is built beside it.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

from threetowers.cache.builder.embedding.tar_captions import TarCaptions
from threetowers.cache.builder.output_cache import OutputCache
from threetowers.cache.encoders.encoder import TextEncoder
from threetowers.cache.encoders.forward_queue import CaptionQueue, RunningBatch
from threetowers.cache.encoders.tokenizers.tokenizer import Tokens
from threetowers.cache.format.text_row_buffer import TextRowBuffer
from threetowers.cache.processes.stage_timer import StageTimer

TOKENIZED_AT_ONCE = 1024  # captions


@dataclass(frozen=True, eq=False)
class _CaptionPass:
    """The forward passes that several outputs share, as those of images are shared.

    Attributes:
        encoder: of the outputs.
        outputs: the number of its feature, by the number of each output.
        batch_size: captions of a pass.
        queue: runs the passes.
    """

    encoder: TextEncoder
    outputs: Mapping[int, int]
    batch_size: int
    queue: CaptionQueue


@dataclass(frozen=True, eq=False)
class TokenizedCaptions:
    """The captions of a tar, and their tokens for each forward pass, as these become known."""

    captions: TarCaptions
    tokens: Mapping[int, Sequence[Future[list[Tokens]]]]


class CaptionEmbedder:
    """Embeds the captions of tars for all outputs of text. A context: its thread ends with it.

    There is one thread that makes tokens, beside the one that embeds: fast tokenizers use several of their own, and
    those in Python would wait for each other.
    """

    def __init__(self, outputs: Mapping[int, OutputCache], batch_size: int | None, timer: StageTimer) -> None:
        """Find out what the outputs share.

        Args:
            outputs: the caches of text, by their numbers.
            batch_size: captions of a forward pass; None: as each cache was begun with.
            timer: told of the forward passes, and of waiting for tokens.
        """
        self._timer = timer
        shared: dict[tuple[object, ...], list[int]] = defaultdict(list)
        for i, output in outputs.items():
            text = output.teacher.side("text")
            shared[id(text.model), text.precision].append(i)
        self._passes = [_caption_pass({i: outputs[i] for i in members}, batch_size) for members in shared.values()]
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tokenize")

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Cancel what was not begun, without waiting."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def batch_size(self, output: int) -> int:
        """Return how many captions of an output go through its encoder at a time."""
        return next(each.batch_size for each in self._passes if output in each.outputs)

    def tokenize(self, captions: TarCaptions, outputs: Collection[int]) -> TokenizedCaptions:
        """Have the captions of a tar made tokens, for those outputs that lack it."""
        different = captions.different
        parts = [different[i : i + TOKENIZED_AT_ONCE] for i in range(0, len(different), TOKENIZED_AT_ONCE)]
        tokens = {}
        for number, each in enumerate(self._passes):
            if each.outputs.keys() & outputs:
                tokens[number] = [self._pool.submit(each.encoder.tokenize, part) for part in parts]
        return TokenizedCaptions(captions, tokens)

    def embed(self, tar: TokenizedCaptions, buffers: Mapping[int, TextRowBuffer]) -> Iterator[float]:
        """Embed the captions of a tar into the rows of the outputs that lack it; yield the share that is done."""
        for rows in buffers.values():
            tar.captions.fill(rows)
        for done, (number, futures) in enumerate(tar.tokens.items()):
            each = self._passes[number]
            members = {i: rows for i, rows in buffers.items() if i in each.outputs}
            with self._timer("tokenize"):
                tokens = [one for future in futures for one in future.result()]
            self._note_cut(tar.captions, tokens, each, members)
            embedded = 0
            for size in self._embed(tokens, each, members):
                embedded += size
                yield (done + embedded / len(tokens)) / len(tar.tokens)

    def _embed(
        self, tokens: Sequence[Tokens], shared: _CaptionPass, buffers: Mapping[int, TextRowBuffer]
    ) -> Iterator[int]:
        """Embed captions by one encoder; yield the size of each batch as it is stored."""
        running: tuple[list[int], RunningBatch] | None = None
        for places in [*length_sorted_batches(tokens, shared.batch_size), None]:
            started = None
            if places is not None:
                with self._timer("forward"):
                    started = places, shared.queue.start([tokens[place] for place in places])
            if running is not None:  # store the rows of one batch while the next one is computed
                stored, batch = running
                with self._timer("forward"):
                    features = batch.result()
                    for output, rows in buffers.items():
                        rows.set_embeddings(stored, features[shared.outputs[output]][:, 0])
                yield len(stored)
            running = started

    def _note_cut(
        self,
        captions: TarCaptions,
        tokens: Sequence[Tokens],
        shared: _CaptionPass,
        buffers: Mapping[int, TextRowBuffer],
    ) -> None:
        """Note the samples of which a caption is longer than the encoder takes."""
        cut = {place for place, each in enumerate(tokens) if each.cut}
        if cut:
            note = f"a caption cut to {shared.encoder.processing.max_length} tokens"
            for rows in buffers.values():
                rows.notes[note] += captions.samples_with(cut)


def length_sorted_batches(tokens: Sequence[Tokens], batch_size: int) -> list[list[int]]:
    """Return the places of captions in batches, the longest captions first: if memory is short, it is at once."""
    order = sorted(range(len(tokens)), key=lambda place: -len(tokens[place].ids))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def _caption_pass(outputs: Mapping[int, OutputCache], batch_size: int | None) -> _CaptionPass:
    """Return the forward passes that these outputs share."""
    text = next(iter(outputs.values())).teacher.side("text")
    features = tuple(dict.fromkeys(output.manifest.feature for output in outputs.values()))
    size = batch_size or max(output.manifest.batch_size for output in outputs.values())
    numbers = {i: features.index(output.manifest.feature) for i, output in outputs.items()}
    return _CaptionPass(text, numbers, size, CaptionQueue(text, features, size))
