"""What is said before and instead of training."""

import json
import shutil

import pytest
import torch

from pacatune.training import LoraSection, PacaSection, preview, train
from pacatune.training import recipe as recipe_module
from pacatune.training import sft as models
from pacatune.training.sft import SftRunTrainer


def test_targets_and_parameters_are_shown_before_training(make_config, console):
    train(make_config(training={"max_steps": 1}), console=console)
    out = console.file.getvalue()
    assert "training 8,192 of 37,792 parameters (paca): 2 x q_proj (32 -> 32)" in out
    assert out.index("data: 57 examples, 3 held out") < out.index("step 0/1: evaluation loss")
    assert "held-out loss after" in out


def test_preview_loads_no_weights(make_config, console, monkeypatch):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    preview(make_config(), 2, console=console)
    out = console.file.getvalue()
    assert out.count("tokens,") == 2
    assert "[[It is 7.</s>]]" in out


def test_warnings_about_the_data_are_shown(make_config, console):
    config = make_config(training={"max_steps": 1, "max_length": 18})
    train(config, console=console)
    assert "training examples are cut at `training.max_length` (18;" in console.file.getvalue()


class TestBeforeWeights:
    """What is refused, is refused before any weight is loaded and anything is written."""

    @pytest.fixture(autouse=True)
    def no_weights(self, monkeypatch, tmp_path):
        def refuse(config):
            raise AssertionError("weights were loaded")

        monkeypatch.setattr(models, "load_model", refuse)
        yield
        assert not (tmp_path / "out").exists()

    def test_bad_row(self, make_config, tmp_path):
        path = tmp_path / "bad.jsonl"
        path.write_text('{"text": "a"}\n{"text": ""}\n')
        with pytest.raises(ValueError, match=r"bad.jsonl, row 2: 'text' is empty"):
            train(make_config(data={"path": str(path)}))

    def test_target_that_matches_nothing(self, make_config):
        from pacatune.training import LoraSection, PacaSection

        with pytest.raises(ValueError, match="no_such"):
            train(make_config(paca=PacaSection(target_modules=["no_such"])))
        with pytest.raises(ValueError, match="no_such"):
            train(make_config("lora", lora=LoraSection(target_modules=["no_such"])))

    def test_rank_out_of_range(self, make_config):
        from pacatune.training import PacaSection

        with pytest.raises(ValueError, match=r"33.*32"):
            train(make_config(paca=PacaSection(r=33)))

    def test_packing_without_flash_attention(self, make_config):
        with pytest.raises(
            ValueError,
            match=r"`model.attn_implementation` \(None\): flash attention alone keeps packed "
            "examples apart in every model; set it to flash_attention_2",
        ):
            train(make_config(training={"packing": True}))

    def test_flash_attention_that_is_not_installed(self, make_config):
        with pytest.raises(ValueError, match=r"\('flash_attention_2'\) cannot be used"):
            train(make_config(model={"attn_implementation": "flash_attention_2"}))

    def test_tracker_that_is_not_installed(self, make_config):
        with pytest.raises(ValueError, match=r"`training.report_to` \('wandb'\) is not installed"):
            train(make_config(training={"report_to": "wandb"}))

    def test_resume_of_nothing(self, make_config):
        with pytest.raises(ValueError, match="out holds no run to resume; start it without"):
            train(make_config(), resume=True)

    def test_model_that_does_not_exist(self, make_config):
        with pytest.raises(OSError, match="no/such"):
            train(make_config(model={"path": "./no/such"}))


def test_too_long_for_the_model_is_a_warning(make_config, tmp_path, console):
    path = tmp_path / "long.jsonl"
    rows = [{"text": "It is so. " * 80}, {"text": "No."}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"path": str(path), "eval_fraction": 0}
    train(make_config(data=data, training={"max_steps": 1}), console=console)
    assert "tokens, but the model was made for 256; lower `training.max_length`" in (
        console.file.getvalue()
    )


def test_out_of_memory_says_what_to_lower(make_config, console, monkeypatch):
    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(SftRunTrainer, "training_step", out_of_memory)
    with pytest.raises(ValueError, match=r"out of memory .*`training.per_device_train_batch_size`"):
        train(make_config(), console=console)


def test_several_gpus_in_one_process(make_config, monkeypatch):
    config = make_config()
    monkeypatch.setattr(type(config.training), "n_gpu", 2)
    with pytest.raises(ValueError, match="2 GPUs are visible to one process; start one process"):
        train(config)


def test_weights_that_are_cut_off(make_config, tiny_model_dir, tmp_path):
    shutil.copytree(tiny_model_dir, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:40_000])
    with pytest.raises(ValueError, match=r"the weights of .*cut cannot be read \(.*\); copy them"):
        train(make_config(model={"path": str(tmp_path / "cut")}))


def test_checkpoint_that_is_cut_off(make_config, tmp_path, console, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(recipe_module, "save_result", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(make_config(training={"max_steps": 2}), console=console)
    weights = tmp_path / "out" / "checkpoint-2" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:4_000])
    with pytest.raises(ValueError, match=r"the weights of .*checkpoint-2 cannot be read"):
        train(make_config(training={"max_steps": 2}), resume=True, console=console)


def interrupt(*args):
    raise KeyboardInterrupt


def test_tokenizer_on_a_full_disk(make_config, tmp_path, console, monkeypatch):
    """tokenizers reports it by an Exception of no class of its own."""

    def save_pretrained(self, *args, **kwargs):
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", save_pretrained)
    with pytest.raises(
        OSError, match=r"could not save checkpoint-2 in .*\(No space left on device"
    ):
        train(make_config(), console=console)


@pytest.mark.parametrize(("method", "section"), [("paca", PacaSection), ("lora", LoraSection)])
def test_expression_that_does_not_compile(make_config, method, section):
    with pytest.raises(ValueError, match=rf"`{method}.target_modules` \('\(q'\) is no regular exp"):
        make_config(method, **{method: section(target_modules="(q")})


@pytest.mark.parametrize("method", ["paca", "lora"])
def test_pattern_that_matches_nothing(make_config, method):
    section = {"paca": PacaSection, "lora": LoraSection}[method](rank_pattern={"q_prj": 2})
    with pytest.raises(ValueError, match=r"`rank_pattern`: 'q_prj' matches nothing .* 'q_proj'\?"):
        train(make_config(method, **{method: section}))
