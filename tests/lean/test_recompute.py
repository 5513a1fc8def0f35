"""What runs twice instead of being kept, apart from any model."""

import pytest
import torch
from torch import nn

from pacatune.lean import gated as gated_module
from pacatune.lean.gated import ACTIVATIONS, overwriting
from pacatune.lean.norm import Norm, apply_norm, source_of
from pacatune.lean.recompute import recompute, state_of, why_not
from pacatune.measure.counters import SavedBytes
from tests.frames import frames_of_pacatune


class Net(nn.Module):
    """Two products with a cut between them, and something that leaps over the cut."""

    def __init__(self, leaps=False):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)
        self.leaps, self.num_runs = leaps, 0
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
        self.double()

    def body(self, x, cut):
        self.num_runs += 1
        before = self.a(x).sin()
        (h,) = cut(before * before)
        g = cut.derive(h * h, torch.square)
        if self.leaps:
            g = g * before
        return self.b(g)

    def forward(self, x):
        return recompute(lambda x, cut: self.body(x, cut), [x], state_of(self))

    def plain(self, x):
        before = self.a(x).sin()
        h = before * before
        g = h * h
        return self.b(g * before if self.leaps else g)


def make_input():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(5, 4, generator=generator, dtype=torch.float64).requires_grad_()


def gradients_of(function, net, x):
    return torch.autograd.grad(function(x).square().sum(), [x, *net.parameters()])


@pytest.mark.parametrize("leaps", [False, True])
def test_gradients_are_those_of_autograd_bit_for_bit(leaps):
    net, x = Net(leaps), make_input()
    with SavedBytes(net) as saved:
        y = net(x)
    # What the second part saves came to the cut, or is derived; what leaps over the cut is kept.
    assert saved.num_bytes == x.nbytes + (5 * 6 * 8 * 2 if leaps else 0)
    ours = torch.autograd.grad(y.square().sum(), [x, *net.parameters()])
    assert all(map(torch.equal, ours, gradients_of(net.plain, net, x)))
    assert net.num_runs == 2


def test_a_norms_output_that_was_changed_has_no_source():
    y = apply_norm(make_input(), None, None, Norm(1e-6))
    assert source_of(y) is not None
    y.mul_(2)
    assert source_of(y) is None
    assert source_of(apply_norm(torch.ones(2, 4), None, None, Norm(1e-6))) is None


def test_retained_graphs_several_passes_and_some_gradients():
    net, x = Net(), make_input()
    first, second = net(x).square().sum(), net(2 * x).square().sum()
    expected = gradients_of(net.plain, net, x)
    once = torch.autograd.grad(first, [x, *net.parameters()], retain_graph=True)
    twice = torch.autograd.grad(first, [x, *net.parameters()])
    assert all(map(torch.equal, once, expected))
    assert all(map(torch.equal, twice, expected))
    (bias,) = torch.autograd.grad(second, [net.a.bias])
    (other,) = torch.autograd.grad(net.plain(2 * x).square().sum(), [net.a.bias])
    assert torch.equal(bias, other)


def test_an_input_without_gradient():
    net, x = Net(), make_input().detach()
    ours, theirs = (
        torch.autograd.grad(f(x).sum(), list(net.parameters())) for f in (net, net.plain)
    )
    assert all(map(torch.equal, ours, theirs))
    net.requires_grad_(requires_grad=False)
    assert not net(x).requires_grad
    # A result may need none, as of a module whose adapter is merged, in the first block.
    x = make_input()
    y = recompute(lambda x, cut: cut(2 * x)[0].detach() + 1, [x])
    assert torch.equal(y, 2 * x + 1)
    assert not y.requires_grad


def test_a_body_that_computes_something_else_by_then_is_refused():
    net, x = Net(), make_input()
    y = net(x).sum()
    net.a.forward = lambda x: x.exp()[:, [0, 1, 2, 3, 0, 1]]
    with pytest.raises(RuntimeError, match="computes something else than in its forward pass"):
        torch.autograd.grad(y, x)


def test_what_cannot_run_twice():
    net = Net()
    assert why_not(net) is None
    net.c = nn.Dropout(0.1)
    assert why_not(net) == "dropout (0.1) cannot be computed again"
    net.c = nn.Linear(2, 2)
    handle = net.c.register_forward_hook(lambda *args: None)
    assert why_not(net) == "hooks on its layers, or replaced forwards, would run twice"
    handle.remove()
    net.register_forward_hook(lambda *args: None)  # of the module itself runs once
    assert why_not(net) is None
    del net.c.weight
    net.c.weight = torch.ones(2, 2)
    assert why_not(net) == "tensors stand where its parameters were (FSDP1, nn.DataParallel)"
    assert state_of(net) is None
    # Hooks of parameters would be called with the gradient inside the module, and outside again.
    net = Net()
    assert state_of(net) is not None
    net.a.weight.register_hook(lambda grad: 2 * grad)
    assert state_of(net) is None


def test_what_is_run_twice_is_looked_at_by_a_few_functions():
    """`modules()` would run three for each part of a module, in each pass."""
    net = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2)) for _ in range(9)))
    with frames_of_pacatune("/nn/modules/module.py") as forward:
        state = state_of(net)
    with frames_of_pacatune("/nn/modules/module.py") as backward:
        state.check()
    assert len(state.versions) == 18
    assert (forward.total(), backward.total()) == (5, 3)


@pytest.mark.parametrize(
    ("activation", "dtype", "rows"),
    [
        *((one, torch.bfloat16, 64) for one in ACTIVATIONS.values()),
        (ACTIVATIONS["silu"], torch.float32, 10_000),  # one chunk
    ],
)
def test_overwriting_gives_the_same_bits(activation, dtype, rows, monkeypatch):
    monkeypatch.setattr(gated_module, "_MAX_CHUNK", 6 * rows)
    generator = torch.Generator().manual_seed(0)
    gh, both = (torch.randn(2, 80, 6 * n, generator=generator).to(dtype) for n in (1, 2))
    gate, up = both.chunk(2, dim=-1)
    expected = activation.product_gradients(gh, gate, up)
    other, kept = up.clone(), gh.clone()
    ours = overwriting(activation).product_gradients(gh, gate, other)
    assert all(map(torch.equal, ours, expected))
    assert ours[0] is other
    assert torch.equal(gh, kept)
    ours = overwriting(activation).owned_product_gradients(gh, gate, up)
    assert all(map(torch.equal, ours, expected))
    assert ours[0].data_ptr() == up.data_ptr()
    assert ours[1].data_ptr() == gh.data_ptr()


def test_overwriting_leaves_two_dtypes_and_nothing_alone():
    activation = ACTIVATIONS["silu"]
    gh, gate, up = torch.ones(2, 3), torch.ones(2, 3).bfloat16(), torch.full((2, 3), 2.0)
    expected = activation.product_gradients(gh, gate, up)
    ours = overwriting(activation).owned_product_gradients(gh, gate, up)
    assert all(map(torch.equal, ours, expected))
    assert torch.equal(up, torch.full((2, 3), 2.0))
    empty = torch.ones(0, 3)
    assert overwriting(activation).owned_product_gradients(empty, empty, empty)[0].shape == (0, 3)
