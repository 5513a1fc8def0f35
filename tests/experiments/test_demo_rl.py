"""`pacatune demo-rl` as a user runs it, on a tiny model."""

import json

import pytest
import torch

from pacatune.cli import main
from pacatune.experiments import demo_rl


@pytest.fixture(scope="module")
def words(tiny_model_dir):
    """The command for a tiny model, with few steps and problems."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_rl, "NUM_SOLVED", 16)
        patch.setattr(demo_rl, "NUM_PROMPTS", 60)
        patch.setattr(demo_rl, "LORA_STEPS", 2)
        yield [
            *("demo-rl", "--model", str(tiny_model_dir)),
            *("--steps", "2", "--held-out", "6"),
        ]


def test_result_has_what_is_printed(finished):
    folder, lines = finished
    result = json.loads((folder / "demo-rl.json").read_text())
    assert result["finished"]
    assert list(result["rewards"]) == ["before", "after SFT", "after GRPO"]
    table = "\n".join(lines)
    for one in result["rewards"].values():
        assert 0 <= one["greedy"] <= 1
        assert f"{one['sampled']:.3f}" in table
    assert len(result["train_rewards"]) == 2
    sizes = result["sync_bytes"]
    assert 0 < sizes["paca"] < sizes["lora_merged"] < sizes["full"]
    assert f"{sizes['paca'] / 1e6:.2f}" in table
    assert (folder / "paca" / "adapter_model.safetensors").is_file()


def test_gap_is_zero_where_the_weights_are_equal(finished):
    folder, _ = finished
    gaps = json.loads((folder / "demo-rl.json").read_text())["gaps"]
    assert gaps["paca"]["weights_equal"]
    assert gaps["paca"]["by_weights"] == 0
    assert not gaps["lora"]["weights_equal"]
    assert gaps["lora"]["by_weights"] > 0


def test_bytes_are_those_of_the_tensors(finished):
    folder, _ = finished
    sizes = demo_rl.sync_bytes(str(folder / "start"), folder / "paca")
    model, _ = demo_rl.load(str(folder / "start"))
    assert sizes["full"] == 2 * sum(p.numel() for p in model.parameters())
    linear = [m for m in model.model.modules() if isinstance(m, torch.nn.Linear)]
    assert sizes["lora_merged"] == 2 * sum(m.weight.numel() for m in linear)
    assert sizes["paca"] == 2 * sum(demo_rl.RANK * m.out_features for m in linear)


def test_held_out_problems_are_new_and_scored():
    data = demo_rl.training_prompts(0)
    problems = demo_rl.held_out_problems(data, 20)
    assert len(set(problems.prompts)) == 20
    from pacatune.data.prompts import reasoning_gym_data

    known = reasoning_gym_data(data)
    seen = {demo_rl.prompt_of(known[i]["question"]) for i in range(len(known))}
    assert not seen & set(problems.prompts)
    right = [reasoning_gym_data(problems.data)[i]["answer"] for i in problems.indices]
    assert problems.scores(right) == [1.0] * 20
    assert max(problems.scores(["none"] * 20)) < 0.5


@pytest.mark.parametrize(
    ("after", "said"),
    [(0.075, "no more than two standard errors"), (0.5, "rose: 0.025"), (0.0, "did not rise")],
)
def test_only_a_rise_beyond_chance_is_called_one(after, said):
    assert said in demo_rl._change(0.025, after, 40)


def test_folder_of_something_else_stays(tmp_path, words, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert main([*words, "--output", str(tmp_path)]) == 2
    assert "no demo-rl.json" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
