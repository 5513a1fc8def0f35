import traceback

import pytest

from pacatune.evaluation.mt_bench import MtBenchConfig


def config(tmp_path, **options):
    return MtBenchConfig(**{"output": tmp_path, "model": "m", "judge_url": "http://a"} | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": None}, "nothing to evaluate; give --model, --adapter, or --answers"),
        ({"answers": "a.jsonl"}, "--answers .* are there already.*drop --model and --adapter"),
        ({"model": None, "answers": "a", "no_judge": True}, "--answers with --no-judge leaves"),
        ({"judge_url": None}, "--judge-url is missing; .* https://api.openai.com/v1 .*--no-judge"),
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
