"""Several data sets in one run, whole or by weights."""

import copy
import json
from collections import Counter
from pathlib import Path

import pytest
import yaml

from pacatune.cli.train import read_run
from pacatune.data import DataConfig, prepare_data
from pacatune.training.config_file import local_paths, to_values


@pytest.fixture
def tokenizer(tiny_tokenizer):
    return copy.deepcopy(tiny_tokenizer)


@pytest.fixture
def paths(tmp_path):
    """Forty chats, and ten instructions."""
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"Chat {i}?"},
                {"role": "assistant", "content": f"It is {i}."},
            ]
        }
        for i in range(40)
    ]
    orders = [{"instruction": f"Count {i}", "output": f"So {i}."} for i in range(10)]
    for name, rows in {"chats": chats, "orders": orders}.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    return [str(tmp_path / f"{name}.jsonl") for name in ("chats", "orders")]


def prepare(tokenizer, max_length=200, **options):
    return prepare_data(DataConfig(**options), tokenizer, max_length=max_length, stop_ids={2})


def counts(data):
    files = (Path(place.partition(",")[0]).stem for place in data["place"])
    return dict(Counter(files))


def test_without_weights_all_is_put_together(tokenizer, paths):
    sources = [{"path": path} for path in paths]
    data = prepare(tokenizer, datasets=sources, eval_fraction=0.2)
    assert counts(data.train) == {"chats": 32, "orders": 8}
    assert counts(data.evaluation) == {"chats": 8, "orders": 2}
    assert not set(data.train["place"]) & set(data.evaluation["place"])
    assert data.warnings == []
    alone = prepare(tokenizer, path=paths[0], eval_fraction=0.2)
    assert data.train.select(range(32))[:] == alone.train[:]
    assert data.longest == max(map(len, data.train["input_ids"]))


def test_weights_are_proportions(tokenizer, paths):
    def mixed(strategy, weights, seed=0):
        sources = [{"path": p, "weight": w} for p, w in zip(paths, weights, strict=True)]
        options = {"datasets": sources, "mix_strategy": strategy, "seed": seed}
        return prepare(tokenizer, eval_fraction=0, **options).train

    until_one = mixed("first_exhausted", (2, 1))
    found = counts(until_one)
    assert found["orders"] == 10
    assert 10 < found["chats"] < 40
    assert len(set(until_one["place"])) == len(until_one)
    assert mixed("first_exhausted", (0.6666, 0.3333))["place"] == until_one["place"]
    assert mixed("first_exhausted", (2, 1), seed=1)["place"] != until_one["place"]
    until_all = mixed("all_exhausted", (1, 1))
    found = counts(until_all)
    assert found["chats"] == 40
    assert 25 < found["orders"] < 60
    assert len(set(until_all["place"])) == 50


def test_each_has_its_format_and_messages_name_it(tokenizer, paths):
    sources = [{"path": paths[0]}, {"path": paths[1], "format": "text"}]
    with pytest.raises(
        ValueError, match=r"orders.jsonl, row 1: the columns .* not those of format 'text'"
    ):
        prepare(tokenizer, datasets=sources)
    with pytest.raises(FileNotFoundError, match=r"/no.jsonl does not exist; check `data.datasets`"):
        prepare(tokenizer, datasets=[{"path": "/no.jsonl"}])
    data = prepare(tokenizer, datasets=[{"path": p} for p in paths], max_length=22)
    cut = [w for w in data.warnings if "training examples are cut at `training.max_length`" in w]
    assert {warning.partition(" training")[0].rpartition(" ")[2] for warning in cut} <= set(paths)
    assert any(paths[0] in warning for warning in cut)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"datasets": []}, "`data.path` is ''; give"),
        ({"datasets": [{"name": ""}]}, "`data.datasets` has {'name': ''}; each must be a mapping"),
        (
            {"datasets": [{"path": "a", "weight": 0}]},
            r"`weight` \(0\) of a in `data.datasets`",
        ),
        (
            {"datasets": [{"path": "a", "weight": 1}, {"path": "b"}]},
            "some of `data.datasets` have a `weight` and others none; give all one, or none",
        ),
        ({"datasets": [{"path": "a"}], "path": "b"}, "`data.path` is for a single data set, and"),
        ({"datasets": [{"path": "a"}], "eval_split": "x"}, "`data.eval_split` is for a single"),
        ({"datasets": [{"path": "a"}], "eval_fraction": 1}, "`data.eval_fraction`"),
        ({"datasets": [{"path": "a"}], "format": "text"}, "`data.format` is for a single"),
        ({"path": "a", "mix_strategy": "all_exhausted"}, r"is for `data.datasets` with weights"),
        ({"datasets": ["a"]}, "`data.datasets` has 'a'; each must be a mapping"),
        ({"datasets": [{"path": "a", "weight": "x"}]}, r"`weight` \('x'\) of a .* a number"),
        (
            {"datasets": [{"path": "a", "format": "msgs"}]},
            r"`data.datasets.format` \('msgs'\) must be",
        ),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**options)


def test_from_a_file(paths, tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = {
        "model": {"path": str(tiny_model_dir)},
        "data": {
            "datasets": [{"path": "chats.jsonl", "weight": 3}, {"path": "no/such", "weight": 1}]
        },
    }
    Path("run.yaml").write_text(yaml.safe_dump(values))
    config, _ = read_run(["--config", "run.yaml"])
    assert [(one.path, one.weight) for one in config.data.datasets] == [
        ("chats.jsonl", 3),
        ("no/such", 1),
    ]
    saved = to_values(config)["data"]["datasets"]
    assert [one["path"] for one in saved] == [paths[0], "no/such"]  # a hub id stays one
    assert local_paths(config)["data.datasets[0].path"] == paths[0]
    values["data"]["datasets"][0]["weights"] = 1
    Path("run.yaml").write_text(yaml.safe_dump(values))
    message = r"`data.datasets` \('weights'\) must be one of .* mean 'weight'"
    with pytest.raises(ValueError, match=message):
        read_run(["--config", "run.yaml"])
