"""`pacatune demo-rl` as a user runs it, on a tiny model."""

import json

import pytest
import torch

from pacatune.adapters.base import load_base
from pacatune.adapters.loading import load_language_model
from pacatune.cli import main
from pacatune.data.prompts import reasoning_gym_data
from pacatune.experiments import demo_rl


@pytest.fixture(scope="module")
def words(tiny_model_dir):
    """The command for a tiny model, with few steps and problems."""
    with pytest.MonkeyPatch.context() as patch:
        # A model that reverses no list gets no reward, and learns nothing; any number gets some.
        patch.setattr(demo_rl, "TASK", "reasoning-gym:chain_sum")
        patch.setattr(demo_rl, "OPTIONS", {"min_terms": 2, "max_terms": 2})
        patch.setattr(demo_rl, "NUM_SOLVED", 16)
        patch.setattr(demo_rl, "NUM_PROMPTS", 60)
        patch.setattr(demo_rl, "LORA_STEPS", 2)
        patch.setattr(demo_rl, "NUM_COMPARED", 4)
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
    assert "rise" in table or "rose" in table
    assert result["examples"][0]["question"].strip().splitlines()[-1] in table
    assert len(result["train_rewards"]) == 2
    assert f"{result['sync_bytes']['paca'] / 1e6:.2f}" in table
    assert (folder / "paca" / "adapter_model.safetensors").is_file()
    assert (folder / "paca" / "reward.png").is_file()


def test_gap_is_zero_for_paca_alone(finished):
    folder, _ = finished
    gaps = json.loads((folder / "demo-rl.json").read_text())["gaps"]
    assert gaps["paca"] == 0
    assert gaps["lora"] > 0


def test_bytes_are_those_of_the_tensors(finished):
    folder, _ = finished
    sizes = json.loads((folder / "demo-rl.json").read_text())["sync_bytes"]
    model = load_base(str(folder / "start"), task_type="CAUSAL_LM", dtype="float32", device="cpu")
    assert sizes["full"] == 2 * sum(p.numel() for p in model.parameters())
    linear = [m for m in model.model.modules() if isinstance(m, torch.nn.Linear)]
    assert sizes["lora_merged"] == 2 * sum(m.weight.numel() for m in linear)
    columns = 2 * sum(demo_rl.RANK * m.out_features for m in linear)
    assert columns < sizes["paca"] < columns + 500
    assert 8 * demo_rl.RANK * len(linear) < sizes["paca_positions"]


def test_sampler_has_the_trained_columns(finished):
    folder, _ = finished
    start = str(folder / "start")
    trainer = load_language_model(start, folder / "paca", dtype="bfloat16").model
    sampler = load_language_model(start, dtype="bfloat16").model
    demo_rl.sync_columns(trainer, sampler)
    merged = trainer.merge_and_unload().state_dict()
    for name, tensor in sampler.state_dict().items():
        assert torch.equal(tensor, merged[name]), name


def test_held_out_problems_are_new_and_scored():
    data = demo_rl.training_prompts(0)
    problems = demo_rl.held_out_problems(data, 20)
    assert len(set(problems.questions)) == 20
    known = reasoning_gym_data(data)
    seen = {known[i]["question"] for i in range(len(known))}
    assert not seen & set(problems.questions)
    right = [reasoning_gym_data(problems.data)[i]["answer"] for i in problems.indices]
    assert problems.scores(right) == [1.0] * 20
    assert problems.scores(["none"] * 20) == [0.0] * 20


@pytest.mark.parametrize(
    ("num_better", "said"),
    [(2, "no more than two standard errors"), (20, r"rose (+0.500"), (0, "did not rise")],
)
def test_only_a_rise_beyond_chance_is_called_one(num_better, said):
    before = [0.0] * 40
    after = [1.0] * num_better + [0.0] * (40 - num_better)
    assert said in str(demo_rl.Rise.between(before, after))


def test_answer_is_learned_with_its_end(tiny_tokenizer):
    question = {"role": "user", "content": "Reverse it.\n\nReverse this list: go, on\n"}
    answer = {"role": "assistant", "content": "on, go"}
    chat = tiny_tokenizer.apply_chat_template(
        [question, answer], chat_template=demo_rl.TEMPLATE, tokenize=False
    )
    assert chat == f"go, on\non, go{tiny_tokenizer.eos_token}"


def test_folder_of_something_else_stays(tmp_path, words, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert main([*words, "--output", str(tmp_path)]) == 2
    assert "did not write, or that were changed since (notes.txt)" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
