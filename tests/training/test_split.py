"""A run goes on with another split of its steps only where they see the same examples."""

import json

import pytest

from pacatune.training.output import TrainedOn, find_checkpoint, why_fixed


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("train_sampling_strategy", "group_by_length"),
        ("dataloader_drop_last", True),
        ("average_tokens_across_devices", False),
        ("accelerator_config", {"split_batches": True}),
    ],
)
def test_options_that_fix_the_split(make_config, option, value):
    assert why_fixed(make_config().training, []) is None
    reason = why_fixed(make_config(training={option: value}).training, [])
    assert reason.startswith(f"with `training.{option}` (")
    assert reason.endswith(") the split decides what a step learns")


def test_a_stream_fixes_the_split(make_config):
    assert why_fixed(make_config().training, iter([])) == (
        "a stream is dealt to the processes as it comes"
    )


def test_deepspeed_fixes_the_split(make_config):
    from accelerate.utils import DeepSpeedPlugin

    training = make_config().training
    training.deepspeed_plugin = DeepSpeedPlugin(zero_stage=2)
    reason = "DeepSpeed reads the states of as many processes as saved them"
    assert why_fixed(training, []) == reason


@pytest.mark.parametrize("task", ["grpo", "rloo", "kto"])
def test_tasks_that_fix_the_split(task):
    from pacatune.training import TASKS

    assert TASKS[task].fixed_split
    assert TASKS["sft"].fixed_split is None


def trained_on(*split):
    return TrainedOn(fingerprint="data", split=[*split])


@pytest.fixture
def checkpoint(tmp_path):
    """One that two processes have written, of four examples each, twice accumulated."""
    folder = tmp_path / "checkpoint-4"
    folder.mkdir()
    states = {"TrainedOn": trained_on(2, 4, 2).to_state()}
    state = {"global_step": 4, "stateful_callbacks": states}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return folder


def test_steps_of_as_many_examples_go_on(checkpoint):
    for split in ((2, 4, 2), (1, 4, 4), (4, 4, 1), (1, 16, 1)):
        assert find_checkpoint(trained_on(*split), checkpoint.parent) == checkpoint


def test_steps_of_more_examples_are_refused(checkpoint):
    with pytest.raises(
        ValueError,
        match=r"checkpoint-4 was trained by 2 processes x 4 examples x 2 accumulated = 16 per "
        r"step, and cannot be continued by 1 process x 4 examples x 2 accumulated = 8: .*Choose",
    ):
        find_checkpoint(trained_on(1, 4, 2), checkpoint.parent)


def test_a_fixed_split_must_be_the_same(checkpoint):
    find_checkpoint(trained_on(2, 4, 2), checkpoint.parent, fixed="the dice are fixed")
    with pytest.raises(
        ValueError, match=r"cannot be continued by 1 process x .*: the dice are fixed. Choose"
    ):
        find_checkpoint(trained_on(1, 8, 2), checkpoint.parent, fixed="the dice are fixed")
