"""Several data sets in one run, whole or by weights."""

from collections import Counter
from pathlib import Path

import pytest
import yaml

from pacatune.cli.train import all_options
from pacatune.data import DataConfig, prepare_data
from pacatune.training import RunConfig
from pacatune.training.config_file import local_paths, to_values
from tests.data.conftest import chat, write_lines


@pytest.fixture
def paths(tmp_path):
    chats = [{"messages": chat(f"Chat {i}?", f"It is {i}.")} for i in range(40)]
    orders = [{"instruction": f"Count {i}", "output": f"So {i}."} for i in range(10)]
    sources = {"chats": chats, "orders": orders}
    return [write_lines(tmp_path / f"{name}.jsonl", rows) for name, rows in sources.items()]


def prepare(tokenizer, max_length=200, **options):
    return prepare_data(DataConfig(**options), tokenizer, max_length=max_length, stop_ids={2})


def counts(data):
    return Counter(Path(place.partition(",")[0]).stem for place in data["place"])


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
    assert counts(until_one)["orders"] == 10
    assert 10 < counts(until_one)["chats"] < 40
    assert len(set(until_one["place"])) == len(until_one)
    assert mixed("first_exhausted", (0.6666, 0.3333))["place"] == until_one["place"]
    assert mixed("first_exhausted", (2, 1), seed=1)["place"] != until_one["place"]
    until_all = mixed("all_exhausted", (1, 1))
    assert counts(until_all)["chats"] == 40
    assert 25 < counts(until_all)["orders"] < 60
    assert len(set(until_all["place"])) == 50


def test_each_has_its_format_and_messages_name_it(tokenizer, paths):
    sources = [{"path": paths[0]}, {"path": paths[1], "format": "text"}]
    rule = r"orders.jsonl, row 1: the columns .* not those of format 'text'"
    with pytest.raises(ValueError, match=rule):
        prepare(tokenizer, datasets=sources)
    with pytest.raises(FileNotFoundError, match=r"/no.jsonl does not exist; check `data.datasets`"):
        prepare(tokenizer, datasets=[{"path": "/no.jsonl"}])
    data = prepare(tokenizer, datasets=[{"path": p} for p in paths], max_length=22)
    cut = [w for w in data.warnings if "training examples are cut at `training.max_length`" in w]
    assert {warning.partition(" training")[0].rpartition(" ")[2] for warning in cut} <= set(paths)
    assert any(paths[0] in warning for warning in cut)


def test_from_a_file(paths, tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sources = [{"path": "chats.jsonl", "weight": 3}, {"path": "no/such", "weight": 1}]
    values = {"model": {"path": str(tiny_model_dir)}, "data": {"datasets": sources}}
    Path("run.yaml").write_text(yaml.safe_dump(values))
    config = RunConfig(**all_options().parse(["--config", "run.yaml"]).values)
    assert [one.weight for one in config.data.datasets] == [3, 1]
    saved = to_values(config)["data"]["datasets"]
    assert [one["path"] for one in saved] == [paths[0], "no/such"]  # a hub id stays one
    assert local_paths(config)["data.datasets[0].path"] == paths[0]
