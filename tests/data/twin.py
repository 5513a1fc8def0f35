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

from tests.conftest import CHAT_TEMPLATE, build_model, build_tokenizer
from tests.image_models import save_vit
from tests.vision_language import build_vision_language_model

PATH = Path(__file__).with_name("twin.json")
NUM_ROWS = 7
CONFIG, REPORT, TABLE, CARD = "config.yaml", "report.json", "report.md", "README.md"

_CONTENT = (
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}"
)
_ANSWER = _CONTENT + (
    "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}</s>"
)
_WITH_TOOLS = (
    "<s>{% if tools %}<|system|>\n{{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>\n" + _ANSWER + "\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
_MARKED = (
    "{% if m.role == 'assistant' %}{% generation %}[]{% endgeneration %}{% else %}[]{% endif %}"
)
TEMPLATES = {
    "plain": CHAT_TEMPLATE.replace("{{ message['content'] }}", "{% set m = message %}" + _CONTENT),
    "marked": _WITH_TOOLS.replace(_ANSWER + "\n", _MARKED.replace("[]", _ANSWER) + "{{ '\n' }}"),
    "ChatML": _WITH_TOOLS.replace("<s>", "<|im_start|>system\nYou help.<|im_end|>\n")
    .replace("<|{{ m.role }}|>", "<|im_start|>{{ m.role }}")
    .replace("<|assistant|>", "<|im_start|>assistant")
    .replace("</s>", "<|im_end|>"),  # which the tokenizer does not know as a stop
}
_FILES = {
    "sft": "text.jsonl text.csv text.parquet completion.jsonl completion.csv instruction.jsonl "
    "mmlu.jsonl images_column.jsonl",
    "dpo": "pairs.jsonl whole_pairs.jsonl whole_chat_pairs.jsonl",
    "reward": "pairs.jsonl whole_pairs.jsonl",
    "kto": "judged.jsonl judged.csv pairs.jsonl chat_pairs.jsonl",
    "grpo": "prompts.jsonl",
    "classifier": "classes.jsonl",
    "image": "images/train",
}
_CHATS = {
    "sft": "messages weights chat_completion tools sharegpt parts images",
    "dpo": "chat_pairs",
    "reward": "chat_pairs",
    "kto": "judged_chats",
    "grpo": "chat_prompts",
}
_MIXED = [{"path": "messages.jsonl", "weight": 2}, {"path": "completion.jsonl", "weight": 1}]
CASES = {
    **{
        f"{task}: {file}": (task, {"path": file})
        for task, files in _FILES.items()
        for file in files.split()
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
    "stream": (
        "sft",
        {"path": "text.jsonl", "streaming": True, "shuffle_buffer": 5, "eval_fraction": 0},
    ),
    "system prompt": ("rloo", {"path": "prompts.jsonl", "system_prompt": "Be kind."}),
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
    f"{task} {method}": (task, method, {"path": file})
    for task, (file, methods) in _TRAINED.items()
    for method in methods.split()
}


def chat(*texts):
    """Return turns of a user and an assistant, behind one of the system."""
    roles = ("user", "assistant")
    turns = [{"role": roles[turn % 2], "content": text} for turn, text in enumerate(texts)]
    return [{"role": "system", "content": "Be kind."}, *turns]


def rows(i):
    """Return row number `i` of each file; its text has the number."""
    asked, answer, bad = f"What is #{i}?", f"It is {7 * i % 10}." + " Yes." * (i % 3), "No idea."
    prompt = chat("Hello.", "Hi.", asked)
    good_turn, bad_turn = ([{"role": "assistant", "content": text}] for text in (answer, bad))
    pair, turns = {"chosen": answer, "rejected": bad}, {"chosen": good_turn, "rejected": bad_turn}
    call = {"type": "function", "function": {"name": "count", "arguments": {"upto": i}}}
    called = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "4"}]
    tool = {"name": "count", "description": "Counts.", "parameters": {"type": "object"}}
    parts = [{"type": "text", "text": text} for text in (asked, "Well?")]
    picture, speakers = f"pictures/{i}.png", ("human", "gpt") * 2
    said = zip(speakers, (asked, answer, "Sure?", bad), strict=True)
    return {
        "text": {"text": f"{asked} {answer}"},
        "completion": {"prompt": asked, "completion": f" {answer}"},
        "instruction": {"instruction": asked, "input": "Please." * (i % 2), "output": answer},
        "mmlu": {"question": asked, "choices": ["a", "b", answer, bad], "answer": i % 4},
        "messages": {"messages": chat(asked, answer, "Sure?", bad)},
        "weights": {"messages": [*prompt, {**bad_turn[0], "weight": 0}, prompt[1], *good_turn]},
        "chat_completion": {"prompt": prompt, "completion": good_turn},
        "tools": {"messages": [*prompt, *called, *good_turn], "tools": [{"function": tool}]},
        "sharegpt": {"conversations": [{"from": who, "value": text} for who, text in said]},
        "parts": {"messages": chat(parts, answer)},
        "images": {"messages": chat([{"type": "image", "image": picture}, *parts], answer)},
        "images_column": {"messages": chat(f"See <image>{asked}", answer), "images": [picture]},
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
    import pandas

    tokenizer = build_tokenizer()
    build_model(len(tokenizer)).save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    build_vision_language_model(folder / "qwen")
    save_vit(folder / "vit")
    numbered = [rows(i) for i in range(1, NUM_ROWS + 1)]
    for name in numbered[0]:
        lines = [json.dumps(row[name]) + "\n" for row in numbered]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    for name, kind in (
        ("text", "csv"),
        ("text", "parquet"),
        ("completion", "csv"),
        ("judged", "csv"),
    ):
        table = pandas.DataFrame([row[name] for row in numbered])
        getattr(table, f"to_{kind}")(folder / f"{name}.{kind}", index=False)
    (folder / "pictures").mkdir()
    for i in range(1, NUM_ROWS + 1):
        Image.new("RGB", (30 + 5 * i, 40), (20 * i, 0, 99)).save(folder / f"pictures/{i}.png")
    noise = np.random.default_rng(0)
    for i in range(24):
        pixels = noise.integers(0, 255, (36, 40, 3)).astype(np.uint8)
        pixels[..., 0] = 10 * i  # by which it is known again
        place = folder / "images" / ("train" if i < 15 else "test") / "abc"[i % 3]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{i}.png")
    reward = (
        "def length(completions, **kwargs):\n    return [len(text) / 10 for text in completions]\n"
    )
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
    return RunConfig(
        task=task,
        method=method,
        model={"path": images if "images" in data.get("path", "") else "llama"},
        data=data,
        training=training,
        **options,
    )


class Started(BaseException):
    """A run has its trainer, and would take its first step."""


def start(config):
    """Return the trainer of a run before its first step."""
    from pacatune.training import recipe

    def stop(trainer, *args, **kwargs):
        raise Started(trainer)

    with mock.patch("transformers.Trainer.train", stop):
        try:
            recipe.train(config, console=quiet())
        except Started as started:
            return started.args[0]


def quiet():
    from rich.console import Console

    return Console(file=io.StringIO())


def record_data(name):
    """Return what becomes of the data of a case."""
    from transformers import AutoTokenizer

    task, data = CASES[name]
    method = "full" if task == "sft" else "lora"
    try:
        trainer = start(make_config(task, method, data, f"data/{name}", lean="off"))
    except ValueError as error:
        return {"refused": str(error)}
    parts = [
        list(examples(trainer, data)) for data in (trainer.train_dataset, trainer.eval_dataset)
    ]
    decode = (trainer.processing_class or AutoTokenizer.from_pretrained("llama")).decode
    everything = [example for part in parts for example in part]
    batches = islice(trainer.get_train_dataloader(), 3)
    found = {
        "order": [numbers(example, decode)[0] for example in parts[0]],
        "held out": [numbers(example, decode)[0] for example in parts[1]],
        "batches": [numbers(batch, decode) for batch in batches],
        "fingerprint": trainer.trained_on.fingerprint,
    }
    if "input_ids" in everything[0]:
        texts = [learned(example) for example in everything]
        found["tokens"] = sum(len(ids) for example in everything for ids in example["input_ids"])
        found["learned tokens"] = sum(len(ids) for text in texts for ids in text)
        found["first learned"] = [decode(ids) for ids in texts[0]]
    for column in sorted({column for example in everything for column in example}):
        values = [[example.get(column) for example in part] for part in parts]
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
        found[f"digest of {column}"] = digest.hexdigest()[:16]
    return found


def examples(trainer, data):
    """Yield the columns of each example, as lists: what a model sees of it, or a reward."""
    if data is None:
        return
    if hasattr(trainer, "reward_funcs"):
        write = trainer.processing_class
        for row in data:
            prompt = row["prompt"]
            ids = (
                write(prompt)
                if isinstance(prompt, str)
                else write.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)
            )["input_ids"]
            row = {name: [value] for name, value in row.items() if name != "place"}
            yield {**row, "input_ids": [ids]}
        return
    for row, batch in zip(islice(data, NUM_ROWS), trainer.get_eval_dataloader(data), strict=False):
        prepared = {name: value for name, value in row.items() if name.endswith("_ids")}
        batch = {name: value for name, value in batch.items() if "attention" not in name}
        yield {**prepared, **{name: whole(value).tolist() for name, value in batch.items()}}


def whole(tensor):
    """Return whole numbers, which are the same on every processor."""
    return (100 * tensor).round().int() if tensor.is_floating_point() else tensor


def numbers(batch, decode):
    """Return the numbers of the rows in a batch."""
    if isinstance(batch, list):
        return [row["number"] for row in batch]
    if "number" in batch:
        return batch["number"]
    if "input_ids" in batch:
        texts = (decode(ids) for ids in batch["input_ids"])
        return [int(re.search(r"#(\d+)", text)[1]) for text in texts]
    red = whole(torch.as_tensor(batch["pixel_values"]))[:, 0].float().mean((1, 2)) / 100
    return [round(255 * (1 + level) / 2 / 10) for level in red.tolist()]


def learned(example):
    """Return the tokens that are learned, by sequence; all where nothing says which."""
    ids, labels = example["input_ids"], example.get("labels", [None])
    masks = example.get("completion_mask") or [[True] * len(row) for row in ids]
    if isinstance(labels[0], list):
        masks = [[label != -100 for label in row] for row in labels]
    pairs = [zip(row, mask, strict=True) for row, mask in zip(ids, masks, strict=True)]
    return [[token for token, is_learned in pair if is_learned] for pair in pairs]


def record_run(name):
    """Return what a run writes: its files, and the names that are in them."""
    from pacatune.training import train

    task, method, data = RUNS[name]
    folder = Path("runs", name)
    train(make_config(task, method, data, str(folder)), console=quiet())
    texts = {name: (folder / name).read_text() for name in (CONFIG, REPORT, TABLE, CARD)}
    found = {
        "files": [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()],
        CONFIG: dotted(yaml.safe_load(texts[CONFIG])),
        REPORT: json.loads(texts[REPORT]),
        TABLE: re.findall(r"^\| ([^|]+) \|", texts[TABLE].split("\n\n")[1], re.MULTILINE),
        CARD: yaml.safe_load(texts[CARD].split("---")[1]),
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
    runs = {run: {entry for entry, of in names.items() if run in of} for run in RUNS}
    return kept["data"], runs


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
    lines = {
        part: ",\n".join(f"{json.dumps(name)}: {json.dumps(of)}" for name, of in values.items())
        for part, values in (("data", data), ("runs", runs))
    }
    PATH.write_text(
        "{" + ",\n".join(f'"{name}": {{\n{of}\n}}' for name, of in lines.items()) + "}\n"
    )


if __name__ == "__main__":
    main()
