"""Columns that take turns: only some of an adapter's move, and each waits with what it learned."""

import pytest
import torch
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from peft import get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from pacatune import PacaConfig
from pacatune.selection import ReselectColumns
from pacatune.tuner.layer import PacaLayer
from tests.selection.nets import TARGETS, build

IDS = torch.arange(12).reshape(2, 6) % 11
R, NUM, EVERY = 4, 2, 2


def adapted(**options):
    config = PacaConfig(r=R, paca_alpha=R, target_modules=TARGETS, init_weights=False, **options)
    torch.manual_seed(1)
    return get_peft_model(build(), config)


def deltas_of(model):
    """Each layer's name in the base, its update and the dimension of its columns."""
    return {
        name.removeprefix("base_model.model."): (
            layer.paca_delta["default"].weight,
            layer.layout.delta_dim,
        )
        for name, layer in model.named_modules()
        if isinstance(layer, PacaLayer)
    }


def loss_of(model):
    return model(IDS).square().sum()


def make_optimizer(model):
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1)


def run_steps(model, callback, steps):
    """What Trainer does in a step, with the callback at its place."""
    state, control, optimizer = TrainerState(), TrainerControl(), make_optimizer(model)
    callback.on_train_begin(None, state, control, model=model)
    for step in range(steps):
        state.global_step = step
        optimizer.zero_grad()
        loss_of(model).backward()
        callback.on_pre_optimizer_step(None, state, control, model=model)
        optimizer.step()
        callback.on_optimizer_step(None, state, control, model=model)
        yield step


def test_turns_reach_every_column_once_before_they_begin_again():
    callback = ReselectColumns(3, 1)
    moved = [set(range(12)) - set(callback.waiting("a", 12, turn).tolist()) for turn in range(8)]
    assert [len(columns) for columns in moved] == [3] * 8
    assert set().union(*moved[:4]) == set(range(12))
    assert moved[:4] == moved[4:]
    other = [set(range(12)) - set(callback.waiting("b", 12, turn).tolist()) for turn in range(4)]
    assert other != moved[:4]


def test_a_turn_has_all_its_columns_where_they_do_not_divide_r():
    callback = ReselectColumns(3, 1)
    for turn in range(10):
        assert len(callback.waiting("a", 8, turn)) == 5


def test_only_the_columns_of_the_turn_move():
    """Whatever the optimizer's state and weight decay do, for every kind of layer."""
    model, callback = adapted(), ReselectColumns(NUM, EVERY)
    before = {name: delta.detach().clone() for name, (delta, _) in deltas_of(model).items()}
    for step in run_steps(model, callback, 6):
        for name, (delta, dim) in deltas_of(model).items():
            waiting = set(callback.waiting(name, R, step // EVERY).tolist())
            for place in range(R):
                is_same = torch.equal(delta.select(dim, place), before[name].select(dim, place))
                assert is_same is (place in waiting), (name, step, place)
            before[name] = delta.detach().clone()


def test_what_waits_stays_in_the_outputs():
    """The model computes with all its columns: as one that was given the same update at once."""
    model = adapted()
    list(run_steps(model, ReselectColumns(NUM, EVERY), 4))
    twin = adapted()
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(IDS), twin(IDS), rtol=1e-12, atol=1e-12)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(IDS), twin(IDS), rtol=1e-12, atol=1e-12)


def test_steps_equal_those_of_masked_updates():
    """Against plain AdamW on all columns, whose waiting ones are put back by hand."""
    model, twin, callback = adapted(), adapted(), ReselectColumns(NUM, EVERY)
    optimizer = make_optimizer(twin)
    for step in run_steps(model, callback, 5):
        optimizer.zero_grad()
        loss_of(twin).backward()
        before = {name: delta.detach().clone() for name, (delta, _) in deltas_of(twin).items()}
        optimizer.step()
        with torch.no_grad():
            for name, (delta, dim) in deltas_of(twin).items():
                moves = torch.ones(R, dtype=torch.bool)
                moves[callback.waiting(name, R, step // EVERY)] = False
                shape = [-1 if i == dim else 1 for i in range(delta.dim())]
                delta.copy_(torch.where(moves.view(shape), delta, before[name]))
    for name, (delta, _) in deltas_of(model).items():
        torch.testing.assert_close(delta, deltas_of(twin)[name][0], rtol=1e-12, atol=1e-12)


class _Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        return {"ids": IDS[index % 2], "labels": torch.ones(3, dtype=torch.float64)}


class _WithLoss(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, ids, labels):
        return {"loss": (self.net(ids) - labels).square().mean()}


def test_trainer_calls_it(tmp_path):
    config = PacaConfig(r=R, target_modules=["up", "down"])
    model = get_peft_model(_WithLoss(build()), config)
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=0.1,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    callback = ReselectColumns(1, 1)
    Trainer(model, arguments, train_dataset=_Rows(), callbacks=[callback]).train()
    for name, (delta, dim) in deltas_of(model).items():
        moved = {place for place in range(R) if delta.select(dim, place).any()}
        waited = [set(callback.waiting(name, R, turn).tolist()) for turn in range(2)]
        assert moved == set(range(R)) - (waited[0] & waited[1])
        assert len(moved) == 2


@pytest.mark.parametrize(("options", "name"), [((0, 5), "num_columns"), ((5, 0), "every")])
def test_numbers_that_are_not_positive(options, name):
    with pytest.raises(ValueError, match=rf"`{name}` \(0\) must be at least 1"):
        ReselectColumns(*options)


def test_nothing_to_choose_from():
    with pytest.raises(ValueError, match=r"`num_columns` \(4\) must be below the `r`"):
        next(run_steps(adapted(), ReselectColumns(4, 1), 1))


def test_updates_without_columns():
    """As FSDP1 holds them."""
    model = adapted()
    holder = model.base_model.model.up.paca_delta["default"]
    holder.weight = nn.Parameter(holder.weight.detach().flatten())
    with pytest.raises(ValueError, match=r"'base_model.model.up' is held in parts"):
        next(run_steps(model, ReselectColumns(1, 1), 1))


def test_optimizers_that_step_elsewhere():
    optimizer = object.__new__(DeepSpeedOptimizerWrapper)
    with pytest.raises(ValueError, match=r"DeepSpeed steps in its backward pass"):
        ReselectColumns(1, 1).on_train_begin(None, None, None, model=adapted(), optimizer=optimizer)
