"""Times of the GPU and of the host, apart: a kernel of 100 µs and a call of 100 µs look alike from outside."""

import math
import time
from collections.abc import Callable

import torch

Call = Callable[[], object]


def gpu_microseconds(call: Call, stream: torch.cuda.Stream, inside: int = 4, replays: int = 10) -> float:
    """Return the GPU's time of a call, by replays of a CUDA graph of it: the host has no part in that.

    Args:
        call: What is timed.
        stream: The stream that the call works on. It must not be the default one, which cannot be captured.
        inside: Calls in the graph.
        replays: Of the graph.
    """
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(inside):
            call()
    graph.replay()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(replays):
        graph.replay()
    stop.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(stop)) * 1e3 / (inside * replays)


def host_microseconds(call: Call, device: torch.device, calls: int = 200) -> float:
    """Return the host's time to enqueue a call; it must be one that the GPU finishes sooner."""
    for _ in range(20):
        call()
    wait(device)
    began = time.perf_counter()
    for _ in range(calls):
        call()
    taken = time.perf_counter() - began
    wait(device)
    return taken / calls * 1e6


def milliseconds(call: Call, device: torch.device) -> float:
    """Return the time of a call from its beginning to its end on the device; infinite where memory does not suffice."""
    wait(device)
    began = time.perf_counter()
    try:
        call()
        wait(device)
    except torch.cuda.OutOfMemoryError:
        return math.inf
    return (time.perf_counter() - began) * 1e3


def peak_gib(call: Call) -> float:
    """Return the memory that a call takes at its peak beyond what was there; infinite where it does not suffice."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    try:
        call()
    except torch.cuda.OutOfMemoryError:
        return math.inf
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def wait(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
