"""Any number of threads may evaluate one model; one may train while others look."""

import copy
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from pacatune import PacaConfig, resident
from pacatune.residency.watching import LOCK
from tests import forks
from tests.residency.net import Net, adapt, assert_base, check, deltas, expected, layers

NUM_ROUNDS = 30


@pytest.fixture(autouse=True)
def _switching_often() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.fixture(name="pool")
def _pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(3) as pool:
        yield pool


def together(pool: ThreadPoolExecutor, *tasks: Callable[[], Any]) -> list[Any]:
    """Run tasks at the same time; each starts when all are there."""
    barrier = threading.Barrier(len(tasks))

    def run(task: Callable[[], Any]) -> Any:
        barrier.wait()
        return task()

    return [future.result() for future in [pool.submit(run, task) for task in tasks]]


def evaluate(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def test_the_first_forward_in_several_threads(base: Net, x: Tensor, pool) -> None:
    model = adapt(base)
    want = expected(base, model, x)[0]
    for _ in range(NUM_ROUNDS):
        model(x)  # columns of training are in the weight, or are not
        if torch.rand(()) < 0.5:
            list(model.parameters())
        for y in together(pool, *[lambda: evaluate(model, x)] * 3):
            torch.testing.assert_close(y, want)
    assert_base(base, model)


def test_generation_after_a_switch_of_adapters(pool) -> None:
    """As a server with a thread pool does."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    base = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()
    before = copy.deepcopy(base.state_dict())
    options = {"r": 16, "paca_alpha": 128, "target_modules": "all-linear", "init_weights": False}
    model = get_peft_model(base, PacaConfig(**options, random_seed=1)).eval()
    model.add_adapter("other", PacaConfig(**options, random_seed=2))
    ids = torch.randint(0, 64, (2, 16))

    def generate() -> Tensor:
        kwargs = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **kwargs)

    want = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        want[name] = generate()
    assert not torch.equal(want["default"], want["other"])
    for _ in range(5):
        for name in ("default", "other"):
            model.set_adapter(name)
            for found in together(pool, generate, generate):
                assert torch.equal(found, want[name])
    for name, tensor in model.unload().state_dict().items():
        assert torch.equal(tensor, before[name])


def test_evaluation_beside_looks(base: Net, x: Tensor, pool) -> None:
    model = adapt(base)
    want = expected(base, model, x)[0]
    key = "base_model.model.first.base_layer.weight"

    def look() -> Tensor:
        return model.state_dict()[key].clone()

    for _ in range(NUM_ROUNDS):
        model(x)
        *outputs, seen = together(pool, *[lambda: evaluate(model, x)] * 2, look)
        for y in outputs:
            torch.testing.assert_close(y, want)
        assert torch.equal(seen, base.first.weight)


@pytest.mark.parametrize("holds", ["values", "parameters", "nothing"])
def test_training_beside_looks(holds: str, base: Net, x: Tensor, pool) -> None:
    """A thread that saves or logs sees the base, as long as it holds what it saw."""
    model, twin = adapt(base), adapt(base)
    weights = [base.first.weight.clone(), base.second.weight.clone()]
    stop, failures, num_looks = threading.Event(), [], 0

    def look() -> None:
        nonlocal num_looks
        while not stop.is_set():
            if holds == "parameters":
                held = [layer.base_layer.weight for layer in layers(model)]
            elif holds == "values":
                state = model.state_dict()
                held = [
                    state[f"base_model.model.{name}.base_layer.weight"]
                    for name in ("first", "second")
                ]
            else:
                list(model.parameters())
                held = []
            num_looks += 1
            failures.extend(
                1 for pair in zip(held, weights, strict=False) if not torch.equal(*pair)
            )

    looking = pool.submit(look)
    losses: list[list[float]] = [[], []]
    try:
        for number, one in enumerate((model, twin)):
            optimizer = torch.optim.AdamW(deltas(one), lr=0.05)
            for step in range(40):
                loss = one(x + step).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses[number].append(loss.item())
    finally:
        stop.set()
    looking.result()
    assert num_looks
    assert not failures
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    check(base, model, x)
    assert_base(base, model)


def test_evaluation_beside_a_thread_that_is_resident(base: Net, x: Tensor, pool) -> None:
    model = adapt(base)
    want = expected(base, model, x)[0]

    def evaluate_resident() -> Tensor:
        with resident(model), torch.no_grad():
            return torch.stack([model(x) for _ in range(3)])

    for _ in range(NUM_ROUNDS):
        ours, theirs = together(pool, evaluate_resident, lambda: evaluate(model, x))
        torch.testing.assert_close(theirs, want)
        torch.testing.assert_close(ours, want.expand_as(ours))
    assert_base(base, model)


def test_one_thread_at_a_time_is_resident(base: Net, x: Tensor, pool) -> None:
    model = adapt(base)
    want = expected(base, model, x)[0]

    def enter() -> bool:
        with resident(model), torch.no_grad():
            torch.testing.assert_close(model(x), want)
            return any(layer.residency.is_written for layer in layers(model))

    with resident(model):
        assert not pool.submit(enter).result()
        assert enter()  # the same thread may, within
        assert any(layer.residency.is_written for layer in layers(model))
    assert_base(base, model)
    assert pool.submit(enter).result()
    assert_base(base, model)


def test_the_thread_that_trains_generates_with_resident_columns() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
    model = get_peft_model(base, PacaConfig(r=4, target_modules="all-linear", init_weights=False))
    ids, seen = torch.randint(0, 64, (1, 8)), []

    def note(*_: Any) -> None:
        seen.append(all(layer.residency.is_written for layer in layers(model)[:1]))

    model.get_base_model().model.layers[0].mlp.register_forward_hook(note)

    def generate() -> None:
        seen.clear()
        with torch.no_grad():
            model.generate(input_ids=ids, max_new_tokens=2, do_sample=False, pad_token_id=0)

    generate()
    assert not any(seen)  # nobody has trained: perhaps many threads serve
    model(input_ids=ids, labels=ids).loss.backward()
    generate()
    assert all(seen)
    assert not any(layer.residency.is_written for layer in layers(model))
    with ThreadPoolExecutor(1) as pool:
        pool.submit(generate).result()
    assert not any(seen)


def _child(model: nn.Module, x: Tensor, results: Any, done: Any) -> None:
    torch.set_num_threads(1)
    model.train()
    y = model(x)  # would write, were the memory its own
    y.sum().backward()
    results.put(y.detach().tolist())
    done.wait()


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_processes_that_share_the_memory(method: str, base: Net, x: Tensor) -> None:
    import torch.multiprocessing as multiprocessing

    forks.server()
    model = adapt(base)
    want = expected(base, model, x)[0]
    model.share_memory()
    context = multiprocessing.get_context(method)
    results, done = context.SimpleQueue(), context.Event()
    process = context.Process(target=_child, args=(model, x, results, done))
    process.start()
    try:
        found = torch.tensor(results.get(), dtype=torch.float64)
        torch.testing.assert_close(found, want)
        assert_base(base, model)
        torch.testing.assert_close(evaluate(model, x), want)
    finally:
        done.set()
        process.join()
    assert process.exitcode == 0


HANDED_OUT: dict[str, Callable[[Any], object]] = {
    "[]": lambda parameters: parameters["weight"],
    "get": lambda parameters: parameters.get("weight"),
    "items": lambda parameters: parameters.items(),
    "values": lambda parameters: parameters.values(),
    "copy": lambda parameters: parameters.copy(),
    "pop": lambda parameters: parameters.pop("weight"),
    "dict": dict,
    "popitem": lambda parameters: parameters.popitem(),
    "setdefault": lambda parameters: parameters.setdefault("weight"),
    "repr": repr,
    "del": lambda parameters: parameters.__delitem__("weight"),
    "=": lambda parameters: parameters.__setitem__("weight", nn.Parameter(torch.zeros(2, 2))),
    "pickle": lambda parameters: parameters.__reduce_ex__(2),
}


@pytest.mark.parametrize("hand_out", HANDED_OUT.values(), ids=HANDED_OUT)
def test_nobody_writes_between_a_look_and_what_it_hands_out(hand_out, base: Net, pool) -> None:
    model = adapt(base)
    layer = layers(model)[0]
    seen: list[bool] = []

    def may_write() -> bool:
        if is_free := LOCK.acquire(timeout=0.05):
            LOCK.release()
        return is_free

    class Residency:
        def look(self) -> None:
            seen.append(pool.submit(may_write).result())

        def replace(self, weight: object) -> None:
            self.look()

    stand_in, parameters = Residency(), layer.base_layer._parameters
    parameters.residency = weakref.ref(stand_in)
    hand_out(parameters)
    assert seen
    assert not any(seen)


class TestMeanwhile:
    """What another thread does while a reader computes, at the worst moment."""

    @pytest.fixture(autouse=True)
    def _of_one_layer(self, base: Net) -> None:
        self.model = adapt(base)
        self.layer = layers(self.model)[0]
        self.indices, scaling = self.layer.paca_indices["default"], self.layer.scaling["default"]
        self.update = self.layer.delta_of("default"), self.indices, scaling
        self.pretrained = base.first.weight.detach().clone()
        self.adapted = self.pretrained.clone()
        self.adapted[:, self.indices] += scaling * self.update[0].detach()
        self.states: list[bool] = []

    def compute(self, act: Callable[[], object], times: int = 1) -> Callable[..., Tensor]:
        def compute(weight: Tensor, is_resident: bool) -> Tensor:
            self.states.append(is_resident)
            assert len(self.states) < 9, "this never ends"
            if len(self.states) <= times:
                act()
            return weight.detach().clone()

        return compute

    def write(self) -> None:
        assert self.layer.residency.write(*self.update)

    def test_columns_are_written(self) -> None:
        found = self.layer.residency.read(self.compute(self.write), *self.update, writes=False)
        assert self.states == [False, True]
        torch.testing.assert_close(found, self.adapted)

    def test_columns_are_written_below_a_reader_of_the_pretrained(self) -> None:
        found = self.layer.residency.read_pretrained(self.compute(self.write))
        assert self.states == [False, False]
        assert torch.equal(found, self.pretrained)

    def test_columns_are_written_while_what_they_add_is_computed(self) -> None:
        self.layer.residency.find_weight()

        def compute() -> Tensor:
            self.write()
            return torch.zeros_like(self.update[0])

        self.layer.residency.addition(compute, torch.float64, *self.update)
        assert self.layer.residency.added is None

    def test_somebody_looks_again_and_again(self) -> None:
        compute = self.compute(self.layer.residency.look, times=9)
        assert self.layer.residency.read(compute, *self.update, writes=True) is not None
        assert self.states == [True, False]

    def test_the_adapter_is_merged(self) -> None:
        compute = self.compute(self.model.merge_adapter)
        assert self.layer.residency.read(compute, *self.update, writes=False) is None


@pytest.mark.parametrize("change", ["write", "rewrite", "restore"])
def test_who_starts_to_read_within_a_change(change: str, base: Net, pool) -> None:
    """Before whichever line announces the change: nobody takes one state for the other."""
    model = adapt(base)
    layer, delta = layers(model)[0], deltas(model)[0].detach().clone()
    residency, indices = layer.residency, layer.paca_indices["default"]
    mine, others = ((deltas(model)[0], indices, scaling) for scaling in (2.0, 3.0))
    pretrained = base.first.weight.detach()[:, indices]

    def change_while_reading(number: int) -> int:
        """Start to read before the number-th line; return how many there were."""
        is_over, has_started, readers, lines = threading.Event(), threading.Event(), [], [0]

        def compute(weight: Tensor, is_resident: bool) -> tuple[Tensor, bool]:
            has_started.set()
            assert is_over.wait(10)
            return weight.detach()[:, indices], is_resident

        def trace(frame: FrameType, event: str, arg: Any) -> Any:
            if event == "line" and frame.f_code.co_name in ("_begin", "restore_all"):
                lines[0] += 1
                if lines[0] == number:
                    readers.append(pool.submit(residency.read, compute, *mine, writes=False))
                    has_started.wait(0.05)  # unless it waits for the lock
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            if change == "restore":
                residency.restore()
            else:
                assert residency.write(*(mine if change == "write" else others))
        finally:
            sys.settrace(before)
            is_over.set()
        for reader in readers:
            columns, is_resident = reader.result()
            torch.testing.assert_close(columns, pretrained + 2.0 * delta * is_resident)
        return lines[0]

    number = num_lines = 1
    while number <= num_lines:
        residency.restore()
        if change != "write":
            assert residency.write(*mine)
        num_lines = change_while_reading(number)
        number += 1
