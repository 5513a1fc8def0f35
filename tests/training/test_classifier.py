"""Texts of some classes: what is read, what is saved, and the rate of a new head."""

import json
import shutil

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    pipeline,
)

from pacatune.adapters.merge import merge
from pacatune.data.config import TextClassConfig
from pacatune.training import preview, train
from pacatune.training.classifier import sort_labels, split_texts
from pacatune.training.config import HEAD_RATE
from pacatune.training.language import Task
from tests.adapters.fixtures import edit_json
from tests.training.runs import QUIET, make_trainer, read_json, write_rows

WORDS = ("red", "green", "blue")


@pytest.fixture
def make_classifier(make_task_config, tmp_path):
    rows = [{"text": f"It is {WORDS[i % 3]} {i}.", "label": WORDS[i % 3]} for i in range(60)]
    path = write_rows(tmp_path / "rows.jsonl", rows)

    def make(method="paca", *, data=(), **options):
        data = {"path": str(path), **dict(data)}
        return make_task_config("classifier", method, data=data, **options)

    return make


@pytest.fixture
def make_bert(tiny_tokenizer, tmp_path):
    """Save a tiny BERT whose head knows some classes."""

    def make(*names, **options):
        config = BertConfig(
            vocab_size=len(tiny_tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=64,
            id2label=dict(enumerate(names)),
            label2id={name: number for number, name in enumerate(names)},
            **options,
        )
        BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
        tiny_tokenizer.save_pretrained(tmp_path / "bert")
        return tmp_path / "bert"

    return make


def rates(config):
    """Rate of each trained parameter, by its name."""
    trainer = make_trainer(config)
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    optimizer = trainer.create_optimizer()
    found = {names[id(p)]: g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert found.keys() == {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    return found


@pytest.mark.parametrize("method", ["paca", "lora", "full"])
def test_it_is_the_same_beside_every_method(make_classifier, method):
    found = rates(make_classifier(method, training={"learning_rate": 1e-4}))
    heads = {name for name in found if ".score." in f".{name}"}
    assert heads
    assert {found.pop(name) for name in heads} == {HEAD_RATE}
    assert {*found.values()} == {1e-4}


def test_of_the_head_alone(make_classifier):
    assert {*rates(make_classifier("head", training={"learning_rate": 0.02})).values()} == {0.02}
    with pytest.raises(ValueError, match=r"head_learning_rate` \(0.1\) is another rate than"):
        make_classifier("head", training={"learning_rate": 0.02, "head_learning_rate": 0.1})


def test_a_head_of_its_own_learns_as_the_rest(make_classifier, make_bert):
    path = str(make_bert(*WORDS))
    config = make_classifier(model={"path": path}, training={"learning_rate": 1e-4})
    assert {*rates(config).values()} == {1e-4}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"sentence": "a", "label": 1}], "row 1: field 'text' is missing .columns .'label', "),
        ([{"text": " ", "label": 1}], "row 1: has text ' ' and label 1; a classifier"),
        ([{"text": "a", "label": "a"}] * 20, r"has the labels \['a'\]; a classifier needs at"),
    ],
)
def test_rows_that_teach_no_classes(tmp_path, rows, message):
    path = str(write_rows(tmp_path / "rows.jsonl", rows))
    with pytest.raises(ValueError, match=message):
        split_texts(TextClassConfig(path=path))


def test_labels_that_are_not_trained(make_classifier, tmp_path):
    other = write_rows(tmp_path / "other.jsonl", [{"text": "pear", "label": "tree"}])
    with pytest.raises(ValueError, match=r"the labels \['tree'\] are not among those of the trai"):
        _ = Task(make_classifier(data={"eval_path": str(other)})).plan


@pytest.mark.parametrize("method", ["paca", "lora", "full"])
def test_a_classifier_knows_its_classes(
    make_classifier, tiny_model_dir, tmp_path, console, monkeypatch, method
):
    """As the card loads it and merged, in padded batches, it answers with the user's labels."""
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    if method == "lora":  # as Llama's, which does not pad
        edit_json(folder / "tokenizer_config.json", pad_token=None)
    rows = [
        {"text": f"{'It is ' * (i % 4)}{'abcdefghijk'[i % 11] * 3}.", "label": i % 11}
        for i in range(55)
    ]
    path = str(write_rows(tmp_path / "rows.jsonl", rows))
    data = {"path": path, "eval_path": path}
    training = {"max_steps": 60, "eval_steps": 60, "save_steps": 60, "learning_rate": 1e-2}
    out = tmp_path / "out"
    options = {"data": data, "model": {"path": str(folder)}, "training": training}
    config = make_classifier(method, **options)
    preview(config, 2, console=console)
    assert console.file.getvalue().count("input (") == 2
    expected = train(config, console=QUIET).eval_metrics_after["accuracy"]
    assert expected > 0.3
    saved = read_json(out / ("config.json" if method == "full" else "pacatune.json"))
    saved = saved if method == "full" else saved["head"]
    assert saved["id2label"] == {str(number): str(number) for number in range(11)}
    assert saved["label2id"] == {str(number): number for number in range(11)}
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert saved["pad_token_id"] == tokenizer.pad_token_id

    code = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(code.replace("FOLDER", str(out)), names := {})
    models = [names["model"]]
    if method != "full":
        merge(None, out, tmp_path / "merged")
        models.append(str(tmp_path / "merged"))
    for model in models:
        classify = pipeline("text-classification", model=model, tokenizer=tokenizer)
        answers = classify([row["text"] for row in rows], batch_size=8)
        right = [
            answer["label"] == str(row["label"]) for answer, row in zip(answers, rows, strict=True)
        ]
        assert sum(right) / len(rows) == pytest.approx(expected)


def test_labels_are_sorted_as_what_they_are():
    def ordered(*labels):
        rows = {"label": list(labels), "number": [None] * len(labels)}
        return sort_labels(Dataset.from_dict(rows))

    assert ordered("10", "9", "-1", "2", "10") == ["-1", "2", "9", "10"]
    assert ordered("b", "10", "9") == ["10", "9", "b"]


def short_texts(path, *labels):
    return str(
        write_rows(path, [{"text": f"It is {i}.", "label": labels[i % 2]} for i in range(20)])
    )


def test_a_head_of_the_same_classes_keeps_their_order(
    make_classifier, make_bert, tmp_path, console
):
    bert = make_bert("b", "a")
    data = {"path": short_texts(tmp_path / "rows.jsonl", "a", "b")}
    config = make_classifier(
        "full", data=data, model={"path": str(bert)}, training={"max_steps": 1}
    )
    task = Task(config)
    assert not task.data.new_head
    assert "new" not in task.about_data()
    own = AutoModelForSequenceClassification.from_pretrained(bert)
    loaded = task.load_model()
    assert loaded.config.id2label == {0: "b", 1: "a"}
    assert torch.equal(loaded.classifier.weight, own.classifier.weight)
    first, name = task.train[0], {"b": 0, "a": 1}
    text = task.tokenizer.decode(first["input_ids"], skip_special_tokens=True)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [name[row["label"]] for row in rows if row["text"] == text] == [first["labels"]]
    train(config, console=QUIET)
    saved = read_json(tmp_path / "out" / "config.json")
    assert saved["id2label"] == {"0": "b", "1": "a"}


@pytest.mark.parametrize("method", ["paca", "full"])
@pytest.mark.parametrize(
    ("own", "labels", "reason"),
    [
        (("b", "a"), ("ham", "spam"), "the checkpoint's is for b; a"),
        (("LABEL_0", "LABEL_1"), ("0", "1"), "the checkpoint's is for LABEL_0; LABEL_1"),
        (("a", "b", "c"), ("a", "b"), "the checkpoint's is for a; b; c"),
        (("score",), ("a", "b"), "the checkpoint's is for score"),
        ((), ("a", "b"), "the checkpoint has none"),
    ],
)
def test_a_head_of_other_classes_is_replaced(
    make_classifier,
    make_bert,
    tiny_model_dir,
    tmp_path,
    console,
    monkeypatch,
    method,
    own,
    labels,
    reason,
):
    """A regression or several labels per text would bring a loss of their own, too."""
    kinds = {1: "regression", 3: "multi_label_classification"}
    bert = tmp_path / "bert"
    if own:
        make_bert(*own, problem_type=kinds.get(len(own)))
    else:
        shutil.copytree(tiny_model_dir, bert)
    config = make_classifier(
        method,
        data={"path": short_texts(tmp_path / "rows.jsonl", *labels)},
        model={"path": str(bert)},
        training={"max_steps": 2, "learning_rate": 1e-4},
    )
    task = Task(config)
    assert task.data.new_head
    model = task.load_model()
    if own:
        weight = AutoModelForSequenceClassification.from_pretrained(bert).classifier.weight
        assert not torch.isin(model.classifier.weight, weight).any()
    train(config, console=console)
    assert f"the head is new: {reason}" in console.file.getvalue()
    code = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(code.replace("FOLDER", "out"), names := {})
    assert names["model"].config.id2label == dict(enumerate(labels))
    assert model.config.problem_type == "single_label_classification"


def test_a_body_of_other_shapes_is_refused(make_classifier, make_bert):
    """A head of another size is replaced; the body would be random."""
    folder = make_bert(*WORDS)
    edit_json(folder / "config.json", intermediate_size=48)
    with pytest.raises(ValueError, match=r"bert have other shapes than its configuration says"):
        train(make_classifier(model={"path": str(folder)}), console=QUIET)


def long_rows(tmp_path, num_words):
    rows = [{"text": "word " * (num_words if i == 4 else 3), "label": i % 2} for i in range(20)]
    return {"path": str(write_rows(tmp_path / "rows.jsonl", rows)), "eval_fraction": 0}


@pytest.mark.parametrize(
    ("limit", "asked", "expected"), [(40, None, 40), (None, None, 64), (40, 30, 30)]
)
def test_texts_are_cut_where_the_model_ends_and_that_is_said(
    make_classifier, make_bert, tmp_path, limit, asked, expected
):
    """The tokenizer's limit, or the model's positions where it has none; 128 before."""
    bert = make_bert("0", "1")
    if limit is not None:
        edit_json(bert / "tokenizer_config.json", model_max_length=limit)
    data = {**long_rows(tmp_path, 300), "max_length": asked}
    model, training = {"path": str(bert)}, {"eval_strategy": "no", "max_steps": 1}
    config = make_classifier(data=data, model=model, training=training)
    task = Task(config)
    assert max(map(len, task.train["input_ids"])) == expected
    (warning,) = task.warnings
    assert f"1 of 20 training texts are cut at {expected} tokens (`data.max_length`)" in warning
    assert "rows.jsonl, row 5" in warning
    train(config, console=QUIET)


def class_table(path, numbers):
    """A table as the hub has them: numbers of classes, whose names are in its schema."""
    kinds = Features(text=Value("string"), label=ClassLabel(names=["world", "sports", "arts"]))
    rows = [{"text": f"It is {i}.", "label": number} for i, number in enumerate(numbers)]
    Dataset.from_list(rows, features=kinds).to_parquet(path)
    return str(path)


def test_names_of_classes_in_a_table(make_classifier, tmp_path):
    path = class_table(tmp_path / "rows.parquet", [0, 1, 2] * 8)
    task = Task(make_classifier(data={"path": path}))
    assert task.data.model_options["id2label"] == {0: "world", 1: "sports", 2: "arts"}
    texts = task.tokenizer.batch_decode(task.train["input_ids"][:], skip_special_tokens=True)
    numbers = [int(text.removeprefix("It is ").removesuffix(".")) % 3 for text in texts]
    assert numbers == task.train["labels"][:]
    other = write_rows(tmp_path / "other.jsonl", [{"text": "a", "label": "sports"}])
    task = Task(make_classifier(data={"path": path, "eval_path": str(other)}))
    assert task.evaluation["labels"][:] == [1]
    path = class_table(tmp_path / "test.parquet", [0, 1, -1])
    with pytest.raises(ValueError, match=r"test.parquet, row 3.*has no class \(label -1\); give"):
        split_texts(TextClassConfig(path=path))


def test_a_class_is_never_held_out_alone(tmp_path):
    labels = ["a"] * 40 + ["b"] * 40 + ["c"]
    rows = [{"text": f"t{i}", "label": label} for i, label in enumerate(labels)]
    path = str(write_rows(tmp_path / "rows.jsonl", rows))
    drawn = set()
    for seed in range(20):
        train_rows, held_out = split_texts(TextClassConfig(path=path, seed=seed))
        assert {*train_rows["label"]} == {"a", "b", "c"}
        assert sorted(held_out["label"]) == ["a"] * 4 + ["b"] * 4
        assert not {*train_rows["text"]} & {*held_out["text"]}
        drawn.add(frozenset(held_out["text"]))
    assert len(drawn) == 20


def test_classes_of_one_row_each(tmp_path):
    rows = [{"text": label, "label": label} for label in "abc"]
    path = str(write_rows(tmp_path / "rows.jsonl", rows))
    with pytest.raises(ValueError, match=r"`data.eval_fraction` \(0.1\) .* only one of its class;"):
        split_texts(TextClassConfig(path=path))
    assert len(split_texts(TextClassConfig(path=path, eval_fraction=0))[0]) == 3
