"""The kernel that puts all columns: on a GPU, or by Triton's interpreter (TRITON_INTERPRET=1)."""

import os
from collections import defaultdict

import pytest
import torch

from pacatune import precision
from pacatune.ops.columns import Update, read_columns, with_columns
from pacatune.residency import put
from pacatune.residency.put import Put, can_exchange, exchange, room_for
from tests.frames import frames_of_pacatune
from tests.residency.net import adapt, assert_base, deltas, layers
from tests.residency.test_together import build, loss_of

# O, I and R.
SHAPES = [(37, 50, 4), (64, 33, 8), (700, 64, 3), (60, 33, 20)]
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


DEVICE = "cpu" if IS_INTERPRETED else "cuda"
needs_triton = pytest.mark.skipif(
    not (IS_INTERPRETED or torch.cuda.is_available()),
    reason="Triton has neither a GPU nor its interpreter (TRITON_INTERPRET=1) here",
)


@needs_triton
@pytest.mark.parametrize("mixes", [False, True])
@pytest.mark.parametrize("delta_dtype", [torch.float32, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bits_are_those_of_torch(dtype, delta_dtype, mixes) -> None:
    pytest.importorskip("triton")
    puts, expected, pretrained = [], [], []
    for out_features, in_features, count in SHAPES:
        rank = 5 if mixes else count
        weight = torch.randn(out_features, in_features).to(DEVICE, dtype)
        columns = torch.randperm(in_features)[:count].sort().values.to(DEVICE)
        kept = room_for(weight, columns)
        delta = torch.randn(out_features, rank).to(DEVICE, delta_dtype or dtype)
        mix = torch.randn(rank, count).to(delta) / 3 if mixes else None
        update = Update(delta, columns, 1.7, mix)
        pretrained.append(weight.clone())
        adapted = update.adapted(read_columns(weight, columns))
        expected.append(with_columns(weight, columns, adapted))
        puts.append(Put(kept, update))
    exchange(puts, takes=True)
    exchange(puts)
    # The interpreter truncates where it makes bfloat16.
    rtol = 2**-7 if IS_INTERPRETED and dtype is torch.bfloat16 else 0.0
    for each, want in zip(puts, expected, strict=True):
        torch.testing.assert_close(each.kept.memory, want, rtol=rtol, atol=0)
    exchange([each._replace(update=None) for each in puts])
    for each, want in zip(puts, pretrained, strict=True):
        assert torch.equal(each.kept.memory, want)


@pytest.mark.skipif(not IS_INTERPRETED, reason="needs Triton's interpreter (TRITON_INTERPRET=1)")
@pytest.mark.parametrize("is_negative", [True, False])
def test_columns_that_no_weight_has_are_not_written(is_negative, base, monkeypatch) -> None:
    """Whoever put them there: the kernel takes them as they are."""
    monkeypatch.setattr(put, "exchange", exchange)
    monkeypatch.setattr(put, "can_exchange", lambda memory, *values: True)
    base = base.float()
    model, x = adapt(base), torch.randn(2, 10)
    model(x).sum().backward()
    torch.optim.SGD(deltas(model), 0.1).step()
    for layer in layers(model):
        place, column = (0, -1) if is_negative else (-1, layer.in_features)
        layer.paca_indices["default"][place] = column
    with pytest.raises(ValueError, match=r"`indices` holds (-1|10) at position [02]; .* to 9"):
        model(x)
    assert_base(base, model)


@needs_triton
@pytest.mark.parametrize("mixes", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # of bfloat16, see above
def test_it_works(dtype: torch.dtype, mixes: bool) -> None:
    assert put._works(torch.device(DEVICE), dtype, torch.float32, mixes)


def test_where_it_cannot_be_used(monkeypatch) -> None:
    weight, delta, mix = torch.zeros(4, 4), torch.zeros(4, 2), torch.zeros(2, 3)
    assert not can_exchange(weight, delta)
    monkeypatch.setattr(put, "is_on_gpu", lambda memory: True)
    monkeypatch.setattr(put, "_works", lambda *kind: True)
    assert can_exchange(weight, delta)
    assert can_exchange(weight, delta, mix)
    assert not can_exchange(weight, delta, mix.bfloat16())
    assert not can_exchange(weight, delta, torch.zeros(3, 2).t())


@pytest.fixture(name="kernel")
def _kernel(monkeypatch) -> list[Exception]:
    """Let CPUs pass for GPUs; launches raise what is put in the list, the last one for ever."""
    errors: list[Exception] = []

    class Kernel:
        def __getitem__(self, grid):
            raise errors.pop(0) if len(errors) > 1 else errors[0]

    monkeypatch.setattr(put, "_kernel", Kernel)
    monkeypatch.setattr(put, "_triton_dtype", str)
    monkeypatch.setattr(precision, "_tried", {})
    monkeypatch.setattr(put, "is_on_gpu", lambda memory: True)
    return errors


def train(model) -> list[float]:
    optimizer, losses = torch.optim.AdamW(deltas(model), lr=0.05), []
    for step in range(4):
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_a_kernel_that_fails_ends_no_run(kernel, monkeypatch, tmp_path) -> None:
    """No C compiler, no Python.h, an old card: found by its first launch, in the second step."""
    kernel.append(RuntimeError("Failed to find C compiler.\nA long trace."))
    plain, model = build(), build()
    losses = train(plain)  # float64 has no kernel
    monkeypatch.setattr(put, "_DTYPES", (torch.float64,))
    message = (
        r"fails on cpu \(RuntimeError: Failed to find C compiler.\); they are written layer by"
    )
    with pytest.warns(UserWarning, match=message) as warned:
        assert train(model) == losses
    assert len(warned) == 1
    model.save_pretrained(tmp_path)
    for ours, theirs in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_kernel_that_writes_other_values_is_not_used(kernel, monkeypatch) -> None:
    monkeypatch.setattr(put, "exchange", lambda puts, takes=False: None)
    with pytest.warns(
        UserWarning, match=r"cpu \(RuntimeError: it writes other values than torch\)"
    ):
        assert not can_exchange(torch.zeros(4, 4), torch.zeros(4, 2))


def test_a_lack_of_memory_is_no_fault_of_the_kernel(kernel) -> None:
    launched = RuntimeError("Triton Error [CUDA]: out of memory")
    kernel += [torch.OutOfMemoryError("CUDA out of memory"), launched, RuntimeError("old card")]
    weight, delta = torch.zeros(4, 4), torch.zeros(4, 2)
    assert not can_exchange(weight, delta)
    assert not can_exchange(weight, delta)
    with pytest.warns(UserWarning, match="old card"):
        assert not can_exchange(weight, delta)
    assert not can_exchange(weight, delta)  # and says no more


def test_a_grid_ends_at_no_number_of_blocks_or_layers(monkeypatch) -> None:
    """CUDA allows 65,535 blocks on its second axis; a head of 262,144 tokens has more."""
    grids = []

    class Kernel:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **kwargs: None

    monkeypatch.setattr(put, "_kernel", Kernel)
    monkeypatch.setattr(put, "_triton_dtype", str)
    columns = torch.arange(257)
    head = Put(room_for(torch.empty(262_144, 300, device="meta"), columns), None)
    layers = [Put(room_for(torch.empty(4, 300, device="meta"), columns), None)] * 70_000
    exchange([head])
    exchange(layers)
    assert grids == [(262_144 * 257 // 1024,), (2 * 70_000,)]


def test_python_that_a_launch_runs_does_not_grow_with_its_weights(monkeypatch) -> None:
    """Nor are addresses brought to the GPU again while they stay."""
    launched = []

    def launch(table, *args, **options):
        launched.append(table)

    monkeypatch.setattr(put, "_kernel", lambda: defaultdict(lambda: launch))
    monkeypatch.setattr(put, "_triton_dtype", str)
    totals = []
    for number in (2, 20):
        puts = []
        for _ in range(number):
            kept = room_for(torch.ones(4, 6), torch.tensor([1, 4]))
            puts.append(Put(kept, Update(torch.ones(4, 2), kept.columns, 0.5)))
        exchange(puts)
        with frames_of_pacatune() as calls:
            exchange(puts)
        totals.append(calls.total())
        assert launched[-1] is launched[-2]
        puts[-1] = puts[-1]._replace(update=Update(torch.ones(4, 2), kept.columns, 0.5))
        exchange(puts)
        assert launched[-1] is not launched[-2]
    assert totals[0] == totals[1]
