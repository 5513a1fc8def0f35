"""Training on data that is read while it is trained on."""

import json
import shutil
from itertools import islice

import pytest
import torch
from safetensors.torch import load_file

from pacatune.data import DataConfig, prepare_data
from pacatune.training import PacaSection, preview, train
from pacatune.training.task import task_of

NO_EVALUATION = {"streaming": True, "eval_fraction": 0}


def take(number, tokenizer, **options):
    config = DataConfig(**{**NO_EVALUATION, **options})
    data = prepare_data(config, tokenizer, max_length=200, stop_ids={2})
    return data, list(islice(data.train, number))


def test_rows_are_those_of_the_table_and_begin_again(tiny_tokenizer, data_path):
    table = prepare_data(
        DataConfig(path=str(data_path), eval_fraction=0),
        tiny_tokenizer,
        max_length=200,
        stop_ids={2},
    ).train
    data, rows = take(130, tiny_tokenizer, path=str(data_path), shuffle_buffer=0)
    assert data.sample[:] == table[:]
    assert rows == [table[place % 60] for place in range(130)]
    data, shuffled = take(120, tiny_tokenizer, path=str(data_path), shuffle_buffer=25)
    places = [row["place"] for row in shuffled]
    assert places != [row["place"] for row in rows[:120]]
    assert len(set(places[:60])) > 40
    assert places[:60] != places[60:]
    assert [row["place"] for row in islice(data.train, 120)] == places


def test_mixes(tiny_tokenizer, data_path, prompts_path, tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"So {i}."}) + "\n" for i in range(3)))
    sources = [{"path": str(data_path), "weight": 3}, {"path": str(texts), "weight": 1}]
    _, rows = take(400, tiny_tokenizer, datasets=sources)
    assert 60 < sum("texts" in row["place"] for row in rows) < 140


def test_what_is_wrong_is_said_where_it_is_reached(
    tiny_tokenizer, data_path, monkeypatch, tmp_path
):
    from pacatune.data import prepare

    monkeypatch.setattr(prepare, "NUM_SAMPLED", 10)
    path = tmp_path / "late.jsonl"
    path.write_text(data_path.read_text() + '{"messages": "hi"}\n')
    data, rows = take(60, tiny_tokenizer, path=str(path), shuffle_buffer=0)
    assert (len(data.sample), len(rows)) == (10, 60)
    with pytest.raises(ValueError, match=r"late.jsonl, row 61: 'messages' is 'hi'; it must be"):
        list(islice(data.train, 61))


def test_run_resumed_is_the_same(make_config, data_path, tmp_path, console):
    def config(name):
        data = {"streaming": True, "eval_path": str(data_path), "shuffle_buffer": 20}
        training = {"output_dir": str(tmp_path / name), "max_steps": 12, "save_steps": 5}
        return make_config(data=data, training={**training, "save_total_limit": 9})

    whole = train(config("whole"), console=console)
    assert "data: streamed examples, 60 held out" in console.file.getvalue()
    assert (whole.num_train_examples, whole.num_eval_examples) == (12 * 8, 60)
    assert whole.eval_loss_after < whole.eval_loss_before
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for path in (tmp_path / "cut").iterdir():
        if path.name not in (
            ".pacatune",
            "checkpoint-10",
            "config.yaml",
        ):  # in its second pass over 60 rows
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    resumed = train(config("cut"), resume=True, console=console)
    assert resumed.train_losses == whole.train_losses
    one, two = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("whole", "cut"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    preview(config("whole"), 1, console=console)
    assert "chats.jsonl, row 1: " in console.file.getvalue()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"training": {}}, r"`data.streaming` needs `training.max_steps` \(-1\), since a stream"),
        (
            {"training": {"max_steps": 1, "train_sampling_strategy": "group_by_length"}},
            r"`training.train_sampling_strategy` \('group_by_length'\) needs the whole data",
        ),
        ({"data": {"eval_fraction": 0.1}}, "cannot be held out of what is read"),
        ({"data": {"shuffle_buffer": -1}}, r"`data.shuffle_buffer` \(-1\) must be at least 0"),
        (
            {"data": {"streaming": False, "shuffle_buffer": 5}},
            r"`data.shuffle_buffer` \(5\) must be .* is for `data.streaming`",
        ),
        (
            {"data": {"path": "", "datasets": [{"path": "a"}, {"path": "b"}]}},
            "would come one after the other; give each a `weight`",
        ),
        (
            {
                "data": {
                    "path": "",
                    "datasets": [{"path": "a", "weight": 1}],
                    "mix_strategy": "all_exhausted",
                }
            },
            "streams never run out; drop it",
        ),
    ],
)
def test_what_cannot_be_done_with_a_stream(make_config, options, message):
    data = {**NO_EVALUATION, **options.get("data", {})}
    training = options.get("training", {"max_steps": 1})
    with pytest.raises(ValueError, match=message):
        task_of(make_config(data=data, training=training)).prepare()


def test_columns_cannot_be_chosen_from_a_stream(make_config, console):
    section = PacaSection(selection="gradient")
    config = make_config(data=NO_EVALUATION, training={"max_steps": 1}, paca=section)
    with pytest.raises(ValueError, match="needs all of the data, which"):
        train(config, console=console)
