"""A random walk over everything that is done to an adapted model, by one thread or two.

Beside the model a plain copy of the layer and the adapters' values are kept, from which plain
autograd says, whenever something is computed, what it must be. Whatever the layer of whatever kind
has been through, an output or a gradient is right, or there is an error that says why not.
"""

import contextlib
import copy
import math
import pickle
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

import pacatune.residency.put
from pacatune import PacaConfig, resident
from pacatune.adapters.loading import hotswap_adapter
from tests.residency.devices import as_on_a_gpu
from tests.residency.twin import KINDS, Kind, Twin, adapted, targets_of, twin_of

MAX_ADAPTERS = 4
DTYPES = ["float32", "bfloat16", "float64"]
# Two threads of ours beside the one that walks.
POOL = ThreadPoolExecutor(2)
_FOLDER = tempfile.TemporaryDirectory()


@dataclass
class Pending:
    """A forward pass whose backward is still to come."""

    output: Tensor
    gy: Tensor
    sources: list[Tensor]
    """What gradients are asked for."""
    expected: list[Tensor]
    """These, by plain autograd."""
    changes: int
    """How often what it was computed from had been changed by then."""


class Injected(Exception):
    """Raised by the walk in the middle of a write."""


class Walk(RuleBasedStateMachine):
    """The rules; each is one operation."""

    num_operations = 0

    def __init__(self) -> None:
        super().__init__()
        self.stack = contextlib.ExitStack()
        self.pending: list[Pending] = []
        self.held: list[Any] = []
        self.changes = 0

    @initialize(
        kind=st.sampled_from(list(KINDS)),
        dtype=st.sampled_from(DTYPES),
        seed=st.integers(0, 2**32 - 1),
        on_gpu=st.booleans(),
    )
    def begin(self, kind: str, dtype: str, seed: int, on_gpu: bool) -> None:
        if on_gpu:
            self.stack.enter_context(as_on_a_gpu())
        self.stack.enter_context(warnings.catch_warnings())
        # PEFT says when it merges twice, or unmerges by itself.
        warnings.filterwarnings("ignore", category=UserWarning, module="peft")
        warnings.filterwarnings("ignore", message="Merging into a quantised model")
        if kind.startswith("quantised") and dtype == "float64":
            dtype = "float32"
        self.twin = twin_of(kind, getattr(torch, dtype), seed)
        self.rng = self.twin.rng

    def example(self) -> tuple[Tensor, Tensor]:
        """Return an input, and the plain layer's output with the adapters in its weight."""
        x, names = self.twin.inputs(), self.twin.merged or self.twin.active
        return x, self.twin.expected(x, names)[0]

    @invariant()
    def counted(self) -> None:
        """Count the operations of all walks."""
        Walk.num_operations += 1

    # ------------------------------------------------------------------ what is computed

    @rule()
    def train(self) -> None:
        """Forward and backward at once."""
        self.twin.check()

    @rule()
    def evaluate(self) -> None:
        twin = self.twin
        x, wanted = self.example()
        with torch.inference_mode(self.rng.random() < 0.3), torch.set_grad_enabled(False):
            twin.close(twin.model(x), wanted)

    @rule()
    def evaluate_resident(self) -> None:
        """As a thread that has the model to itself may."""
        twin = self.twin
        x, wanted = self.example()
        with resident(twin.model), torch.no_grad():
            for _ in range(2):
                twin.close(twin.model(x), wanted)
        if not twin.merged:
            twin.check_base()

    @precondition(lambda self: not self.twin.is_quantised)
    @rule()
    def call_functionally(self) -> None:
        """With other tensors in the parameters' place."""
        twin = self.twin
        x, wanted = self.example()
        parameters = {name: p.detach() for name, p in twin.model.named_parameters()}
        twin.close(torch.func.functional_call(twin.model, parameters, (x,)), wanted)

    @rule()
    def evaluate_in_two_threads(self) -> None:
        """While this one looks."""
        twin = self.twin
        x, wanted = self.example()
        futures = [POOL.submit(_evaluate, twin.model, x) for _ in range(2)]
        if not twin.merged:
            twin.check_base()
        for future in futures:
            for y in future.result():
                twin.close(y, wanted)

    @precondition(lambda self: not self.twin.merged)
    @rule()
    def train_while_another_thread_looks(self) -> None:
        twin = self.twin
        base = twin.weight_of(twin.plain).clone()
        future = POOL.submit(_look, twin.model, twin.layer.get_base_layer(), twin.kind, base)
        twin.check()
        future.result()

    @precondition(lambda self: not self.twin.merged and len(self.pending) < 3)
    @rule(copies=st.booleans())
    def forward(self, copies: bool) -> None:
        """Forward alone; with hooks that keep copies of what is saved, as offloading does."""
        twin = self.twin
        x, names = twin.inputs(), twin.active
        y, deltas = twin.expected(x, names)
        gy = torch.randn_like(y)
        expected = list(torch.autograd.grad(y, deltas, gy))
        with contextlib.ExitStack() as stack:
            if copies:
                hooks = torch.autograd.graph.saved_tensors_hooks(_copied, lambda saved: saved)
                stack.enter_context(hooks)
            output = twin.model(x)
        twin.close(output, y)
        sources = [trained for name in names for trained in twin.trained(name)]
        self.pending.append(Pending(output, gy, sources, expected, self.changes))

    @precondition(lambda self: self.pending)
    @rule()
    def backward(self) -> None:
        """Run backward for an earlier pass: right, or an error if what it is of has changed."""
        one = self.pending.pop(self.rng.randrange(len(self.pending)))
        for source in one.sources:  # frozen by a switch
            source.requires_grad_()
        expected = contextlib.nullcontext()
        if one.changes != self.changes:
            expected = contextlib.suppress(RuntimeError)
        with expected:
            found = torch.autograd.grad(one.output, one.sources, one.gy)
            for ours, theirs in zip(found, one.expected, strict=True):
                self.twin.close(ours, theirs)

    # ------------------------------------------------------------------ what changes the adapter

    def changed(self, *, traceless: bool = False) -> None:
        """Note that earlier passes are of something else, which leaves no trace if `traceless`."""
        self.changes += 1
        if traceless:
            self.pending.clear()

    @precondition(lambda self: not self.twin.merged)
    @rule()
    def step(self) -> None:
        twin = self.twin
        deltas = [trained for name in twin.active for trained in twin.trained(name)]
        kind = self.rng.choice([torch.optim.SGD, torch.optim.AdamW])
        parameters: list[Tensor] = deltas
        is_over_all = not twin.is_quantised and self.rng.random() < 0.3
        if is_over_all:
            parameters = list(twin.model.parameters())
        optimizer = kind(parameters, lr=0.05, fused=self.rng.random() < 0.3)
        before = [delta.detach().clone() for delta in deltas]
        decays = is_over_all and self.rng.random() < 0.5
        for _ in range(self.rng.randint(1, 3)):
            twin.model(twin.inputs()).float().square().mean().backward()
        if decays:
            for parameter in parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        if decays and kind is torch.optim.AdamW:
            self._follow_decay(1 - 0.05 * 0.01)
        self.changed(traceless=decays)  # in a fused step, where no column is ever written
        assert not any(torch.equal(*pair) for pair in zip(before, deltas, strict=True))

    def _follow_decay(self, factor: float) -> None:
        layer = self.twin.layer.get_base_layer()
        for name, theirs in self.twin.plain.named_parameters():
            ours = layer.get_parameter(name)
            torch.testing.assert_close(ours.detach(), theirs * factor)
            theirs.copy_(ours)

    @rule(through_data=st.booleans())
    def edit(self, through_data: bool) -> None:
        name = self.rng.choice(self.twin.adapters)
        if name in self.twin.merged:
            return
        delta = self.rng.choice(self.twin.trained(name))
        if through_data:
            delta.data.mul_(-1)
        else:
            with torch.no_grad():
                delta.mul_(-0.5).add_(0.3)
        self.changed(traceless=through_data)

    @precondition(lambda self: not self.twin.merged and not self.twin.is_quantised)
    @rule(through_data=st.booleans())
    def edit_base(self, through_data: bool) -> None:
        """Load other weights into the base."""
        twin = self.twin
        ours = getattr(twin.layer.get_base_layer(), twin.kind.parameter)
        theirs = twin.weight_of(twin.plain)
        value = torch.randn_like(theirs) * 0.3
        theirs.copy_(value)
        if through_data:
            ours.data.copy_(value)
        else:
            with torch.no_grad():
                ours.copy_(value)
        self.changed(traceless=through_data)

    @precondition(lambda self: len(self.twin.adapters) < MAX_ADAPTERS)
    @rule()
    def add(self) -> None:
        twin, rng = self.twin, self.rng
        config = PacaConfig(
            r=rng.randint(1, 5),
            channels=rng.choice([None, 5, 0.7]),
            paca_alpha=rng.choice([1, 4, 6.5]),
            random_seed=rng.randrange(100),
            init_weights=False,
            **targets_of(twin.kind),
        )
        twin.model.add_adapter(f"added{self.changes}", config)
        self.changed()

    @rule()
    def switch(self) -> None:
        self.twin.model.set_adapter(self.rng.choice(self.twin.adapters))

    @rule()
    def activate_two(self) -> None:
        twin = self.twin
        two = self.rng.sample(twin.adapters, min(2, len(twin.adapters)))
        twin.model.set_adapter(two[0])  # PeftModel itself knows of one only
        twin.model.base_model.set_adapter(two)

    @rule()
    def scale(self) -> None:
        twin = self.twin
        if not twin.merged:
            twin.layer.set_scale(self.rng.choice(twin.active), self.rng.choice([0.5, 1, 2]))
            self.changed()

    @rule(safe=st.booleans())
    def merge(self, safe: bool) -> None:
        twin = self.twin
        names = self.rng.choice([None, self.rng.sample(twin.adapters, 1)])
        before = twin.merged
        twin.model.merge_adapter(names, safe_merge=safe)
        assert twin.merged == list(dict.fromkeys([*before, *(names or twin.active)]))
        self.changed()

    @precondition(lambda self: not self.twin.merged)
    @rule()
    def merge_of_something_broken(self) -> None:
        """Refused, and nothing is merged."""
        twin = self.twin
        name = self.rng.choice(twin.adapters)
        delta = self.rng.choice(twin.trained(name))
        kept = delta.detach().clone()
        delta.data.fill_(math.nan)
        with contextlib.suppress(ValueError):
            twin.model.merge_adapter([*twin.active, name], safe_merge=True)
            raise AssertionError("a merge of NaN went through")
        delta.data.copy_(kept)
        self.changed(traceless=True)
        assert not twin.merged
        twin.check_base()

    @rule()
    def unmerge(self) -> None:
        self.twin.model.unmerge_adapter()
        assert not self.twin.merged
        self.twin.check_base()
        self.changed()

    @rule()
    def disable(self) -> None:
        twin = self.twin
        x = twin.inputs()
        if twin.merged:
            self.changed()
        with torch.no_grad(), twin.model.disable_adapter():
            assert torch.equal(twin.model(x), twin.kind.call(twin.plain, x))
            twin.check_base()

    @rule()
    def delete(self) -> None:
        twin = self.twin
        name = self.rng.choice(twin.adapters)
        if name in twin.merged:
            with contextlib.suppress(ValueError):
                twin.model.delete_adapter(name)
                raise AssertionError("a merged adapter was deleted")
        elif len(twin.adapters) > 1:
            twin.model.delete_adapter(name)
            if len(twin.active) > 1 or twin.model.active_adapter not in twin.adapters:
                twin.model.set_adapter(twin.adapters[0])  # PeftModel may name the deleted one
            self.changed()

    @rule()
    def hotswap(self) -> None:
        twin = self.twin
        name, saved = self.rng.choice(twin.adapters), _saved(twin, self.rng.choice([2, 3]))
        held = twin.update(name).delta
        if name in twin.merged:
            with contextlib.suppress(ValueError):
                hotswap_adapter(twin.model, saved, name)
                raise AssertionError("a merged adapter was swapped")
            return
        hotswap_adapter(twin.model, saved, name)
        delta, indices, *_ = twin.update(name)
        assert (delta is held) == (delta.shape == held.shape)  # optimisers keep what they step
        tensors = load_file(saved / "adapter_model.safetensors")
        assert torch.equal(delta, tensors[f"base_model.model.{twin.key}.paca_delta"].to(delta))
        assert torch.equal(indices, tensors[f"base_model.model.{twin.key}.paca_indices"])
        self.changed()

    @precondition(lambda self: len(self.twin.adapters) < MAX_ADAPTERS)
    @rule()
    def weighted_sum(self) -> None:
        twin = self.twin
        names = self.rng.sample(twin.adapters, min(2, len(twin.adapters)))
        weights = [self.rng.uniform(-1, 1) for _ in names]
        new = f"sum{self.changes}"
        twin.model.add_weighted_adapter(names, weights, new)
        parts = zip(weights, names, strict=True)
        wanted = sum(weight * twin.layer.get_delta_weight(name) for weight, name in parts)
        torch.testing.assert_close(twin.layer.get_delta_weight(new), wanted)
        self.changed()

    # ------------------------------------------------------------------ who looks

    @rule()
    def save(self) -> None:
        twin = self.twin
        name = self.rng.choice(twin.adapters)
        tensors = get_peft_model_state_dict(twin.model, adapter_name=name)
        delta = tensors[f"base_model.model.{twin.key}.paca_delta"]
        assert torch.equal(delta, twin.update(name)[0])

    @precondition(lambda self: not self.twin.merged)
    @rule()
    def look(self) -> None:
        state = self.twin.model.state_dict()
        name = f"base_model.model.layer.base_layer.{self.twin.kind.parameter}"
        assert torch.equal(state[name], self.twin.weight_of(self.twin.plain))

    @precondition(lambda self: len(self.held) < 2)
    @rule(values=st.booleans())
    def hold(self, values: bool) -> None:
        """Keep the values of a state_dict, or the parameters themselves."""
        model = self.twin.model
        self.held.append(model.state_dict() if values else list(model.parameters()))

    @precondition(lambda self: self.held)
    @rule()
    def let_go(self) -> None:
        self.held.pop()

    @precondition(lambda self: not self.twin.is_quantised)
    @rule(pickled=st.booleans())
    def go_on_with_a_copy(self, pickled: bool) -> None:
        model = self.twin.model
        self.twin.model = pickle.loads(pickle.dumps(model)) if pickled else copy.deepcopy(model)
        self.pending.clear()  # of the original, which is gone
        self.held.clear()

    # ------------------------------------------------------------------ what goes wrong

    @precondition(lambda self: not self.twin.merged)
    @rule(after=st.booleans())
    def fail_in_the_middle(self, after: bool) -> None:
        """Interrupt a write of columns, if one takes place."""
        put = pacatune.residency.put.put_columns_

        def interrupted(*args: Any) -> None:
            if after:
                put(*args)
            raise Injected

        pacatune.residency.put.put_columns_ = interrupted
        try:
            with contextlib.suppress(Injected):
                self.twin.model(self.twin.inputs()).float().square().mean().backward()
        finally:
            pacatune.residency.put.put_columns_ = put
        self.twin.model.zero_grad()
        self.twin.check_base()

    def teardown(self) -> None:
        if hasattr(self, "twin"):
            twin = self.twin
            twin.check()
            twin.model.unmerge_adapter()
            twin.check()
            twin.check_base()
            plain = twin.model.unload()
            assert torch.equal(twin.weight_of(plain.layer), twin.weight_of(twin.plain))
        self.stack.close()


class CompiledWalk(Walk):
    """With graphs in between, each of which takes a second to make."""

    @precondition(lambda self: getattr(self.twin.layer, "residency", None) is not None)
    @rule(resets=st.booleans())
    def train_compiled(self, resets: bool) -> None:
        """In the graph that was made before, if there is one that still holds."""
        if resets:
            torch.compiler.reset()
        self.twin.check(torch.compile(self.twin.model, backend="aot_eager"))


def _saved(twin: Twin, rank: int) -> Path:
    """Return an adapter's folder; that of a kind of layer is made once."""
    folder = Path(_FOLDER.name, f"{list(KINDS.values()).index(twin.kind)}-{rank}")
    if not folder.exists():
        adapted(twin.plain, twin.kind, rank).save_pretrained(folder)
    return folder


def _evaluate(model: Any, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [model(x) for _ in range(3)]


def _look(model: Any, layer: Any, kind: Kind, base: Tensor) -> None:
    for _ in range(3):
        assert torch.equal(getattr(layer, kind.parameter), base)
        state = model.state_dict()
        assert torch.equal(state[f"base_model.model.layer.base_layer.{kind.parameter}"], base)


def _copied(saved: Tensor) -> Tensor:
    return saved.detach().clone()
