"""R4: at most two column writes per layer and optimiser step, none per micro-batch; evaluation
writes nothing (R2a)."""

import pytest
import torch

from pacatune.residency import resident
from tests.frames import frames_of_pacatune
from tests.residency import net


@pytest.mark.parametrize(
    ("accumulation", "checkpointing"),
    [(1, None), (4, None), (3, "reentrant"), (3, "non-reentrant")],
)
def test_one_write_per_step_if_nobody_holds_the_weight(
    accumulation, checkpointing, base, model, x, writes
):
    model.base_model.model.checkpointing = checkpointing
    optimizer = torch.optim.AdamW(net.deltas(model), lr=0.1, fused=True)
    for step in range(4):
        writes.clear()
        sums = [0.0] * 3
        for micro in range(accumulation):
            batch = (x + micro + step).requires_grad_()
            y, wanted = net.expected(base, model, batch.detach())
            sums = [wanted[0], *(a + b for a, b in zip(sums[1:], wanted[1:], strict=True))]
            out = model(batch)
            torch.testing.assert_close(out, y)
            out.square().sum().backward()
            net.assert_gradients(model, sums, batch)
        optimizer.step()
        optimizer.zero_grad()
        # Reentrant checkpointing evaluates first, which takes out what is no longer right.
        assert len(writes) == (2 if checkpointing == "reentrant" and step else 1) * 2


def test_two_writes_per_step_if_somebody_does(model, x, writes):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(5):
        writes.clear()
        for _ in range(3):
            model(x).sum().backward()
        optimizer.step()
        assert len(writes) == 2 * len(net.layers(model))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_never_writes(mode, base, model, x, writes):
    """It uses what training has written."""
    y = net.expected(base, model, x)[0]
    for _ in range(3):
        with mode():
            torch.testing.assert_close(model(x), y)
    assert not writes
    net.check(base, model, x)
    trained = model(x)
    writes.clear()
    with mode():
        assert torch.equal(model(x), trained)
    assert not writes


def test_evaluation_writes_once_if_told_to(base, model, x, writes):
    y = net.expected(base, model, x)[0]
    with resident(model):
        for _ in range(10):
            torch.testing.assert_close(net.evaluate(model, x), y)
        assert len(writes) == len(net.layers(model))
        assert all(layer.residency.is_written for layer in net.layers(model))
    net.assert_base(base, model)


def test_python_that_a_pass_runs_for_each_layer(model, x):
    """Frames cost as much as kernels where tokens are few."""
    model(x).sum().backward()
    with frames_of_pacatune() as forward:
        loss = model(x.requires_grad_()).sum()
    with frames_of_pacatune() as backward:
        loss.backward()
    assert max(forward.values()) == max(backward.values()) == 2  # each function, in two layers
    assert forward.total() <= 2 * 15 + 4
    assert backward.total() <= 2 * 9


def test_python_that_a_write_runs_for_each_layer(model, x, device):
    optimizer = torch.optim.SGD(net.deltas(model), lr=0.1)
    for _ in range(3):
        model(x).sum().backward()
        optimizer.step()
    first, second = (layer.residency for layer in net.layers(model))
    with frames_of_pacatune() as calls:
        assert first.write(first.written.update)
    assert second.holds(second.written.update)
    assert max(calls[name] for name in calls if name.startswith("Residency")) == 3
    assert calls.total() <= {"cpu": 67, "gpu": 77}[device]  # as one after the other stands in
