"""The steps of the arms of a study, on a tiny model."""

from pathlib import Path

import pytest

from benchmarks.cost import STUDIES, steps_of
from benchmarks.results import ROOT
from benchmarks.verdict import is_paca
from pacatune.study import Arm, StudyConfig
from pacatune.study.config import read_study
from pacatune.study.plan import make_plan
from tests.study.conftest import chats, text_options  # noqa: F401 (fixtures)


def test_every_arm_makes_a_step(text_options, tmp_path):  # noqa: F811
    arms = {"paca": Arm(rank=2), "lora": Arm(method="lora", rank=2), "full": Arm(method="full")}
    plan = make_plan(StudyConfig(options=text_options, arms=arms, seeds=[0]))
    steps = steps_of(plan, tmp_path)
    assert list(steps) == list(arms)
    batches = [step.batch["input_ids"].tolist() for step in steps.values()]
    assert batches == [batches[0]] * 3
    for name, step in steps.items():
        trained = [p for p in step.trainer.model.parameters() if p.requires_grad]
        before = [p.detach().clone() for p in trained]
        assert step() > 0
        changed = [not p.equal(old) for p, old in zip(trained, before, strict=True)]
        assert any(changed), name
        assert all(p.grad is None for p in trained), name


@pytest.mark.parametrize(
    "path", sorted(Path(ROOT, "benchmarks/studies").glob("cost-*.yaml")), ids=lambda p: p.stem
)
def test_studies_at_equal_cost_have_the_same_arms(path):
    config = read_study(path)
    assert config.choose_by == "loss"
    first = read_study(ROOT / "benchmarks" / "studies" / f"{STUDIES[0]}.yaml")
    arms = {name: (arm.method, arm.rank, arm.alpha) for name, arm in config.arms.items()}
    expected = {name: (arm.method, arm.rank, arm.alpha) for name, arm in first.arms.items()}
    assert arms == {name: one for name, one in expected.items() if name in arms}
    if path.stem[-1].isdigit():  # of stage 2, where some arms go on: their rates, then all seeds
        assert arms.keys() == read_study(path.with_stem(f"{path.stem[:-1]}2")).arms.keys()
        assert (config.tuning_seeds == len(config.seeds)) == path.stem.endswith("2")
    elif path.stem.endswith("words"):  # runs last, without rivals that the other task has left
        gone_on = read_study(path.with_name("cost-smollm2-sort-2.yaml")).arms
        assert arms.keys() == gone_on.keys() | set(filter(is_paca, expected))
    else:
        assert set(expected) - set(arms) <= {"full"}
