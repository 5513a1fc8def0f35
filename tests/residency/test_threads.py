"""Any number of threads may evaluate one model; one may train while others look (R2, R2a)."""

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

from pacatune import PacaConfig, resident
from pacatune.ops.columns import Update
from pacatune.residency.reading import read, read_pretrained
from pacatune.residency.watching import LOCK
from tests.conftest import build_model
from tests.residency import net
from tests.residency.looks import HANDED_OUT, LOOKS, assert_sees_base


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


def is_written(model: nn.Module) -> list[bool]:
    return [layer.residency.is_written for layer in net.layers(model)]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_a_model_generates_with_resident_columns(is_checkpointed, pool):
    """Trained or not, in whatever thread: autograd's own recomputes what is checkpointed."""
    config = PacaConfig(r=4, target_modules="all-linear", init_weights=False)
    model = get_peft_model(build_model(64), config)
    if is_checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})

    def generate() -> Tensor:
        greedy = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        ids = torch.randint(0, 64, (2, 16))
        return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **greedy)

    seen: list[bool] = []
    model.get_base_model().model.layers[0].mlp.register_forward_hook(
        lambda *call: seen.append(is_written(model)[0])
    )

    def share_of_written(run: Callable[[], object] = generate) -> float:
        seen.clear()
        run()
        return sum(seen) / len(seen)

    assert share_of_written() == 1
    assert not any(is_written(model))
    ids = torch.randint(0, 64, (1, 8))
    loss = model.train()(input_ids=ids, labels=ids).loss
    pool.submit(loss.backward).result()
    model.eval()
    assert share_of_written() == 1
    assert not any(is_written(model))
    assert share_of_written(lambda: pool.submit(generate).result()) == 1
    model.requires_grad_(False)
    assert share_of_written() == 1
    assert not any(is_written(model))
    each = [pool.submit(generate) for _ in range(3)]  # one of them at a time
    assert {len(future.result()) for future in each} == {2}
    assert not any(is_written(model))


@pytest.mark.parametrize("look", ["state_dict", "parameters", "resident"])
def test_training_beside_others(look, base, model, x, pool):
    """A thread that saves or logs sees the base, as long as it holds what it saw."""
    twin, pretrained = net.adapt(base), copy.deepcopy(base)
    stop, looks = threading.Event(), []

    def look_again_and_again() -> None:
        while not stop.is_set():
            looks.append(1)
            if look == "resident":
                with resident(model):
                    net.evaluate(model, x)
            else:
                assert_sees_base(pretrained, LOOKS[look](model))

    looking = pool.submit(look_again_and_again)
    losses: list[list[float]] = [[], []]
    try:
        for number, one in enumerate((model, twin)):
            optimizer = torch.optim.AdamW(net.deltas(one), lr=0.05)
            for step in range(40):
                loss = one(x + step).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses[number].append(loss.item())
    finally:
        stop.set()
    looking.result()
    assert looks
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    net.check(base, model, x)
    net.assert_base(base, model)


def test_one_thread_at_a_time_is_resident(base, model, x, pool):
    def enter() -> bool:
        with resident(model):
            net.check_evaluation(base, model, x)
            return any(is_written(model))

    with resident(model):
        assert not pool.submit(enter).result()
        assert enter()  # the same thread may, within
        assert any(is_written(model))
    net.assert_base(base, model)
    assert pool.submit(enter).result()
    net.assert_base(base, model)


@pytest.mark.parametrize("hand_out", HANDED_OUT.values(), ids=HANDED_OUT)
def test_nobody_writes_between_a_look_and_what_it_hands_out(hand_out, model, pool):
    seen: list[bool] = []

    def may_write() -> bool:
        if is_free := LOCK.acquire(timeout=0.05):
            LOCK.release()
        return is_free

    class Residency:
        def look(self, weight: object = None) -> None:
            seen.append(pool.submit(may_write).result())

        replace = look

    stand_in, parameters = Residency(), net.layers(model)[0].base_layer._parameters
    parameters.residency = weakref.ref(stand_in)
    hand_out(parameters)
    assert seen
    assert not any(seen)


class TestMeanwhile:
    """What another thread does while a reader computes, at the worst moment."""

    @pytest.fixture(autouse=True)
    def _of_one_layer(self, base, model):
        self.model, self.layer = model, net.layers(model)[0]
        self.update = self.layer.update_of("default")
        delta, indices, scaling, _ = self.update
        self.pretrained = base.first.weight.detach().clone()
        self.adapted = self.pretrained.clone()
        self.adapted[:, indices] += scaling * delta.detach()
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
        assert self.layer.residency.write(self.update)

    def test_columns_are_written(self):
        found = read(self.layer.residency, self.compute(self.write), self.update, writes=False)
        assert self.states == [False, True]
        torch.testing.assert_close(found, self.adapted)

    def test_columns_are_written_below_a_reader_of_the_pretrained(self):
        found = read_pretrained(self.layer.residency, self.compute(self.write))
        assert self.states == [False, False]
        assert torch.equal(found, self.pretrained)

    def test_somebody_looks_again_and_again(self):
        compute = self.compute(self.layer.residency.look, times=9)
        assert read(self.layer.residency, compute, self.update, writes=True) is not None
        assert self.states == [True, False]

    def test_the_adapter_is_merged(self):
        compute = self.compute(self.model.merge_adapter)
        assert read(self.layer.residency, compute, self.update, writes=False) is None


@pytest.mark.parametrize("change", ["write", "rewrite", "restore"])
def test_who_starts_to_read_within_a_change(change, base, model, pool):
    """Before whichever line announces the change: nobody takes one state for the other."""
    layer, delta = net.layers(model)[0], net.deltas(model)[0].detach().clone()
    residency, indices = layer.residency, layer.paca_indices["default"]
    mine, others = (Update(net.deltas(model)[0], indices, scaling) for scaling in (2.0, 3.0))
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
                    readers.append(pool.submit(read, residency, compute, mine, writes=False))
                    has_started.wait(0.05)  # unless it waits for the lock
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            if change == "restore":
                residency.restore()
            else:
                assert residency.write(mine if change == "write" else others)
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
            assert residency.write(mine)
        num_lines = change_while_reading(number)
        number += 1
