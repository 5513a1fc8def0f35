import pytest
import yaml

from pacatune.training.config_file import (
    changed_keys,
    check_keys,
    load_yaml,
    read_values,
    suggest,
    to_values,
)
from tests.training.launching import save_config

KNOWN = {"method", "model.path", "data.path", "data.split", "paca.r", "paca.rank_pattern"}


def test_saved_values_come_back(make_config, tmp_path):
    config = make_config(training={"lr_scheduler_type": "linear", "optim_args": "a=1"})
    save_config(config, tmp_path / "config.yaml")
    values = read_values(tmp_path / "config.yaml")
    assert values == to_values(config)
    assert values["training"]["lr_scheduler_type"] == "linear"
    assert values["training"]["optim_args"] == "a=1"
    assert values["training"]["bf16"] is False
    assert "per_device_train_batch_size" not in values["training"]


def test_local_paths_are_saved_absolute(make_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "d.jsonl").touch()
    config = make_config(
        model={"path": "model"},
        data={"path": "d.jsonl", "eval_path": "owner/data", "chat_template": "{{ x }}" * 1000},
    )
    values = to_values(config)
    assert values["model"]["path"] == str(tmp_path / "model")
    assert values["data"]["path"] == str(tmp_path / "d.jsonl")
    assert values["data"]["eval_path"] == "owner/data"
    assert values["data"]["chat_template"] == "{{ x }}" * 1000


def test_secrets_are_not_saved(make_config, tmp_path):
    config = make_config(training={"hub_token": "hf_secret", "run_name": "x"})
    save_config(config, tmp_path / "config.yaml")
    assert "hf_secret" not in (tmp_path / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("1e-3", 1e-3),
        ("5.0E-4", 5e-4),
        (".5", 0.5),
        ("-3", -3),
        ("12", 12),
        ("1.", 1.0),
        (".inf", float("inf")),
        ("2024-01-01", "2024-01-01"),
        ("'12'", "12"),
        ("1.2.3", "1.2.3"),
    ],
)
def test_values_are_those_of_yaml_1_2(text, value):
    loaded = load_yaml(text)
    assert loaded == value
    assert type(loaded) is type(value)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config file .*no.yaml does not exist; check"):
        read_values(tmp_path / "no.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [1", "is not valid YAML"),
        (b"a: \xff", "is not valid YAML"),
        ("a: !!python/object/apply:os.system ['x']", "is not valid YAML"),
        ("- a", "holds a list; it must be a mapping"),
        ("", "holds a NoneType; it must be a mapping"),
        ("a: " + "[" * 5000 + "]" * 5000, "is not valid YAML"),
    ],
)
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "config.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read_values(path)


@pytest.mark.parametrize(
    ("text", "key", "nearest"),
    [
        ("modle: {path: x}", "modle", "model"),
        ("model: {pth: x}", "model.pth", "model.path"),
        ("rank_pattrn: {}", "rank_pattrn", "paca.rank_pattern"),
        ("r: 3", "r", "paca.r"),
        ("metod: lora", "metod", "method"),
    ],
)
def test_unknown_keys_name_the_nearest(text, key, nearest):
    with pytest.raises(ValueError, match=f"run.yaml: unknown key '{key}'; did you mean '{nearest}"):
        check_keys(yaml.safe_load(text), KNOWN, "run.yaml")


def test_a_key_like_no_other_lists_its_section():
    with pytest.raises(ValueError, match=r"none is like it\. There are data\.path, data\.split\.$"):
        check_keys({"data": {"train": "x"}}, KNOWN, "run.yaml")


def test_known_keys_pass():
    text = "method: lora\nmodel: {path: x}\npaca: {rank_pattern: {q_proj: 4}}\ndata:"
    check_keys(yaml.safe_load(text), KNOWN, "run.yaml")


def test_changed_keys():
    old = {"method": "paca", "paca": {"r": 8, "rank_pattern": {}}, "training": {"seed": 1}}
    assert changed_keys(old, old) == []
    new = {
        "method": "lora",
        "paca": {"r": 8, "rank_pattern": {"q": 1}},
        "training": {"seed": 1, "max_steps": 3, "output_dir": "elsewhere"},
    }
    assert changed_keys(old, new) == [
        "method: 'paca' -> 'lora'",
        "paca.rank_pattern: {} -> {'q': 1}",
        "training.max_steps: None -> 3",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("paca: {r: 4}\nlora: {}\npaca: {r: 8}\n", r'duplicate key "paca" .* \(line 3\)'),
        ("paca:\n  r: 4\n  r: 8\n", r'duplicate key "r" .* \(line 3\)'),
        ("paca: {r: 4, r: 8}\n", r'duplicate key "r"'),
    ],
)
def test_key_given_twice(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_values(path)


def test_merged_keys_of_yaml_are_no_repetition(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("a: &a {r: 4, s: 1}\nb: {<<: *a, r: 8}\n")
    assert read_values(path)["b"] == {"r": 8, "s": 1}


def test_a_misspelt_section_is_told_from_others_with_the_same_option():
    known = ["data.path", "model.path", "training.seed"]
    assert suggest("modle.path", known).startswith("did you mean 'model.path'?")
    assert suggest("dta.path", known).startswith("did you mean 'data.path'?")
