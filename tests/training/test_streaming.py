"""Training on data that is read while it is trained on."""

from itertools import islice

import pytest

from pacatune.data import DataConfig, prepare, prepare_data
from pacatune.training import preview
from tests.training.runs import read_json, write_rows


@pytest.fixture
def take(tiny_tokenizer):
    """Read the first rows of a stream; return its data too."""

    def read(number, **options):
        config = DataConfig(**{"streaming": True, "eval_fraction": 0, **options})
        data = prepare_data(config, tiny_tokenizer, max_length=200, stop_ids={2})
        return data, list(islice(data.train, number))

    return read


def test_rows_are_those_of_the_table_and_begin_again(take, tiny_tokenizer, data_path):
    whole = DataConfig(path=str(data_path), eval_fraction=0)
    table = prepare_data(whole, tiny_tokenizer, max_length=200, stop_ids={2}).train
    data, rows = take(130, path=str(data_path), shuffle_buffer=0)
    assert data.sample[:] == table[:]
    assert rows == [table[place % 60] for place in range(130)]
    data, shuffled = take(120, path=str(data_path), shuffle_buffer=25)
    places = [row["place"] for row in shuffled]
    assert places != [row["place"] for row in rows[:120]]
    assert len(set(places[:60])) > 40
    assert places[:60] != places[60:]
    assert [row["place"] for row in islice(data.train, 120)] == places


def test_mixes(take, data_path, tmp_path):
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": f"So {i}."} for i in range(3)])
    sources = [{"path": str(data_path), "weight": 3}, {"path": str(texts), "weight": 1}]
    _, rows = take(400, datasets=sources)
    assert 60 < sum("texts" in row["place"] for row in rows) < 140


def test_what_is_wrong_is_said_where_it_is_reached(take, data_path, monkeypatch, tmp_path):
    monkeypatch.setattr(prepare, "NUM_SAMPLED", 10)
    path = tmp_path / "late.jsonl"
    path.write_text(data_path.read_text() + '{"messages": "hi"}\n')
    data, rows = take(60, path=str(path), shuffle_buffer=0)
    assert (len(data.sample), len(rows)) == (10, 60)
    with pytest.raises(ValueError, match=r"late.jsonl, row 61: 'messages' is 'hi'; it must be"):
        list(islice(data.train, 61))


def test_run_resumed_is_the_same(make_config, data_path, tmp_path, console, assert_resumes):
    data = {"streaming": True, "eval_path": str(data_path), "shuffle_buffer": 20}
    options = {"data": data, "training": {"max_steps": 12, "save_steps": 5}}
    assert_resumes(10, make_config, **options)  # in its second pass over 60 rows
    report = read_json(tmp_path / "whole/report.json")
    assert (report["num_train_examples"], report["num_eval_examples"]) == (12 * 8, 60)
    preview(make_config(**options), 1, console=console)
    assert "chats.jsonl, row 1: " in console.file.getvalue()
