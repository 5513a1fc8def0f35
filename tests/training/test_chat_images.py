"""Chats with images, on a tiny vision-language model."""

import base64
import io
import shutil

import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from pacatune.cli import main
from pacatune.data.formats import to_examples
from pacatune.data.read import Row
from pacatune.training import preview, train
from pacatune.training.language import Task
from tests.conftest import build_tokenizer
from tests.training.runs import write_rows

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """Folder of a random Qwen2-VL of two blocks and its processor."""
    folder = tmp_path_factory.mktemp("vision-language")
    tokenizer = build_tokenizer()
    marks = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    start, end, image, video = tokenizer.convert_tokens_to_ids(marks)
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=4 * 28 * 28),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=TEMPLATE,
    )
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10_000.0}
    config = Qwen2VLConfig(
        text_config={
            **{"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64},
            **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
            **{"max_position_embeddings": 512, "rope_parameters": rope},
            **{"bos_token_id": 1, "eos_token_id": 2},
        },
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2},
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    torch.manual_seed(0)
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
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


def image(source):
    return {"type": "image", "image": source}


def answer(text):
    return {"role": "assistant", "content": text}


def row_of(path, number):
    colour = "Red." if number % 2 else "Blue."
    later = [{"role": "user", "content": "Sure?"}, answer("Yes.")]
    return {"messages": [user(image(path), f"Colour {number}?"), answer(colour), *later]}


@pytest.fixture
def make_run(make_config, model_dir, images, tmp_path):
    def make(rows=None, *, data=None, **options):
        rows = rows or [row_of(path, number) for number, path in enumerate(images)]
        path = write_rows(tmp_path / "chats.jsonl", rows)
        options = {"model": {"path": str(model_dir)}, **options}
        return make_config(data={"path": str(path), **(data or {})}, **options)

    return make


def read(config):
    task = Task(config)
    return task, task.data.examples


def test_it_learns_and_merges(make_run, model_dir, images, tmp_path, console):
    """R7: with the adapter and merged it is one function."""
    training = {"max_steps": 12, "learning_rate": 2e-2, "per_device_train_batch_size": 4}
    config = make_run(training=training, data={"eval_fraction": 0.25})
    preview(config, 1, console=console)
    assert "[[Yes.</s>]]" in console.file.getvalue()
    report = train(config, console=console)
    assert report.eval_loss_after < report.eval_loss_before - 0.1
    assert any(".language_model.layers.1." in name for name in report.targets)
    out, merged = tmp_path / "out", tmp_path / "merged"
    assert "AutoModelForImageTextToText" in (out / "README.md").read_text()
    processor = AutoProcessor.from_pretrained(out)
    words = ["--model", str(model_dir), "--adapter", str(out), "--output", str(merged)]
    assert main(["merge", *words]) == 0
    batch = processor.apply_chat_template(
        [user(image(Image.open(images[1])), "Colour?")],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
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
    batch = task.data.collator(list(data.train))
    opened = [
        {"messages": typed(row["messages"]), "images": [Image.open(path)]}
        for row, path in zip(rows, images, strict=False)
    ]
    theirs = DataCollatorForVisionLanguageModeling(data.processor)(opened)
    assert batch.keys() == theirs.keys()
    for name in batch.keys() - {"labels"}:
        assert torch.equal(batch[name], theirs[name]), name
    learned = [task.tokenizer.decode(labels[labels >= 0]) for labels in batch["labels"]]
    assert learned == [f"{colour}.</s>Yes.</s>" for colour in ("Blue", "Red", "Blue")]


def typed(messages):
    """The chat as TRL takes it: the image waits in a column."""
    first, *others = messages
    texts = [user(m["content"]) | {"role": m["role"]} for m in others]
    return [user({"type": "image"}, first["content"][1]), *texts]


def test_ways_to_name_an_image(images):
    def found(message, **columns):
        row = Row("f, row 1", {"messages": [message, answer("a")], **columns})
        example = next(to_examples([row]))
        (one,) = example.images
        assert example.messages[0]["content"].replace(one, "").strip("\ufdd0\ufdd1") == "q"
        return one

    path, data = images[0], io.BytesIO()
    Image.open(path).save(data, "PNG")
    uri = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    plain = {"role": "user", "content": "q"}
    assert found(user(image(path), "q")) == path
    assert found(user({"type": "image", "path": path}, "q")) == path
    for url in (path, uri):
        assert found(user({"type": "image_url", "image_url": {"url": url}}, "q")) == url
    for message in (user({"type": "image"}, "q"), plain | {"content": "<image>q"}, plain):
        assert found(message, images=[path]) == path
    for one in (Image.open(path), {"bytes": data.getvalue(), "path": None}):
        assert found(plain, images=[one])[:22] == uri[:22]


def test_what_cannot_be_done(make_run, tiny_model_dir, images):
    blind = TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "")
    for message, options in (
        ("takes texts alone; use a vision-language", {"model": {"path": str(tiny_model_dir)}}),
        ("images cannot be cut: raise it", {"training": {"max_length": 12}}),
        ("are for texts, and the data has images; drop", {"training": {"packing": True}}),
        (r"has images: .* `data.loss` 'all' is for texts", {"data": {"loss": "all"}}),
        ("does not show each of 1 images once", {"data": {"chat_template": blind}}),
    ):
        with pytest.raises(ValueError, match=message):
            read(make_run(**options))


def test_images_in_later_rows_alone(make_run, images):
    mixed = [{"messages": [user("q"), answer("a")]}, row_of(images[0], 0)]
    task, data = read(make_run(mixed, data={"eval_fraction": 0}))
    assert task.data.collator(list(data.train))["input_ids"].shape[0] == 2


def test_images_are_kept_as_files_or_bytes(make_run, images, tmp_path):
    """And one that has changed, whose path is the same, is read anew."""
    path = tmp_path / "a.png"
    shutil.copyfile(images[0], path)
    content = path.read_bytes()
    uri = "data:image/png;base64," + base64.b64encode(content).decode()
    config = make_run([row_of(str(path), 0), row_of(uri, 1)], data={"eval_fraction": 0})
    _, data = read(config)
    held = [{"bytes": None, "path": str(path)}, {"bytes": content, "path": None}]
    assert [row["images"] for row in data.train] == [[one] for one in held]
    longest = data.longest
    Image.new("RGB", (80, 80), "red").save(path)
    assert read(config)[1].longest > longest
    path.write_bytes(content[:60])
    with pytest.raises(ValueError, match=r"chats.jsonl, row 1: .*[Tt]runcated"):
        read(config)
