"""Processes that decode images, so that the one that embeds them spends no time under the interpreter's lock on it.

A thread here drives each process: it sends the bytes of an image, sleeps, and takes the pixels out of memory that both
share. A process ends when its connection does, so also with a parent that was killed.
"""

import contextlib
import math
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Self

import numpy as np

from threetowers.cache.builder.decoding import Decoded, Decoder, PixelFormat
from threetowers.cache.format.views import Params, Pixels
from threetowers.cache.processes.preemption import ignore_sigterm
from threetowers.cache.processes.worker_processes import server_context, without_main_module
from threetowers.cache.webdataset.images import BadImage


class DecodeThreads:
    """Decodes in threads of this process: enough beside a CPU's forward passes, as Pillow releases the lock."""

    def __init__(self, decoder: Decoder, threads: int) -> None:
        self._decoder = decoder
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Cancel what was not begun, without waiting."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def submit(self, formats: Sequence[int], key: str, data: bytes) -> Future[Decoded]:
        """Have an image file decoded, as `Decoder` does."""
        return self._pool.submit(self._decoder, formats, key, data)


class DecodeWorkers(DecodeThreads):
    """Decodes in processes, each with a thread of this process that waits for it."""

    def __init__(self, decoder: Decoder, workers: int) -> None:
        super().__init__(decoder, workers)
        context = server_context()  # a fork of this process would share CUDA and its threads
        with without_main_module():
            self._workers = [_Worker(context, decoder) for _ in range(workers)]
        self._idle = list(self._workers)
        self._lock = threading.Lock()

    def __exit__(self, *error: object) -> None:
        """End the processes at once: they own nothing."""
        super().__exit__(*error)
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()

    def submit(self, formats: Sequence[int], key: str, data: bytes) -> Future[Decoded]:
        """Have an image file decoded, as `Decoder` does.

        The result raises RuntimeError where the process has ended.
        """
        return self._pool.submit(self._decode, formats, key, data)

    def _decode(self, formats: Sequence[int], key: str, data: bytes) -> Decoded:
        with self._lock:
            worker = self._idle.pop()  # there are as many processes as threads
        try:
            return worker.decode(formats, key, data)
        finally:
            with self._lock:
                self._idle.append(worker)


class _Worker:
    """A process, the connection to it, and the memory in which it leaves pixels."""

    def __init__(self, context: Any, decoder: Decoder) -> None:
        memory = context.RawArray("B", sum(math.prod(form.shape) for form in decoder.formats))
        self._pixels = _slots(memory, decoder.formats)
        self._connection, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=_serve, args=(theirs, memory, decoder), daemon=True)
        self.process.start()
        theirs.close()  # so that the end of the process ends the connection

    def decode(self, formats: Sequence[int], key: str, data: bytes) -> Decoded:
        try:
            self._connection.send((formats, key, data))
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            self.process.join(1)
            raise RuntimeError(
                f"a process that decodes images ended with exit code {self.process.exitcode}: if it was killed for "
                "want of memory, use fewer (--workers)"
            ) from error
        if isinstance(answer, Exception):
            raise answer
        decoded: Decoded = answer[0]
        params: dict[int, Params] | None = answer[1]
        if params is None:
            return decoded
        return replace(decoded, views={i: (self._pixels[i].copy(), params[i]) for i in formats})


def _slots(memory: Any, formats: Sequence[PixelFormat]) -> list[Pixels]:
    """Return the part of the shared memory that holds the pixels (V, 3, H, W) of each format."""
    flat = np.frombuffer(memory, np.uint8)
    ends = np.cumsum([math.prod(form.shape) for form in formats])
    parts = np.split(flat, ends[:-1])
    return [part.reshape(form.shape) for part, form in zip(parts, formats, strict=True)]


def _serve(connection: Connection, memory: Any, decoder: Decoder) -> None:
    """Decode what comes until the connection ends; signals to all processes of a job are the parent's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ignore_sigterm()
    slots = _slots(memory, decoder.formats)
    with contextlib.suppress(EOFError, ConnectionError):  # the parent's end, or that of one that was killed
        while True:
            formats, key, data = connection.recv()
            connection.send(_decoded_into(slots, decoder, formats, key, data))


def _decoded_into(slots: Sequence[Pixels], decoder: Decoder, formats: Sequence[int], key: str, data: bytes) -> Any:
    """Leave the pixels in the slots; return the rest and the parameters of the views, or what went wrong instead."""
    try:
        decoded = decoder(formats, key, data)
    except Exception as error:  # a fault of the program, or memory that is short: the parent's to raise
        return error
    if isinstance(decoded.views, BadImage):
        return decoded, None
    for i, (pixels, _) in decoded.views.items():
        slots[i][...] = pixels
    return replace(decoded, views={}), {i: params for i, (_, params) in decoded.views.items()}
