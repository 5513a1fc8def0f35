"""The demos' runs: PaCA, and LoRA with as many trained parameters on the same steps."""

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from pacatune.data.packaged import prepare_dino, prepare_efficientnet
from pacatune.files.owned_folder import OwnedFolder

if TYPE_CHECKING:
    from rich.console import Console

    from pacatune.training import DataConfig, ModelConfig, RunConfig
    from pacatune.training.image import ImageDataConfig, ImageRunConfig
    from pacatune.training.report import RunReport

TEXT_BATCH_SIZE, IMAGE_BATCH_SIZE = 8, 32
# For both methods the best of 2e-3, 4e-3 and 8e-3 in 24 steps on the demo's data, with seed 0.
TEXT_LEARNING_RATE = 4e-3
MAX_ANSWER_TOKENS = 40
# A CPU without bfloat16 units emulates it, at several times the cost.
_FASTER = 1.2
# Cores of the run that had fewer, as a share of the other's, that still make them comparable.
_EQUAL = 0.9


def result_folder(path: Path) -> OwnedFolder:
    """Return the folder of a demo's results; its runs replace their own folders in it."""
    return OwnedFolder(path=path, kind="a demo")


def faster_dtype() -> str:
    """Return the type of the weights: the faster one of a CPU, `auto` where there is a GPU."""
    if torch.accelerator.is_available():
        return "auto"
    seconds = _matmul_seconds(torch.float32, torch.bfloat16)
    is_faster = seconds[torch.bfloat16] * _FASTER < seconds[torch.float32]
    return "bfloat16" if is_faster else "float32"


def _matmul_seconds(*dtypes: torch.dtype, num_repeats: int = 30) -> dict[torch.dtype, float]:
    """Return the least time of a matrix product in each type, on one thread.

    Short products in turns, and their least time: other programs may be running.
    """
    num_threads = torch.get_num_threads()
    x, weight = torch.randn(128, 512), torch.randn(512, 512)
    least = dict.fromkeys(dtypes, float("inf"))
    try:
        torch.set_num_threads(1)
        for _ in range(num_repeats):
            for dtype in dtypes:
                operands = x.to(dtype), weight.to(dtype)
                start = time.perf_counter()
                torch.nn.functional.linear(*operands)
                least[dtype] = min(least[dtype], time.perf_counter() - start)
    finally:
        torch.set_num_threads(num_threads)
    return least


def model_and_options(model: str, dtype: str, seed: int) -> "tuple[ModelConfig, dict[str, Any]]":
    """Return what all runs on a language model have in common, with `dtype` of `faster_dtype`."""
    from pacatune.training import ModelConfig

    options = {
        "bf16": None if dtype == "auto" else dtype == "bfloat16",
        "use_cpu": dtype != "auto",
        "save_strategy": "no",
        "report_to": "none",
        "seed": seed,
    }
    return ModelConfig(path=model, dtype=dtype), options  # type: ignore[arg-type]


def text_runs(
    model: str, data: "DataConfig", folder: Path, *, num_steps: int, seed: int, dtype: str
) -> "dict[str, RunConfig]":
    """Return the runs by method, in the order in which they are done, each in a folder."""
    from pacatune.training import RunConfig, TrainingConfig

    runs = {}
    for method in ("paca", "lora"):
        base, options = model_and_options(model, dtype, seed)
        training = TrainingConfig(
            output_dir=str(folder / method),
            max_steps=num_steps,
            per_device_train_batch_size=TEXT_BATCH_SIZE,
            per_device_eval_batch_size=2 * TEXT_BATCH_SIZE,
            learning_rate=TEXT_LEARNING_RATE,
            eval_steps=num_steps,
            **options,
        )
        runs[method] = RunConfig(method=method, model=base, data=data, training=training)
    runs["paca"].paca.random_seed = seed
    _equal_rank(runs)
    return runs


@dataclass(frozen=True, kw_only=True)
class ImageModel:
    """A real model of the image demo."""

    title: str
    prepare: Callable[..., Path]
    image_size: int
    learning_rates: dict[str, float]
    """By method: that with the best held-out accuracy of a few, from 1e-3 to 1e-2, in 40 steps
    with seed 0; for the head of DINOv2-S up to 3e-2. Chosen with less warming up, but for LoRA and
    PaCA on DINOv2-S: the best of 3e-3 and 5e-3 (PaCA also 2e-3)."""


IMAGE_MODELS = {
    "efficientnet-lite0": ImageModel(
        title="EfficientNet-Lite0, ImageNet weights (3.4 M parameters)",
        prepare=prepare_efficientnet,
        image_size=96,
        learning_rates={"head": 3e-3, "lora": 3e-3, "paca": 3e-3},
    ),
    "dinov2-small": ImageModel(
        title="DINOv2-S, fine-tuned for saliency by others (22 M parameters)",
        prepare=prepare_dino,
        image_size=98,
        learning_rates={"head": 1e-2, "lora": 3e-3, "paca": 3e-3},
    ),
}
_IMAGE_RANK = 8


def image_runs(
    model: str,
    data: "ImageDataConfig",
    folder: Path,
    learning_rates: Mapping[str, float],
    *,
    num_steps: int,
    seed: int,
) -> "dict[str, ImageRunConfig]":
    """Return the runs by method, the head alone too; without a rate, a method has its default."""
    from pacatune.training.image import ImageModelConfig, ImageRunConfig, ImageTrainingConfig

    runs = {}
    for method in ("head", "lora", "paca"):
        training = ImageTrainingConfig(
            output_dir=str(folder / method),
            max_steps=num_steps,
            per_device_train_batch_size=IMAGE_BATCH_SIZE,
            # Of so few: until the new head has learnt something, its gradients are noise.
            warmup_steps=num_steps // 5,
            learning_rate=learning_rates.get(method),
            eval_steps=num_steps + 1,  # before and after alone
            save_strategy="no",
            report_to="none",
            seed=seed,
        )
        held = ImageModelConfig(path=model)
        runs[method] = ImageRunConfig(method=method, model=held, data=data, training=training)
    runs["paca"].paca.r = runs["paca"].paca.paca_alpha = _IMAGE_RANK
    runs["paca"].paca.random_seed = seed
    _equal_rank(runs)
    return runs


def _equal_rank(runs: Mapping[str, Any]) -> None:
    """Give LoRA the rank, alpha too, at which its adapter has as many parameters as PaCA's."""
    from pacatune.training.task import task_of

    lora = runs["lora"].lora
    counted = copy.deepcopy(dict(runs))
    counted["lora"].lora.r = 1
    numbers = {m: task_of(run).plan().num_trainable_parameters for m, run in counted.items()}
    head = numbers.get("head", 0)
    lora.r = max(1, round((numbers["paca"] - head) / (numbers["lora"] - head)))
    lora.lora_alpha = lora.r


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one run achieved, and on how many processor cores."""

    report: "RunReport"
    num_cores: float
    """Processor time per time: what other programs left, of what the run could use."""


def run_all(
    runs: Mapping[str, Any], train: Callable[..., Any], console: "Console"
) -> dict[str, Outcome]:
    """Train one after the other, replacing what an earlier demo left in their folders."""
    outcomes = {}
    for method, config in runs.items():
        console.rule(f"[bold]{method}", align="left")
        wall, used = time.perf_counter(), time.process_time()
        report = train(config, overwrite=True, console=console)
        wall, used = time.perf_counter() - wall, time.process_time() - used
        outcomes[method] = Outcome(report=report, num_cores=used / wall)
    return outcomes


def unequal_cores(outcomes: Mapping[str, Outcome]) -> list[str]:
    """Say so if other programs slowed PaCA's run on the CPU more than LoRA's, or the reverse."""
    # Not the head's run: it prepares images most of the time, on one core.
    cores = [outcome.num_cores for method, outcome in outcomes.items() if method != "head"]
    if outcomes["paca"].report.device != "cpu" or min(cores) > _EQUAL * max(cores):
        return []
    shown = " and ".join(f"{number:.1f}" for number in cores)
    return [
        f"Other programs were running: the runs had {shown} processor cores. "
        "Compare step times on an idle machine."
    ]


def answers(model: str, adapter: Path, prompts: list[str]) -> Iterator[dict[str, str]]:
    """Yield each `prompt` with what the model says `before` and `after`, without sampling."""
    from pacatune.adapters.generation import TextGenerator
    from pacatune.adapters.sampling import Sampling

    # A CPU multiplies one token at a time faster in float32, whatever suits whole batches.
    dtype: Literal["auto", "float32"] = "auto" if torch.accelerator.is_available() else "float32"
    generator = TextGenerator(model, adapter, dtype=dtype, device="auto")
    sampling = Sampling(max_new_tokens=MAX_ANSWER_TOKENS)
    for prompt in prompts:
        tokens = generator.encode(prompt)
        before, after = (
            generator.generate(tokens, sampling, with_adapter=with_adapter).strip()
            for with_adapter in (False, True)
        )
        yield {"prompt": prompt, "before": before, "after": after}
