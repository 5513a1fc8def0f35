"""Columns chosen from the training data: which data, by how many processes, and when resumed."""

import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from rich.console import Console

from pacatune.selection import load_columns
from pacatune.training import PacaSection, train
from pacatune.training.config_file import to_values
from pacatune.training.selecting import share_of_batches
from pacatune.training.task import make_adapter_config, task_of


def quiet():
    return Console(file=io.StringIO(), width=200)


def run_of(seed=7, **options):
    training = {"seed": seed, "per_device_train_batch_size": 4, "process_index": 0, "world_size": 1}
    section = SimpleNamespace(selection_batches=options.pop("selection_batches", 100))
    return SimpleNamespace(paca=section, training=SimpleNamespace(**{**training, **options}))


def test_processes_share_the_batches_of_one():
    one = list(share_of_batches(23, run_of(), tuple))
    assert sorted(place for batch in one for place in batch) == list(range(23))
    assert [len(batch) for batch in one] == [4, 4, 4, 4, 4, 3]
    shares = [
        list(share_of_batches(23, run_of(process_index=rank, world_size=2), tuple))
        for rank in range(2)
    ]
    assert shares == [one[0::2], one[1::2]]
    assert list(share_of_batches(23, run_of(selection_batches=2), tuple)) == one[:2]
    assert list(share_of_batches(23, run_of(seed=8), tuple)) != one


def test_a_batch_is_what_the_trainer_makes_of_it(make_config, tiny_tokenizer):
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "place": 1}]
    rows += [{"input_ids": [8], "labels": [8], "place": 2}]
    task = task_of(make_config())
    task.tokenizer = tiny_tokenizer
    batch = task.collate(rows, [1, 0])
    padding = tiny_tokenizer.pad_token_id
    assert batch["input_ids"].tolist() == [[8, padding, padding], [5, 6, 7]]
    assert batch["labels"].tolist() == [[8, -100, -100], [-100, 6, 7]]
    assert batch["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    task.tokenizer = SimpleNamespace(pad_token_id=None, eos_token_id=2)
    assert task.collate(rows, [1, 0])["input_ids"].tolist()[0] == [8, 2, 2]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_run_chooses_by_gradient(make_config, tiny_model_dir, checkpointing):
    from transformers import AutoModelForCausalLM

    from pacatune import PacaConfig
    from pacatune.selection import choose_columns, collect_statistics

    section = PacaSection(
        r=4, selection="gradient", selection_batches=3, target_modules=["q_proj", "down_proj"]
    )
    name = "activation_checkpointing"  # of transformers from 5.24 on
    name = name if hasattr(make_config().training, name) else "gradient_checkpointing"
    config = make_config(paca=section, training={"max_steps": 2, name: checkpointing})
    console = quiet()
    report = train(config, console=console)
    text = console.file.getvalue()
    assert "columns chosen by gradient from 3 batches (" in text
    assert report.columns == "gradient, num_batches 3"
    assert ("columns", report.columns) in report.table()
    folder = Path(config.training.output_dir)
    saved = json.loads((folder / "adapter_config.json").read_text())
    assert (saved["selection"], saved["selection_options"]) == ("gradient", {"num_batches": 3})
    assert saved["columns"] == load_columns(folder)

    # By hand, on the same batches.
    task = task_of(config)
    data = task.prepare().train
    batches = share_of_batches(len(data), config, lambda places: task.collate(data, places))
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    options = PacaConfig(r=4, selection="gradient", target_modules=["q_proj", "down_proj"])
    expected = choose_columns(base, options, collect_statistics(base, batches, options))
    assert expected.columns == saved["columns"]


def test_choosing_changes_nothing_else(make_config, tmp_path):
    """A run whose given columns are those that the first one chose has the same losses."""
    training = {"max_steps": 3, "lr_scheduler_type": "constant"}
    section = PacaSection(r=4, selection="gradient", selection_batches=2)
    first = train(make_config(paca=section, training=training), console=quiet())
    section = PacaSection(r=4, selection=str(tmp_path / "out"))
    training["output_dir"] = str(tmp_path / "given")
    second = train(make_config(paca=section, training=training), console=quiet())
    assert first.train_losses == second.train_losses
    assert second.columns == "fixed"


def test_a_resumed_run_keeps_its_columns(make_config, tmp_path):
    section = PacaSection(r=4, selection="gradient", selection_batches=2)
    config = make_config(paca=section, training={"max_steps": 4, "save_total_limit": 9})
    whole = train(config, console=quiet())
    shutil.copytree(tmp_path / "out", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/checkpoint-4")
    (tmp_path / "cut/report.json").unlink()
    training = {"max_steps": 4, "save_total_limit": 9, "output_dir": str(tmp_path / "cut")}
    console = quiet()
    cut = train(make_config(paca=section, training=training), resume=True, console=console)
    assert "columns chosen" not in console.file.getvalue()
    assert load_columns(tmp_path / "cut") == load_columns(tmp_path / "out")
    assert cut.eval_loss_after == whole.eval_loss_after
    assert cut.train_losses[-1] == pytest.approx(whole.train_losses[-1])


def test_a_folder_is_known_by_its_name(make_config, tmp_path, monkeypatch):
    """As a path, or where no strategy is called like it; it is saved with its whole path."""
    monkeypatch.chdir(tmp_path)
    for name in ("some-run", "gradient"):
        (tmp_path / name).mkdir()
    for given, saved in (
        ("some-run", str(tmp_path / "some-run")),
        ("gradient", "gradient"),
        ("./gradient", str(tmp_path / "gradient")),
    ):
        config = make_config(paca=PacaSection(selection=given))
        assert to_values(config)["paca"]["selection"] == saved


def test_fixed_columns_in_yaml(make_config):
    given = yaml.safe_load("{q_proj: [0, 3], v_proj: [1, 2]}")
    section = PacaSection(r=2, selection=given, target_modules=["q_proj", "v_proj"])
    adapter_config = make_adapter_config(make_config(paca=section))
    assert (adapter_config.selection, adapter_config.columns) == ("fixed", given)
    assert task_of(make_config(paca=section)).plan().targets


def test_fixed_columns_that_do_not_fit_are_found_before_the_weights_are_loaded(make_config):
    section = PacaSection(r=2, selection={"q_proj": [0, 99]}, target_modules=["q_proj"])
    config = make_config(paca=section)
    with pytest.raises(ValueError, match=r"gives column 99 for 'model.layers.0.self_attn.q_p"):
        task_of(config).plan()


def test_files_that_are_not_there(make_config, tmp_path):
    section = PacaSection(selection=str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"none'\) is no strategy, and no file or folder of this"):
        task_of(make_config(paca=section))
    with pytest.raises(ValueError, match=r"`paca.selection` \('gradent'\) .* mean 'gradient'\?"):
        task_of(make_config(paca=PacaSection(selection="gradent")))
    with pytest.raises(ValueError, match=r"`paca.selection_batches` \(0\) must be at least 1"):
        PacaSection(selection_batches=0)
    with pytest.raises(
        ValueError, match=r"`paca.paca_alpha` \(0\) .* must not be 0: nothing would"
    ):
        PacaSection(paca_alpha=0)
    with pytest.raises(ValueError, match=r"`paca.alpha_pattern` \(\{'up': 0\}\) must not be 0"):
        PacaSection(alpha_pattern={"up": 0})


@pytest.mark.parametrize("options", [{"selection": "gradient"}, {"normalize": "input"}])
def test_sharded_models_are_refused(make_config, monkeypatch, options):
    for name, value in (
        ("ACCELERATE_USE_FSDP", "true"),
        ("FSDP_VERSION", "2"),
    ):
        monkeypatch.setenv(name, value)
    config = make_config(paca=PacaSection(**options))
    message = r"`paca.selection` \(.*\) or `paca.normalize` \(.*\) .* which FSDP shards; choose"
    with pytest.raises(ValueError, match=message):
        train(config, console=quiet())
    assert not Path(config.training.output_dir).exists()


def test_a_moslora_run(make_config, tiny_model_dir):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from pacatune.training import LoraSection, MosLoraSection
    from pacatune.tuner.moslora import MosLoraLayer

    sections = {
        "lora": LoraSection(r=4, lora_dropout=0.1),
        "moslora": MosLoraSection(mixer_init="orthogonal"),
    }
    config = make_config("moslora", data={"eval_fraction": 0.1}, **sections)
    report = train(config, console=quiet())
    assert report.eval_loss_after < report.eval_loss_before - 0.1
    folder = Path(config.training.output_dir)
    saved = json.loads((folder / "adapter_config.json").read_text())
    assert (saved["peft_type"], saved["mixer_init"], saved["r"]) == ("MOSLORA", "orthogonal", 4)
    card = (folder / "README.md").read_text()
    assert "# MosLoRA fine-tuning" in card
    assert "import pacatune  # makes MosLoRA known to PEFT" in card
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), folder)
    mixers = [
        m.lora_mixer["default"].weight for m in model.modules() if isinstance(m, MosLoraLayer)
    ]
    assert len(mixers) == 14
    assert not any(torch.allclose(m @ m.t(), torch.eye(4), atol=1e-5) for m in mixers)  # trained


class TestNormalised:
    """Rates of columns: found before training, saved, kept by a resumed run, taken from another."""

    def options(self, normalize, selection="random", **more):
        return PacaSection(
            r=4, selection=selection, selection_batches=2, normalize=normalize, **more
        )

    def test_a_run_normalises_by_input(self, make_config, tiny_model_dir):
        from transformers import AutoModelForCausalLM

        from pacatune import PacaConfig
        from pacatune.selection import choose_columns, collect_statistics

        config = make_config(paca=self.options("input"), training={"max_steps": 2})
        console = quiet()
        report = train(config, console=console)
        said = "columns chosen by random and normalised by input from 2 batches ("
        assert said in console.file.getvalue()
        assert report.columns == "random, num_batches 2, normalize input"
        saved = json.loads((Path(config.training.output_dir) / "adapter_config.json").read_text())
        assert saved["normalize"] == "input"

        # By hand, on the same batches.
        task = task_of(config)
        data = task.prepare().train
        batches = share_of_batches(len(data), config, lambda places: task.collate(data, places))
        base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
        options = PacaConfig(r=4, normalize="input")
        expected = choose_columns(base, options, collect_statistics(base, batches, options))
        assert expected.column_rates == saved["column_rates"]
        assert expected.columns == load_columns(config.training.output_dir) == saved["columns"]

    @pytest.mark.parametrize(("normalize", "use_rslora"), [("input", False), ("weight", True)])
    def test_a_resumed_run_ends_with_the_same_bits(
        self, make_config, tmp_path, normalize, use_rslora
    ):
        section = self.options(normalize, use_rslora=use_rslora, rank_pattern={"q_proj": 2})
        training = {"max_steps": 4, "save_total_limit": 9}
        train(make_config(paca=section, training=training), console=quiet())
        whole, cut = tmp_path / "out", tmp_path / "cut"
        shutil.copytree(whole, cut)
        shutil.rmtree(cut / "checkpoint-4")
        for name in ("report.json", "adapter_config.json", "adapter_model.safetensors"):
            (cut / name).unlink()
        training["output_dir"] = str(cut)
        console = quiet()
        train(make_config(paca=section, training=training), resume=True, console=console)
        assert "normalised by" not in console.file.getvalue()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            assert (cut / name).read_bytes() == (whole / name).read_bytes()

    @pytest.mark.parametrize("normalize", ["input", "weight"])
    def test_rates_come_with_the_columns_of_another_run(self, make_config, tmp_path, normalize):
        training = {"max_steps": 3, "lr_scheduler_type": "constant"}
        first = make_config(paca=self.options(normalize), training=training)
        report = train(first, console=quiet())
        section = self.options(normalize, str(tmp_path / "out"))
        training["output_dir"] = str(tmp_path / "given")
        console = quiet()
        second = train(make_config(paca=section, training=training), console=console)
        assert "normalised by" not in console.file.getvalue()
        assert second.train_losses == report.train_losses
        saved = [
            json.loads((tmp_path / one / "adapter_config.json").read_text())["column_rates"]
            for one in ("out", "given")
        ]
        assert saved[0] == saved[1]


def test_row_groups_in_a_run(make_config, tmp_path):
    """Trained, saved, resumed, and taken over by another run."""
    section = PacaSection(r=4, paca_alpha=4, groups=8)
    config = make_config(paca=section, training={"max_steps": 2}, data={"eval_fraction": 0.1})
    report = train(config, console=quiet())
    equal = task_of(make_config(paca=PacaSection(r=4))).plan().num_trainable_parameters
    assert report.num_trainable_parameters == equal
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (saved["groups"], saved["peft_type"]) == (8, "PACATUNE")
    columns = load_columns(tmp_path / "out")
    assert all(len(groups) == 8 and len(groups[0]) == 4 for groups in columns.values())
    section = PacaSection(r=4, groups=8, selection=str(tmp_path / "out"))
    assert make_adapter_config(make_config(paca=section)).columns == columns
    with pytest.raises(ValueError, match=r"must be a list of column numbers"):
        make_adapter_config(make_config(paca=PacaSection(r=4, selection=str(tmp_path / "out"))))
