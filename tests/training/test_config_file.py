import pytest
import yaml

from pacatune.training.config_file import (
    check_keys,
    load_yaml,
    local_paths,
    read_values,
    to_values,
    without_folders,
)
from tests.training.launching import save_config

KNOWN = {"method", "model.path", "data.path", "data.split", "paca.r", "paca.rank_pattern"}


def test_saved_values_come_back(make_config, tmp_path):
    training = {"lr_scheduler_type": "linear", "optim_args": "a=1"}
    config, path = make_config(training=training), tmp_path / "config.yaml"
    save_config(config, path)
    values = read_values(path)
    assert values == to_values(config)
    assert values["training"].items() >= {"lr_scheduler_type": "linear", "bf16": False}.items()
    assert "per_device_train_batch_size" not in values["training"]


def test_local_paths_are_saved_absolute(make_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "d.jsonl").touch()
    text = "{{ x }}" * 1000
    data = {"path": "d.jsonl", "eval_path": "owner/data", "chat_template": text}
    values = to_values(make_config(model={"path": "model"}, data=data))
    assert values["model"]["path"] == str(tmp_path / "model")
    found = [values["data"][name] for name in data]
    assert found == [str(tmp_path / "d.jsonl"), "owner/data", text]
    sources = [{"path": "d.jsonl", "weight": 3}, {"path": "no/such", "weight": 1}]
    config = make_config(data={"path": "", "datasets": sources})
    saved = to_values(config)["data"]["datasets"]
    assert [one["path"] for one in saved] == [str(tmp_path / "d.jsonl"), "no/such"]
    assert local_paths(config)["data.datasets[0].path"] == str(tmp_path / "d.jsonl")


def test_values_are_those_of_yaml_1_2():
    for text, value in {
        **{"no": "no", "true": True, "null": None, "1e-3": 1e-3, "2024-01-01": "2024-01-01"},
    }.items():
        loaded = load_yaml(text)
        assert loaded == value, text
        assert type(loaded) is type(value), text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [1", "is not valid YAML"),
        (b"a: \xff", "is not valid YAML"),
        ("a: " + "[" * 5000 + "]" * 5000, "is not valid YAML"),
        ("a: !!python/object/apply:os.system ['x']", "is not valid YAML"),
        ("- a", "holds a list; it must be a mapping"),
        ("paca: {r: 4}\nlora: {}\npaca: {r: 8}\n", r'duplicate key "paca" .* \(line 3\)'),
        (None, r"config file .*config.yaml does not exist; check"),
    ],
)
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_values(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: {path: x}", "run.yaml: unknown key 'modle'; did you mean 'model"),
        ("data: {train: x}", r"none is like it\. There are data\.path, data\.split\.$"),
    ],
)
def test_unknown_keys_name_the_nearest(text, message):
    with pytest.raises(ValueError, match=message):
        check_keys(yaml.safe_load(text), KNOWN, "run.yaml")


def test_what_others_read_has_names_alone(make_config, tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.jsonl").touch()
    config = make_config(data={"path": str(tmp_path / "d")})
    text = f"{tmp_path}/d/a.jsonl, row 3; of `{tmp_path}/d`; {tmp_path}/d2; a/d"
    assert without_folders(text, config) == f"d/a.jsonl, row 3; of `d`; {tmp_path}/d2; a/d"
