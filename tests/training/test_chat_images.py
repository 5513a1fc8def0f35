"""Chats with images, on a tiny vision-language model."""

import base64
import io
import json

import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from pacatune.cli import main
from pacatune.data.formats import to_examples
from pacatune.data.read import Row
from pacatune.training import preview, train
from pacatune.training.task import task_of
from tests.vision_language import TEMPLATE, build_vision_language_model


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vision-language")
    build_vision_language_model(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Red and blue images of two sizes."""
    folder = tmp_path_factory.mktemp("images")
    paths = [str(folder / f"{number}.png") for number in range(12)]
    for number, path in enumerate(paths):
        size, colour = ((60, 40), "red") if number % 2 else ((40, 40), "blue")
        Image.new("RGB", size, colour).save(path)
    return paths


def user(*content):
    parts = [{"type": "text", "text": c} if isinstance(c, str) else c for c in content]
    return {"role": "user", "content": parts}


def answer(text, **options):
    return {"role": "assistant", "content": text, **options}


def row_of(path, number):
    colour = "Red." if number % 2 else "Blue."
    asked = user({"type": "image", "image": path}, f"Colour {number}?")
    later = [{"role": "user", "content": "Sure?"}, answer("Yes.")]
    return {"messages": [asked, answer(colour), *later]}


@pytest.fixture
def make_run(make_config, model_dir, images, tmp_path):
    def make(rows=None, *, data=None, **options):
        rows = (
            [row_of(*pair) for pair in zip(images, range(12), strict=True)]
            if rows is None
            else rows
        )
        path = tmp_path / "chats.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        options = {"model": {"path": str(model_dir)}, **options}
        return make_config(data={"path": str(path), **(data or {})}, **options)

    return make


def read(config):
    from pacatune.training.language import load_tokenizer

    task = task_of(config)
    task.tokenizer = load_tokenizer(config)
    return task, task.read_data()


def test_it_learns_and_merges(make_run, model_dir, images, tmp_path, console):
    training = {"max_steps": 12, "learning_rate": 2e-2, "per_device_train_batch_size": 4}
    config = make_run(training=training, data={"eval_fraction": 0.25})
    preview(config, 1, console=console)
    assert "[[Yes.</s>]]" in console.file.getvalue()
    report = train(config, console=console)
    assert report.eval_loss_after < report.eval_loss_before - 0.1
    assert any(".language_model.layers.1." in name for name in report.targets)
    out, merged = tmp_path / "out", tmp_path / "merged"
    card = (out / "README.md").read_text()
    assert "AutoModelForImageTextToText" in card
    assert "pacatune generate" not in card
    processor = AutoProcessor.from_pretrained(out)
    words = ["--model", str(model_dir), "--adapter", str(out), "--output", str(merged)]
    assert main(["merge", *words]) == 0
    chat = [user({"type": "image", "image": Image.open(images[1])}, "Colour?")]
    batch = processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    base = AutoModelForImageTextToText.from_pretrained(model_dir)
    with torch.no_grad():
        before = base(**batch).logits
        adapted = PeftModel.from_pretrained(base, out)(**batch).logits
        plain = AutoModelForImageTextToText.from_pretrained(merged)(**batch).logits
    torch.testing.assert_close(adapted, plain, atol=1e-5, rtol=0)
    assert (adapted - before).abs().max() > 0.01


def test_batches_are_those_of_trl(make_run, images):
    rows = [row_of(path, number) for number, path in enumerate(images[:3])]
    task, data = read(make_run(rows, data={"eval_fraction": 0}))
    batch = task.collator(list(data.train))
    opened = [
        {"messages": _typed(r["messages"]), "images": [Image.open(p)]}
        for r, p in zip(rows, images, strict=False)
    ]
    theirs = DataCollatorForVisionLanguageModeling(task.processor)(opened)
    assert batch.keys() == theirs.keys()
    for name in batch.keys() - {"labels"}:
        assert torch.equal(batch[name], theirs[name]), name
    learned = [batch["labels"][i][batch["labels"][i] >= 0] for i in range(3)]
    assert [task.tokenizer.decode(ids) for ids in learned] == [
        "Blue.</s>Yes.</s>",
        "Red.</s>Yes.</s>",
        "Blue.</s>Yes.</s>",
    ]


def _typed(messages):
    """The chat as TRL takes it: the image waits in a column."""
    first, *others = messages
    typed = [
        {"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in others
    ]
    return [{"role": "user", "content": [{"type": "image"}, first["content"][1]]}, *typed]


def convert(*messages, **columns):
    messages = [*messages, answer("a")][:2]
    row = Row("f, row 1", {"messages": messages, **columns})
    return next(to_examples([row], "auto", has_template=True))


def test_ways_to_name_an_image(images):
    def found(message, **columns):
        example = convert(message, **columns)
        (one,) = example.images
        return one, example.messages[0]["content"].replace(one, "").strip("\ufdd0\ufdd1")

    path, data = images[0], io.BytesIO()
    Image.open(path).save(data, "PNG")
    uri = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    for part in (
        {"type": "image", "image": path},
        {"type": "image", "path": path},
        {"type": "image_url", "image_url": {"url": path}},
    ):
        assert found(user(part, "q")) == (path, "q")
    assert found(user({"type": "image_url", "image_url": {"url": uri}}, "q")) == (uri, "q")
    assert found(user({"type": "image"}, "q"), images=[path]) == (path, "q")
    assert found({"role": "user", "content": "<image>q"}, images=[path]) == (path, "q")
    assert found({"role": "user", "content": "q"}, images=[path]) == (path, "q")
    for image in (Image.open(path), {"bytes": data.getvalue(), "path": None}):
        one, text = found({"role": "user", "content": "q"}, images=[image])
        assert (one[:22], text) == (uri[:22], "q")


@pytest.mark.parametrize(
    ("message", "columns", "error"),
    [
        (
            user({"type": "image"}, "q"),
            {"images": []},
            "more images are shown than the column 'images'",
        ),
        (
            user({"type": "image", "image": "no.png"}),
            {},
            "the image is 'no.png', which is no file here",
        ),
        (
            user({"type": "image", "image": "http://a/b.png"}),
            {},
            "nothing is fetched while data is",
        ),
        (
            user({"type": "image", "image": 3}),
            {},
            "the image is 3; give a path or a data URI",
        ),
        (
            user({"type": "audio"}, {"type": "image", "image": "x"}),
            {},
            "a part is 'audio'; give text, image",
        ),
    ],
)
def test_wrong_images(message, columns, error):
    with pytest.raises(ValueError, match=rf"f, row 1: messages\[0\].*{error}"):
        convert(message, **columns)


def test_images_in_answers_and_left_over(images):
    drawn = {**user({"type": "image", "image": images[0]}), "role": "assistant"}
    with pytest.raises(ValueError, match=r"messages\[1\]: an answer has an image"):
        convert(user("q"), drawn)
    with pytest.raises(ValueError, match="'images' has more than the messages show"):
        convert({"role": "user", "content": "<image>q"}, images=images[:2])


def test_what_cannot_be_done(make_run, tiny_model_dir, images):
    def refused(match, *args, **options):
        with pytest.raises(ValueError, match=match):
            read(make_run(*args, **options))

    refused("takes texts alone; use a vision-language", model={"path": str(tiny_model_dir)})
    refused("images cannot be cut: raise it", training={"max_length": 12})
    refused("are for texts, and the data has images; drop", training={"packing": True})
    refused(r"has images: .* `data.loss` 'all' is for texts", data={"loss": "all"})
    streamed = {"streaming": True, "eval_fraction": 0}
    refused(
        "has images: this task, a stream or",
        data=streamed,
        training={"max_steps": 1},
    )
    blind = TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "")
    refused("does not show each of 1 images once", data={"chat_template": blind})
    mixed = [row_of(images[0], 0), {"messages": [user("q"), answer("a")]}]
    task, data = read(make_run(mixed, data={"eval_fraction": 0}))
    assert task.collator(list(data.train))["input_ids"].shape[0] == 2
