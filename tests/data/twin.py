"""What today's code makes of data, and what its runs write: code that replaces it makes the same.

twin.json beside this file keeps it, and tests/training/test_twin.py compares. Runs are started as
by a user and seen from outside: the batches of their trainer, the files they leave. After a change
that is meant, write the file anew and read what has changed in it:

    python -m tests.data.twin
"""

import hashlib
import io
import json
import re
import tempfile
from contextlib import chdir
from itertools import islice
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import yaml
from PIL import Image
from rich.console import Console

from tests.conftest import CHAT_TEMPLATE, build_model, build_tokenizer
from tests.data.conftest import chat, write_lines
from tests.image_models import save_vit
from tests.vision_language import build_vision_language_model

PATH = Path(__file__).with_name("twin.json")
SYSTEM = {"role": "system", "content": "Be kind."}

_CONTENT = (
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}"
)
_ANSWER = _CONTENT + (
    "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}</s>"
)
_MARKED = (
    "<s>{% if tools %}<|system|>\n{{ tools | tojson }}\n{% endif %}{% for m in messages %}"
    "<|{{ m.role }}|>\n{% if m.role == 'assistant' %}{% generation %}[]{% endgeneration %}"
    "{% else %}[]{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TEMPLATES = {
    "plain": CHAT_TEMPLATE.replace("{{ message['content'] }}", "{% set m = message %}" + _CONTENT),
    "marked": _MARKED.replace("[]", _ANSWER),
}
_FILES = {
    "sft": "text completion instruction mmlu images_column",
    "dpo": "pairs whole_pairs whole_chat_pairs",
    "reward": "pairs whole_pairs",
    "kto": "judged pairs chat_pairs",
    "grpo": "prompts",
    "classifier": "classes",
}
_CHATS = {
    "sft": "messages weights chat_completion tools sharegpt parts images",
    "dpo": "chat_pairs",
    "reward": "chat_pairs",
    "kto": "judged_chats",
    "grpo": "chat_prompts",
}
_MIXED = [{"path": "messages.jsonl", "weight": 2}, {"path": "completion.jsonl", "weight": 1}]
_STREAM = {"path": "text.jsonl", "streaming": True, "shuffle_buffer": 5, "eval_fraction": 0}
CASES = {
    **{
        f"{task}: {name}.jsonl": (task, {"path": f"{name}.jsonl"})
        for task, names in _FILES.items()
        for name in names.split()
    },
    **{
        f"{task}: {chat}, {name} template": (task, {"path": f"{chat}.jsonl", "chat_template": text})
        for task, chats in _CHATS.items()
        for chat in chats.split()
        for name, text in TEMPLATES.items()
    },
    "all is learned": ("sft", {"path": "messages.jsonl", "loss": "all"}),
    "no special tokens": ("sft", {"path": "text.jsonl", "special_tokens": False}),
    "cut chats": ("sft", {"path": "messages.jsonl", "max_length": 60}),
    "cut pairs": ("dpo", {"path": "pairs.jsonl", "max_length": 20}),
    "another seed": ("sft", {"path": "messages.jsonl", "seed": 1}),
    "own evaluation": ("sft", {"path": "messages.jsonl", "eval_path": "parts.jsonl"}),
    "whole data sets": ("sft", {"datasets": [{"path": one["path"]} for one in _MIXED]}),
    "mixed data sets": ("sft", {"datasets": _MIXED}),
    "stream": ("sft", _STREAM),
    "system prompt": ("rloo", {"path": "prompts.jsonl", "system_prompt": "Be kind."}),
    "image: images/train": ("image", {"path": "images/train"}),
    "folders of images": ("image", {"path": "images", "train_per_class": 2}),
}
_TRAINED = {
    "sft": ("messages.jsonl", "paca lora full"),
    "dpo": ("pairs.jsonl", "paca"),
    "kto": ("pairs.jsonl", "lora"),
    "reward": ("pairs.jsonl", "paca full"),
    "grpo": ("prompts.jsonl", "lora full"),
    "rloo": ("prompts.jsonl", "paca"),
    "image": ("images", "paca lora full"),
}
RUNS = {
    f"{task} {method}": (task, method, {"path": path})
    for task, (path, methods) in _TRAINED.items()
    for method in methods.split()
}


def rows(i):
    """Return row number `i` of each file; its text has the number."""
    asked, answer, bad = f"What is #{i}?", f"It is {7 * i % 10}." + " Yes." * (i % 3), "No idea."
    prompt = [SYSTEM, *chat("Hello.", "Hi.", asked)]
    good_turn, bad_turn = ([{"role": "assistant", "content": text}] for text in (answer, bad))
    pair, turns = {"chosen": answer, "rejected": bad}, {"chosen": good_turn, "rejected": bad_turn}
    call = {"type": "function", "function": {"name": "count", "arguments": {"upto": i}}}
    called = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "4"}]
    tool = {"name": "count", "description": "Counts.", "parameters": {"type": "object"}}
    parts = [{"type": "text", "text": text} for text in (asked, "Well?")]
    picture, speakers = f"pictures/{i}.png", ("human", "gpt") * 2
    said = zip(speakers, (asked, answer, "Sure?", bad), strict=True)
    shown = [{"type": "image", "image": picture}, *parts]
    return {
        "text": {"text": f"{asked} {answer}"},
        "completion": {"prompt": asked, "completion": f" {answer}"},
        "instruction": {"instruction": asked, "input": "Please." * (i % 2), "output": answer},
        "mmlu": {"question": asked, "choices": ["a", "b", answer, bad], "answer": i % 4},
        "messages": {"messages": [SYSTEM, *chat(asked, answer, "Sure?", bad)]},
        "weights": {"messages": [*prompt, {**bad_turn[0], "weight": 0}, prompt[1], *good_turn]},
        "chat_completion": {"prompt": prompt, "completion": good_turn},
        "tools": {"messages": [*prompt, *called, *good_turn], "tools": [{"function": tool}]},
        "sharegpt": {"conversations": [{"from": who, "value": text} for who, text in said]},
        "parts": {"messages": [SYSTEM, *chat(parts, answer)]},
        "images": {"messages": [SYSTEM, *chat(shown, answer)]},
        "images_column": {
            "messages": [SYSTEM, *chat(f"See <image>{asked}", answer)],
            "images": [picture],
        },
        "pairs": {"prompt": f"{asked} ", **pair},
        "whole_pairs": {name: f"{asked} {text}" for name, text in pair.items()},
        "chat_pairs": {"prompt": prompt, **turns},
        "whole_chat_pairs": {name: prompt + turn for name, turn in turns.items()},
        "judged": {"prompt": asked, "completion": f" {answer}", "label": i % 3 > 0},
        "judged_chats": {"prompt": prompt, "completion": good_turn, "label": i % 3 > 0},
        "prompts": {"prompt": asked, "number": i, "more": {"half": i / 2}},
        "chat_prompts": {"prompt": prompt, "number": i},
        "classes": {"text": f"{asked} {answer}", "label": "abc"[i % 3]},
    }


def build(folder):
    """Write models, data and a reward into a folder."""
    tokenizer = build_tokenizer()
    build_model(len(tokenizer)).save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    build_vision_language_model(folder / "qwen")
    save_vit(folder / "vit")
    numbered = [rows(i) for i in range(1, 8)]
    for name in numbered[0]:
        write_lines(folder / f"{name}.jsonl", [row[name] for row in numbered])
    (folder / "pictures").mkdir()
    for i in range(1, 8):
        Image.new("RGB", (30 + 5 * i, 40), (20 * i, 0, 99)).save(folder / f"pictures/{i}.png")
    noise = np.random.default_rng(0)
    for i in range(24):
        pixels = noise.integers(0, 255, (36, 40, 3)).astype(np.uint8)
        pixels[..., 0] = 10 * i
        place = folder / "images" / ("train" if i < 15 else "test") / "abc"[i % 3]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{i}.png")
    reward = "def length(completions, **_):\n    return [len(text) / 10 for text in completions]\n"
    (folder / "twin_rewards.py").write_text(reward)


def make_config(task, method, data, output, **options):
    """Return the configuration of a run on what `build` wrote, in the current folder."""
    from pacatune.training import RunConfig

    data = {"eval_fraction": 0.3, **data}
    training = {"max_length": data.pop("max_length")} if "max_length" in data else {}
    training |= {"max_steps": 2, "save_steps": 2, "per_device_train_batch_size": 4}
    training |= {"output_dir": output, "report_to": "none", "bf16": False, "use_cpu": True}
    training["per_device_eval_batch_size"] = 1
    if task in ("grpo", "rloo"):
        training |= {"num_generations": 2, "max_completion_length": 4}
        training["per_device_eval_batch_size"] = 2
        options["reward"] = ["twin_rewards:length"]
    images = "vit" if task == "image" else "qwen"
    model = {"path": images if "images" in data.get("path", "") else "llama"}
    return RunConfig(task=task, method=method, model=model, data=data, training=training, **options)


class Started(BaseException):
    """A run has its trainer, and would take its first step."""


def record_data(name):
    """Return what becomes of the data of a case, as the batches of its trainer before a step."""
    from transformers import AutoTokenizer

    from pacatune.training import recipe

    def stop(trainer, *args, **kwargs):
        raise Started(trainer)

    task, data = CASES[name]
    method = "full" if task == "sft" else "lora"
    config = make_config(task, method, data, f"data/{name}", lean="off")
    try:
        with mock.patch("transformers.Trainer.train", stop):
            recipe.train(config, console=Console(file=io.StringIO()))
    except ValueError as error:
        return {"refused": str(error)}
    except Started as started:
        (trainer,) = started.args
    tokenizer = trainer.processing_class or AutoTokenizer.from_pretrained("llama")
    found = {"fingerprint": trainer.trained_on.fingerprint}
    loaders = {"training": trainer.get_train_dataloader()}
    if trainer.eval_dataset is not None:
        loaders["evaluation"] = trainer.get_eval_dataloader()
    for part, loader in loaders.items():
        batches = [columns(batch) for batch in islice(loader, 4)]
        texts = [tokenizer.batch_decode(learned(batch)) for batch in batches]
        found[f"{part}, learned"] = texts[0][0] if texts[0] else None
        found[f"{part}, rows"] = [numbers(batch, tokenizer) for batch in batches]
        for column in sorted(batches[0]):
            values = json.dumps([batch.get(column) for batch in batches])
            digest = hashlib.sha256(values.encode()).hexdigest()[:16]
            found[f"{part}, digest of {column}"] = digest
    return found


def learned(batch):
    """Return the tokens of each sequence that are learned; all where nothing says which."""
    ids = batch.get("input_ids", [])
    pairs = zip(ids, batch.get("completion_mask") or batch.get("labels") or ids, strict=False)
    return [
        [token for token, mask in zip(ids, row, strict=True) if mask not in (0, -100)]
        if isinstance(row, list)
        else ids
        for ids, row in pairs
    ]


def columns(batch):
    """Return the columns of a batch as lists; pixels as whole numbers, the same everywhere."""
    if isinstance(batch, list):
        return {name: [row[name] for row in batch] for name in batch[0]}
    return {
        name: ((100 * value).round().int() if value.is_floating_point() else value).tolist()
        for name, value in batch.items()
        if torch.is_tensor(value)
    }


def numbers(batch, tokenizer):
    """Return the numbers of the rows in a batch, where they can be read."""
    texts = tokenizer.batch_decode(batch.get("input_ids", []))
    return batch.get("number") or [int(re.search(r"#(\d+)", text)[1]) for text in texts]


def record_run(name):
    """Return what a run writes: its files, and the names that are in them."""
    from pacatune.training import train

    task, method, data = RUNS[name]
    folder = Path("runs", name)
    train(make_config(task, method, data, str(folder)), console=Console(file=io.StringIO()))
    config, report, table, card = (
        (folder / name).read_text()
        for name in ("config.yaml", "report.json", "report.md", "README.md")
    )
    found = {
        "files": [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()],
        "config.yaml": dotted(yaml.safe_load(config)),
        "report.json": json.loads(report),
        "report.md": re.findall(r"^\| ([^|]+) \|", table.split("\n\n")[1], re.MULTILINE),
        "README.md": yaml.safe_load(card.split("---")[1]),
    }
    return {f"{where}: {entry}" for where, entries in found.items() for entry in entries}


def dotted(values, before=""):
    """Yield the keys of nested mappings."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from dotted(value, f"{before}{key}.")
        else:
            yield f"{before}{key}"


def read():
    """Return what is kept: of data by case, and of runs by name all that is written."""
    kept = json.loads(PATH.read_text())
    names = {entry: RUNS if of == "all" else of.split(", ") for entry, of in kept["runs"].items()}
    return kept["data"], {run: {entry for entry, of in names.items() if run in of} for run in RUNS}


def main():
    """Write twin.json anew."""
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        build(Path(folder))
        data = {name: record_data(name) for name in CASES}
        found = {name: record_run(name) for name in RUNS}
    runs = {}
    for entry in sorted(set.union(*found.values())):
        of = [name for name in RUNS if entry in found[name]]
        runs[entry] = "all" if len(of) == len(RUNS) else ", ".join(of)
    parts = []
    for part, values in (("data", data), ("runs", runs)):
        lines = (f"{json.dumps(name)}: {json.dumps(of)}" for name, of in values.items())
        parts.append(f'"{part}": {{\n' + ",\n".join(lines) + "\n}")
    PATH.write_text("{" + ",\n".join(parts) + "}\n")


if __name__ == "__main__":
    main()
