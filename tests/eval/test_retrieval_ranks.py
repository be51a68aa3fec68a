"""Ranks against brute force in float64, and recalls against FAISS and CLIP benchmarks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from threetowers.eval.metrics.recall import direction_metrics, evaluate_retrieval, hit_rate
from threetowers.eval.metrics.retrieval_ranks import NO_POSITIVE, TIE, RetrievalRanks, two_way_ranks
from threetowers.eval.search.index import build_index

Floats = NDArray[np.float32]
Groups = NDArray[np.int64]


def unit(vectors: NDArray[np.float64]) -> Floats:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def random_unit(rng: np.random.Generator, rows: int, width: int) -> Floats:
    return unit(rng.standard_normal((rows, width)))


def image_ranks(*sides: Any, chunk: int = 2048) -> RetrievalRanks:
    """Return the ranks of the first side's vectors among the second's."""
    return two_way_ranks(*sides, chunk=chunk)[0]


def brute_force(query: Floats, gallery: Floats, query_group: Groups, gallery_group: Groups) -> list[tuple[int, int]]:
    found = []
    for vector, group in zip(query.astype(np.float64), query_group, strict=True):
        scores = [float(vector @ other) for other in gallery.astype(np.float64)]
        positives = [s for s, g in zip(scores, gallery_group, strict=True) if g == group]
        others = [s for s, g in zip(scores, gallery_group, strict=True) if g != group]
        if not positives:
            found.append((NO_POSITIVE, NO_POSITIVE))
            continue
        best = max(positives)
        found.append((sum(s > best + TIE for s in others), sum(s >= best - TIE for s in others)))
    return found


@st.composite
def sides(draw: st.DrawFn) -> tuple[Floats, Floats, Groups, Groups]:
    """Vectors of small integers, scaled to length one: scores are either equal or far apart, and ties are common."""
    width = draw(st.integers(1, 5))
    row = st.lists(st.integers(-2, 2), min_size=width, max_size=width).filter(any)  # no zero vector
    query = draw(st.lists(row, min_size=1, max_size=11))
    gallery = draw(st.lists(row, min_size=1, max_size=13))
    groups = st.integers(-2, 3)
    query_group = draw(st.lists(groups, min_size=len(query), max_size=len(query)))
    gallery_group = draw(st.lists(groups, min_size=len(gallery), max_size=len(gallery)))
    return (
        unit(np.array(query, dtype=np.float64)),
        unit(np.array(gallery, dtype=np.float64)),
        np.array(query_group),
        np.array(gallery_group),
    )


@settings(deadline=None, max_examples=150)
@given(sides(), st.integers(1, 9))
def test_ranks_equal_brute_force_both_ways(side: tuple[Floats, Floats, Groups, Groups], chunk: int) -> None:
    query, gallery, query_group, gallery_group = side
    forward, backward = two_way_ranks(query, gallery, query_group, gallery_group, chunk=chunk)
    expected = brute_force(query, gallery, query_group, gallery_group)
    assert list(zip(forward.optimistic_N, forward.pessimistic_N, strict=True)) == expected
    expected = brute_force(gallery, query, gallery_group, query_group)
    assert list(zip(backward.optimistic_N, backward.pessimistic_N, strict=True)) == expected
    assert forward.positives_N.tolist() == [int((gallery_group == group).sum()) for group in query_group]


def test_ranks_equal_brute_force_on_dense_vectors() -> None:
    rng = np.random.default_rng(0)
    gallery_group = rng.integers(0, 30, 83)
    query_group = rng.integers(0, 33, 57)  # some match nothing
    query, gallery = random_unit(rng, 57, 19), random_unit(rng, 83, 19)
    gallery[7] = gallery[40]
    found = image_ranks(query, gallery, query_group, gallery_group, chunk=16)
    expected = brute_force(query, gallery, query_group, gallery_group)
    assert list(zip(found.optimistic_N, found.pessimistic_N, strict=True)) == expected
    assert (found.pessimistic_N == NO_POSITIVE).sum() > 0


@pytest.mark.parametrize("chunk", [1, 7, 64, 101, 5000])
def test_ranks_do_not_depend_on_chunk_or_gallery_order(chunk: int) -> None:
    rng = np.random.default_rng(1)
    query, gallery = random_unit(rng, 101, 33), random_unit(rng, 211, 33)
    gallery[100:150] = gallery[:50]  # exact copies in other groups
    query_group, gallery_group = rng.integers(0, 60, 101), rng.integers(0, 60, 211)
    reference = image_ranks(query, gallery, query_group, gallery_group)
    order = rng.permutation(211)
    found = image_ranks(query, gallery[order], query_group, gallery_group[order], chunk=chunk)
    assert np.array_equal(found.optimistic_N, reference.optimistic_N)
    assert np.array_equal(found.pessimistic_N, reference.pessimistic_N)
    assert (reference.optimistic_N < reference.pessimistic_N).any()


@pytest.mark.parametrize("width", [1, 3, 511])
def test_equal_embeddings_have_no_recall(width: int) -> None:
    one = random_unit(np.random.default_rng(2), 1, width)
    result = evaluate_retrieval(
        np.repeat(one, 37, axis=0), np.repeat(one, 185, axis=0), np.arange(37), np.arange(185) // 5, chunk=16
    )
    for direction in (result.image_to_text, result.text_to_image):
        assert list(direction.recall.values()) == [0.0, 0.0, 0.0]
        assert list(direction.recall_optimistic.values()) == [1.0, 1.0, 1.0]
        assert direction.tied == direction.queries


def clip_benchmark_recalls(image: Floats, text: Floats, owner: Groups, k: int) -> tuple[float, float]:
    """Image→text and text→image recall@k as CLIP benchmarks compute them: one-hot of the top k times the positives."""
    scores = torch.from_numpy(text) @ torch.from_numpy(image).T
    positive = torch.zeros(scores.shape, dtype=torch.bool)
    positive[torch.arange(len(text)), torch.from_numpy(owner)] = True

    def recall(scores: torch.Tensor, positive: torch.Tensor) -> float:
        top = torch.nn.functional.one_hot(scores.topk(k, dim=1).indices, num_classes=scores.shape[1])
        return float(((top * positive[:, None, :]).sum(dim=(1, 2)) > 0).float().mean())

    return recall(scores.T, positive.T), recall(scores, positive)


def published(image: Floats, text: Floats, owner: Groups, k: int) -> tuple[float, float]:
    """The same by the package's own functions, called as its `evaluate` calls them."""
    peer = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")
    scores = torch.from_numpy(text) @ torch.from_numpy(image).T
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(text)), torch.from_numpy(owner)] = True

    def recall(scores: torch.Tensor, positive: torch.Tensor) -> float:
        return float((peer.batchify(peer.recall_at_k, scores, positive, 7, "cpu", k=k) > 0).float().mean())

    return recall(scores.T, positive.T), recall(scores, positive)


def test_recalls_equal_clip_benchmark_and_faiss_where_nothing_ties() -> None:
    rng = np.random.default_rng(3)
    owner = np.concatenate([np.repeat(np.arange(83), 3), [0, 1, 2, 5, 5]])
    image = random_unit(rng, 83, 24)
    text = unit(image[owner] + 0.4 * rng.standard_normal((len(owner), 24)))
    groups = np.arange(83)
    result = evaluate_retrieval(image, text, groups, owner, chunk=50)
    assert result.image_to_text.tied == result.text_to_image.tied == 0
    for k in (1, 5, 10):
        image_to_text, text_to_image = clip_benchmark_recalls(image, text, owner, k)
        assert result.image_to_text.recall[k] == pytest.approx(image_to_text, abs=1e-6)
        assert result.text_to_image.recall[k] == pytest.approx(text_to_image, abs=1e-6)
        assert 0 < result.text_to_image.recall[k] < 1
        assert (image_to_text, text_to_image) == pytest.approx(published(image, text, owner, k), abs=1e-6)
    found = build_index(text, device="cpu").search(image, 10).ids_NK
    assert hit_rate(found, groups, owner) == pytest.approx(result.image_to_text.recall)
    found = build_index(image, device="cpu").search(text, 10).ids_NK
    assert hit_rate(found, owner, groups) == pytest.approx(result.text_to_image.recall)


def test_memory_mapped_embeddings_have_the_same_ranks(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    image, text = random_unit(rng, 53, 16), random_unit(rng, 131, 16)
    owner = rng.integers(53, size=131)
    expected = evaluate_retrieval(image, text, np.arange(53), owner)
    for name, dtype in (("float32", np.float32), ("float16", np.float16)):
        np.save(tmp_path / f"image-{name}.npy", image.astype(dtype))
        np.save(tmp_path / f"text-{name}.npy", text.astype(dtype))
        mapped = [np.load(tmp_path / f"{side}-{name}.npy", mmap_mode="r") for side in ("image", "text")]
        found = evaluate_retrieval(*mapped, np.arange(53), owner, chunk=17)
        same = evaluate_retrieval(*(np.asarray(x, np.float32) for x in mapped), np.arange(53), owner, chunk=17)
        assert found == same
        if dtype is np.float32:
            assert found == expected


def test_no_one_or_many_captions_an_image() -> None:
    rng = np.random.default_rng(4)
    image = random_unit(rng, 5, 8)
    text = image[[0, 1, 1, 1, 3]]
    text_group = np.array([0, 1, 1, 1, 9])  # the last caption belongs to no image, images 2, 3 and 4 have none
    result = evaluate_retrieval(image, text, np.arange(5), text_group)
    assert (result.image_to_text.queries, result.image_to_text.excluded) == (2, 3)
    assert (result.text_to_image.queries, result.text_to_image.excluded) == (4, 1)
    assert result.image_to_text.recall[1] == result.text_to_image.recall[1] == 1.0
    assert (result.images, result.captions, result.groups) == (5, 5, 6)


def test_any_image_of_a_group_is_a_match() -> None:
    image = unit(np.array([[1.0, 0.0], [0.0, 1.0], [0.7, 0.8]]))
    text = unit(np.array([[0.1, 1.0]]))
    found = image_ranks(text, image, np.array([7]), np.array([7, 7, 8]))
    assert found.pessimistic_N.tolist() == [0]  # the other image of the group is far away, and does not matter
    assert found.positives_N.tolist() == [2]


def test_lower_precision_set_by_the_process_does_not_reach_the_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    image, groups = random_unit(rng, 300, 64), np.arange(300)
    text = unit(image + 0.15 * rng.standard_normal((300, 64)))
    reference = image_ranks(image, text, groups, groups)
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before, during, product = [backend.fp32_precision for backend in backends], set(), torch.mm

    def watched(*args: Any, **options: Any) -> torch.Tensor:
        during.update(backend.fp32_precision for backend in backends)
        return product(*args, **options)

    monkeypatch.setattr(torch, "mm", watched)
    try:
        for backend in backends:
            backend.fp32_precision = "tf32"
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = image_ranks(image, text, groups, groups)
        assert [backend.fp32_precision for backend in backends] == ["tf32", "tf32"]  # the process keeps its setting
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
    assert during == {"ieee"}
    assert np.array_equal(found.optimistic_N, reference.optimistic_N)
    assert np.array_equal(found.pessimistic_N, reference.pessimistic_N)


def test_tensors_memory_maps_and_half_precision_are_taken() -> None:
    rng = np.random.default_rng(6)
    image, groups = random_unit(rng, 21, 8), np.arange(21)
    reference = image_ranks(image, image, groups, groups)
    frozen = image.copy()
    frozen.flags.writeable = False
    for vectors in (torch.from_numpy(image).requires_grad_(), frozen, np.asfortranarray(image), image.astype("f8")):
        found = image_ranks(vectors, vectors, torch.from_numpy(groups), groups.astype(np.int32))
        assert np.array_equal(found.pessimistic_N, reference.pessimistic_N)
    half = torch.from_numpy(image).bfloat16()
    assert direction_metrics(image_ranks(half, half, groups, groups)).recall[1] == 1.0


def test_bad_input_is_refused_by_name() -> None:
    good, groups = random_unit(np.random.default_rng(7), 6, 4), np.arange(6)
    bad = good.copy()
    bad[2, 1] = np.nan
    with pytest.raises(ValueError, match=r"1 of 6 text embeddings are not unit-norm and finite; the first is row 2"):
        image_ranks(good, bad, groups, groups)
    with pytest.raises(ValueError, match="6 of 6 image embeddings are not unit-norm"):
        image_ranks(2 * good, good, groups, groups)
    with pytest.raises(ValueError, match="widths 4 and 3"):
        image_ranks(good, unit(good[:, :3].astype(np.float64)), groups, groups)
    with pytest.raises(ValueError, match="5 image groups for 6"):
        image_ranks(good, good, groups[:5], groups)
    with pytest.raises(ValueError, match="one integer per vector, got shape \\(6,\\) of float64"):
        image_ranks(good, good, groups.astype(float), groups)
    with pytest.raises(ValueError, match="non-empty matrix"):
        image_ranks(good[:0], good, groups[:0], groups)
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        image_ranks(good, good, groups, groups, chunk=0)
    with pytest.raises(ValueError, match="none of 6 queries has a match among 6"):
        evaluate_retrieval(good, good, groups, groups + 100)
