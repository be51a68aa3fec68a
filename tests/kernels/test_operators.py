"""The registered operators: torch's requirements, what is saved for backward, and the number of passes."""

import contextlib
import mmap
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from threetowers.kernels import Pair, contrastive_loss, contrastive_losses, reference_contrastive_loss
from threetowers.kernels.operator import operators
from threetowers.kernels.tiles.torch_tiles import TorchTiles

KINDS = ["softmax", "sigmoid"]


def batch(total: int = 100, width: int = 16, **options: Any) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    x_BD = torch.randn(total, width, generator=g)
    y_BD = x_BD + torch.randn(total, width, generator=g)
    return [(part / width**0.5).to(**options).requires_grad_() for part in (x_BD, y_BD)]


def scalars(kind: str) -> list[Tensor]:
    values = [2.0, -3.0] if kind == "sigmoid" else [2.0]
    return [torch.tensor([value], requires_grad=True) for value in values]


def teachers(total: int, count: int, kind: str) -> tuple[list[Any], ...]:
    """Return what the operator takes of so many teachers of the second of two pairs."""
    g = torch.Generator().manual_seed(1)
    sides = [[torch.randn(total, 3 + k, generator=g) / 2 for k in range(count)] for _ in range(2)]
    scales = [torch.tensor([0.5]) for _ in range(count)]
    return *sides, scales, scales if kind == "sigmoid" else [], [0, count], [0.4] * count


def loss_of(x: Tensor, y: Tensor, log_scale: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    return contrastive_loss(x, y, log_scale, bias=bias, kind="softmax" if bias is None else "sigmoid", **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cache_bytes", [0, 2000])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own reading
@pytest.mark.parametrize("num_teachers", [0, 2])
def test_opcheck(kind: str, cache_bytes: int, num_teachers: int) -> None:
    x_BD, y_BD = batch(20)
    z_BD, w_BD = batch(20, 8)
    (log_scale, *bias), (other_scale, *other_bias) = scalars(kind), scalars(kind)
    sides = [x_BD, z_BD], [y_BD, w_BD.detach()]
    needs = [True, True], [True, False], [True, True]
    args = (
        *sides,
        [log_scale, other_scale],
        bias + other_bias,
        *teachers(20, num_teachers, kind),
        *[[None, None]] * 2,
        torch.arange(20) // 2,
        None,
        kind,
        cache_bytes,
        False,
        *needs,
        [False, True],
        True,
    )
    torch.library.opcheck(operators.contrastive_forward, args)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_teachers", [0, 1])
def test_opcheck_of_backward(kind: str, num_teachers: int) -> None:
    """Schema and shapes, also with a logit cache. Its autograd formula refuses by design, so opcheck cannot run it."""
    x_BD, y_BD = (part.detach() for part in batch(20))
    scales = [part.detach() for part in scalars(kind)]
    needs = [True], [False], [True]
    options = [None], [None], None, None, kind, 2000, False, *needs, [False], True
    u, v, *rest, shares = teachers(20, num_teachers, kind)
    rest[-1] = [num_teachers]
    saved = operators.contrastive_forward([x_BD], [y_BD], scales[:1], scales[1:], u, v, *rest, shares, *options)
    args = [torch.ones_like(saved[0])], [x_BD], [y_BD], u, v, [None], saved, rest[-1], shares, kind, False, *needs
    torch.library.opcheck(operators.contrastive_backward, args, test_utils=["test_schema", "test_faketensor"])


@pytest.mark.parametrize("kind", KINDS)
def test_compiles(kind: str) -> None:
    def step(*leaves: Tensor) -> Tensor:
        return 2 * loss_of(*leaves, group_ids=torch.arange(len(leaves[0])) // 2)

    eager, compiled = (batch(40) + scalars(kind) for _ in range(2))
    step(*eager).backward()
    torch.compile(step, backend="aot_eager", fullgraph=True)(*compiled).backward()
    for a, b in zip(eager, compiled, strict=True):
        assert torch.equal(a.grad, b.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_fake_tensors_of_any_size(kind: str) -> None:
    """Shapes alone, with more elements than int32 counts: nothing is computed."""
    with FakeTensorMode():
        x_BD, y_BD = (torch.empty(3_000_001, 768, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        leaves = [x_BD, y_BD, *(torch.empty(1, requires_grad=True) for _ in scalars(kind))]
        loss = loss_of(*leaves)
        assert (loss.shape, loss.dtype) == ((), torch.float32)
        grads = torch.autograd.grad(loss, leaves)
        assert [(g.shape, g.dtype) for g in grads] == [(leaf.shape, leaf.dtype) for leaf in leaves]


@pytest.mark.parametrize("cache_bytes", [5_000_000, 100_000_000])
def test_fake_tensors_have_the_size_of_the_logit_cache(cache_bytes: int) -> None:
    """As many elements as the operator allocates, whether the cache ends within a pair or holds all tiles."""

    def shapes(fake: bool) -> list[torch.Size]:
        with FakeTensorMode() if fake else contextlib.nullcontext():
            x_BD, y_BD, z_BD = (torch.ones(1500, 4) for _ in range(3))
            sides, scales = ([x_BD, y_BD], [y_BD, z_BD]), [torch.zeros(1), torch.zeros(1)]
            needs = [True, False], [False, False], [False, True]
            options = [None] * 2, [None] * 2, None, None, "softmax", cache_bytes, False, *needs, [False, False], True
            taught = [x_BD], [y_BD], scales[:1], [], [0, 1], [1.0]
            flat = operators.contrastive_forward(*sides, scales, [], *taught, *options)
            return [part.shape for part in flat]

    assert shapes(fake=True) == shapes(fake=False)


def test_compiles_with_a_logit_cache_and_a_dynamic_batch() -> None:
    def step(*leaves: Tensor) -> Tensor:
        return loss_of(*leaves, logit_cache_bytes=1_000_000)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    for total in (40, 52):
        eager, leaves = (batch(total) + scalars("softmax") for _ in range(2))
        step(*eager).backward()
        compiled(*leaves).backward()
        for a, b in zip(eager, leaves, strict=True):
            assert torch.equal(a.grad, b.grad)  # type: ignore[arg-type]


def test_fake_mode_refuses_sizes_it_cannot_express() -> None:
    symbols = ShapeEnv(allow_dynamic_output_shape_ops=False)
    x_BD = batch(40)[0].detach()
    with FakeTensorMode(shape_env=symbols) as fake:
        dynamic = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.STATIC])
        x_BD = fake.from_tensor(x_BD, symbolic_context=dynamic).requires_grad_()
        with pytest.raises(RuntimeError, match="known only when it runs, which this fake mode cannot express"):
            contrastive_loss(x_BD, 2 * x_BD, torch.zeros(1), logit_cache_bytes=10**6)


@pytest.mark.parametrize("kind", KINDS)
def test_deterministic_retained_and_scaled(kind: str) -> None:
    leaves = batch() + scalars(kind)
    loss = loss_of(*leaves, logit_cache_bytes=20_000)
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves, retain_graph=True)
    fresh = torch.autograd.grad(loss_of(*leaves), leaves)
    tripled = torch.autograd.grad(4 * loss, leaves)
    for a, b, c, d in zip(once, again, fresh, tripled, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
        torch.testing.assert_close(4 * a, d)
    assert torch.equal(loss, loss_of(*leaves))


def test_sigmoid_backward_reuses_the_memory_of_forward() -> None:
    """Without retain_graph backward returns the memory that forward filled; with it, forward's results stay as they
    are.
    """
    leaves, saved = batch() + scalars("sigmoid"), []

    def pack(part: Tensor) -> Tensor:
        saved.append(part)
        return part

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda part: part):
        loss = loss_of(*leaves)
    kept = [part.clone() for part in saved]
    once = torch.autograd.grad(3 * loss, leaves[:2], retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(saved, kept, strict=True))
    again = torch.autograd.grad(3 * loss, leaves[:2])
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    addresses = {part.data_ptr() for part in saved}
    assert not addresses & {part.data_ptr() for part in once}
    assert addresses >= {part.data_ptr() for part in again}


def test_an_unused_loss_costs_nothing_and_has_no_gradient() -> None:
    (x_BD, y_BD), (z_BD, w_BD) = batch(), batch(50, 8)
    scale, other = torch.tensor([1.0], requires_grad=True), torch.tensor([1.0], requires_grad=True)
    results = contrastive_losses([Pair(z_BD, w_BD, other), Pair(x_BD, y_BD, scale)])
    results[1].loss.backward()
    assert z_BD.grad is None
    assert other.grad is None
    alone = [leaf.detach().requires_grad_() for leaf in (x_BD, y_BD, scale)]
    contrastive_loss(*alone).backward()  # type: ignore[arg-type]
    for a, b in zip((x_BD, y_BD, scale), alone, strict=True):
        assert torch.equal(a.grad, b.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_are_refused(kind: str) -> None:
    leaves = batch() + scalars(kind)
    grad = torch.autograd.grad(loss_of(*leaves), leaves[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_leaves_logits_alone(kind: str) -> None:
    leaves = batch() + scalars(kind)
    truth = torch.autograd.grad(loss_of(*leaves), leaves)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(*leaves)
        found = torch.autograd.grad(loss, leaves)
    assert loss.dtype == torch.float32
    for a, b in zip(found, truth, strict=True):
        assert torch.equal(a, b)


def test_strided_features() -> None:
    x_BD, y_BD = batch()
    log_scale = torch.tensor([2.0])
    wide = torch.cat([x_BD, y_BD], 1).detach()
    found = contrastive_loss(wide[:, :16], wide[:, 16:], log_scale)
    assert torch.equal(found, contrastive_loss(x_BD, y_BD, log_scale).detach())
    turned = y_BD.detach().T.contiguous().T
    torch.testing.assert_close(contrastive_loss(x_BD.detach(), turned, log_scale), found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_further_apart_than_int32_counts(kind: str, dtype: torch.dtype) -> None:
    """Rows 2^29 elements from one another, in memory of which only the touched pages exist: the same bits as side by
    side.
    """
    apart = 2**29
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    near, far = batch(9, 8, dtype=dtype), []
    for part in near:
        memory = torch.frombuffer(mmap.mmap(-1, 9 * apart * dtype.itemsize, flags=flags), dtype=dtype)
        far.append(memory.as_strided((9, 8), (apart, 1)).copy_(part.detach()).requires_grad_())
    results = []
    for sides in (near, far):
        leaves = [*sides, *scalars(kind)]
        loss = loss_of(*leaves)
        grads = torch.autograd.grad(loss, leaves)
        results.append([loss, *grads])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def saved_bytes(total: int, kind: str, cache_bytes: int) -> int:
    """Return how many bytes autograd holds between forward and backward."""
    sizes: list[int] = []

    def pack(part: Tensor) -> Tensor:
        sizes.append(part.nbytes)
        return part

    leaves = batch(total) + scalars(kind)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda part: part):
        loss_of(*leaves, logit_cache_bytes=cache_bytes)
    return sum(sizes)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_memory_is_linear_in_the_batch(kind: str) -> None:
    saved = [saved_bytes(total, kind, 0) for total in (512, 1024, 2048)]
    assert saved[1] <= 2 * saved[0]
    assert saved[2] <= 4 * saved[0]
    cached = saved_bytes(512, kind, 2_000_000) - saved[0]
    assert cached == (4 * 512 * 512 if kind == "softmax" else 0)  # complete tiles only


def counting_backend(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Count the multiply-adds of each product, in D: B B of them are a pass."""
    passes: dict[str, float] = {"dots": 0, "rows": 0, "cols": 0}

    class Counting(TorchTiles):
        def dots(self, x_rD: Tensor, y_cD: Tensor, out_rc: Tensor | None = None) -> Tensor:
            passes["dots"] += len(x_rD) * len(y_cD)
            return super().dots(x_rD, y_cD, out_rc)

        def add_rows(self, dx_rD: Tensor, grad_rc: Tensor, y_cD: Tensor) -> None:
            passes["rows"] += grad_rc.numel()
            super().add_rows(dx_rD, grad_rc, y_cD)

        def add_cols(self, dy_cD: Tensor, grad_rc: Tensor, x_rD: Tensor) -> None:
            passes["cols"] += grad_rc.numel()
            super().add_cols(dy_cD, grad_rc, x_rD)

    monkeypatch.setattr(operators, "backend_for", lambda x: Counting(torch.float32, 64, 64))
    return passes


@pytest.mark.parametrize(
    ("kind", "options", "frozen", "expected"),
    [
        ("softmax", {}, "", 4),
        ("softmax", {"logit_cache_bytes": 4 * 256 * 256}, "", 3),
        ("softmax", {"logit_cache_bytes": 4 * 256 * 128}, "", 3.5),
        ("softmax", {}, "x", 3),
        ("softmax", {}, "y", 3),
        ("softmax", {}, "xy", 3),  # the scale's gradient alone needs one product
        ("sigmoid", {}, "", 3),
        ("sigmoid", {}, "x", 2),
    ],
)
def test_number_of_passes(
    monkeypatch: pytest.MonkeyPatch, kind: str, options: Any, frozen: str, expected: float
) -> None:
    passes = counting_backend(monkeypatch)
    x_BD, y_BD = batch(256)
    x_BD.requires_grad_("x" not in frozen)
    y_BD.requires_grad_("y" not in frozen)
    loss_of(x_BD, y_BD, *scalars(kind), **options).backward()
    assert sum(passes.values()) / 256**2 == expected
    passes.update(dots=0, rows=0, cols=0)
    with torch.no_grad():
        loss_of(x_BD, y_BD, *scalars(kind), **options)
    assert sum(passes.values()) / 256**2 == 1


@pytest.mark.parametrize(("cached", "small", "large"), [(0, 0, 2), (5, 8, 1), (7, 8, 1), (16, 16, 0)])
def test_forward_tiles_may_be_larger_than_gradient_tiles(
    monkeypatch: pytest.MonkeyPatch, cached: int, small: int, large: int
) -> None:
    """Strips of gradient tiles with any tile in the logit cache are cut as those; the rest is not."""
    shapes: list[tuple[int, int, bool]] = []

    class Decoupled(TorchTiles):
        stats_rows = property(lambda self: 64)  # type: ignore[assignment]
        stats_cols = property(lambda self: 128)  # type: ignore[assignment]

        def stats(self, x_rD: Tensor, y_cD: Tensor, *rest: Any) -> None:
            shapes.append((len(x_rD), len(y_cD), rest[-1] is not None))
            super().stats(x_rD, y_cD, *rest)

    monkeypatch.setattr(operators, "backend_for", lambda x: Decoupled(torch.float32, 32, 32))
    leaves = batch(128) + scalars("softmax")
    found = torch.autograd.grad(loss_of(*leaves, logit_cache_bytes=4 * 32 * 32 * cached), leaves)
    expected = [(32, 32, True)] * cached + [(32, 32, False)] * (small - cached) + [(64, 128, False)] * large
    assert shapes == expected
    references = [leaf.detach().double().requires_grad_() for leaf in leaves]
    truth = torch.autograd.grad(reference_contrastive_loss(*references), references)  # type: ignore[arg-type]
    for a, b in zip(found, truth, strict=True):
        assert (a.double() - b).norm() <= 1e-5 * b.norm()


def test_chunked_features_of_a_tower_with_dropout() -> None:
    """The recipe for batches whose activations do not fit: features without a graph, their gradients from the loss,
    then each chunk again with the same dropout and its gradient fed in. Equal to one backward through everything.
    """
    torch.manual_seed(0)
    tower = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Dropout(0.3), torch.nn.Linear(32, 16))
    x_BD, y_BD = (part.detach() for part in batch(64))
    log_scale = torch.tensor([2.0], requires_grad=True)
    chunks = x_BD.split(16)

    def forward(k: int) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(k)
            return tower(chunks[k])  # type: ignore[no-any-return]

    contrastive_loss(torch.cat([forward(k) for k in range(4)]), y_BD, log_scale).backward()
    truth = [leaf.grad.clone() for leaf in (*tower.parameters(), log_scale)]
    tower.zero_grad()
    log_scale.grad = None
    with torch.no_grad():
        features_BD = torch.cat([forward(k) for k in range(4)])
    features_BD.requires_grad_()
    contrastive_loss(features_BD, y_BD, log_scale).backward()
    assert features_BD.grad is not None
    for k, grad in enumerate(features_BD.grad.split(16)):
        forward(k).backward(grad)
    for leaf, want in zip((*tower.parameters(), log_scale), truth, strict=True):
        torch.testing.assert_close(leaf.grad, want)


def test_tiles_of_the_default_size() -> None:
    """Several tiles of the real size, not the small ones of other tests."""
    x_BD, y_BD = batch(2300, 8)
    leaves = [x_BD, y_BD, *scalars("softmax")]
    loss = loss_of(*leaves)
    grads = torch.autograd.grad(loss, leaves)
    references = [leaf.detach().requires_grad_() for leaf in leaves]
    truth = reference_contrastive_loss(*references)  # type: ignore[arg-type]
    torch.testing.assert_close(loss.double(), truth, rtol=2e-6, atol=0)  # a float32 mean of float32 losses
    for a, b in zip(grads, torch.autograd.grad(truth, references), strict=True):
        # In the norm: what sums to nearly nothing is as far off as the sum's terms are rounded.
        assert (a.double() - b).norm() <= 1e-5 * b.norm()
