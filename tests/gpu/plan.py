"""The steps in their order, the most valuable first, with their limits."""

from tests.gpu.runner import Step

MACHINE = Step(
    "machine", 40, "the card, its driver, the host, versions; stops everything where something is missing", True
)

STEPS = [
    Step(
        "photographs", 120, "tars of photograph-sized images, a tokenizer, a small cache", background=True, timed=False
    ),
    Step("kernel_tiles", 110, "every kernel on odd tiles against float64, twice for equal bits", True, timed=False),
    Step("loss_errors", 60, "the loss and its gradients against float64", True, timed=False),
    Step("two_ranks", 60, "two NCCL ranks on the one card against float64", True, timed=False),
    Step("kernel_times", 45, "the GPU's time for each kernel, the host's time for each call"),
    Step("training_steps", 140, "a training step by precision and ZeRO stage, and where the host waits", True),
    Step("loss_times", 45, "the loss beside its peers: milliseconds and memory"),
    Step("memcheck", 70, "every kernel under compute-sanitizer's memcheck", True),
    Step("racecheck", 60, "the kernels with shared memory under racecheck", True),
    Step("cache_build", 85, "a cache by precision and number of processes, and recomputed", True),
    Step("interrupted_run", 100, "a run with SIGTERM, its resumption at another ZeRO stage, its evaluation", True),
    Step("compiled_steps", 100, "a training step under torch.compile"),
    Step("profiler", 60, "what bounds the kernels, by ncu"),
]
