"""The demo's runs: PaCA, and LoRA with as many trained parameters on the same steps."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from rich.console import Console

    from pacatune.training import DataConfig, RunConfig
    from pacatune.training.report import RunReport

BATCH_SIZE = 8
# For both methods the best of 2e-3, 4e-3 and 8e-3 in 24 steps on the demo's data, with seed 0.
LEARNING_RATE = 4e-3
MAX_ANSWER_TOKENS = 40
# A CPU without bfloat16 units emulates it, at several times the cost.
_FASTER = 1.2
# Cores of the run that had fewer, as a share of the other's, that still make them comparable.
_EQUAL = 0.9


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the model says to one prompt, without and with the adapter."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one run achieved, and on how many processor cores."""

    report: "RunReport"
    num_cores: float
    """Processor time per time: what other programs left, of what the run could use."""


def choose_dtype() -> str:
    """Return the type of the weights: the faster one of a CPU, `auto` where there is a GPU."""
    if torch.accelerator.is_available():
        return "auto"
    seconds = _matmul_seconds(torch.float32, torch.bfloat16)
    is_faster = seconds[torch.bfloat16] * _FASTER < seconds[torch.float32]
    return "bfloat16" if is_faster else "float32"


def make_runs(
    model: str, data: "DataConfig", folder: Path, *, num_steps: int, seed: int, dtype: str
) -> "dict[str, RunConfig]":
    """Return the two runs, by method, in the order in which they are done.

    Args:
        model: Folder or hub id.
        data: Data of both runs.
        folder: Gets one folder per method.
        num_steps: Optimizer steps of each run.
        seed: Seed for the data's order, the columns and the start of LoRA.
        dtype: Type of the weights, as `choose_dtype` returns it.
    """
    paca = _make_run("paca", model, data, folder, num_steps=num_steps, seed=seed, dtype=dtype)
    lora = _make_run("lora", model, data, folder, num_steps=num_steps, seed=seed, dtype=dtype)
    paca.paca.random_seed = seed
    lora.lora.r = _equal_rank(paca, lora)
    lora.lora.lora_alpha = lora.lora.r
    return {"paca": paca, "lora": lora}


def run_all(
    runs: dict[str, Any], train: Callable[..., Any], console: "Console"
) -> "dict[str, Outcome]":
    """Train one after the other, replacing what an earlier demo left in their folders.

    Args:
        runs: Configuration of each run by method.
        train: The recipe.
        console: Where to show progress.
    """
    outcomes = {}
    for method, config in runs.items():
        console.rule(f"[bold]{method}", align="left")
        wall, used = time.perf_counter(), time.process_time()
        report = train(config, overwrite=True, console=console)
        wall, used = time.perf_counter() - wall, time.process_time() - used
        outcomes[method] = Outcome(report=report, num_cores=used / wall)
    return outcomes


def unequal_cores(outcomes: "dict[str, Outcome]") -> str | None:
    """Say so if other programs slowed one run on the CPU more than another."""
    cores = [outcome.num_cores for outcome in outcomes.values()]
    if outcomes["paca"].report.device != "cpu" or min(cores) > _EQUAL * max(cores):
        return None
    shown = " and ".join(f"{number:.1f}" for number in cores)
    return (
        f"Other programs were running: the runs had {shown} processor cores. "
        "Compare step times on an idle machine."
    )


def answer(
    model: str, adapter: Path, prompts: list[str], say: Callable[[Answer], None]
) -> list[Answer]:
    """Ask each prompt without and with the adapter; the likeliest tokens, no sampling.

    Args:
        model: Folder or hub id of the base.
        adapter: Folder.
        prompts: What a user would write.
        say: Called with each answer as it comes.
    """
    from pacatune.adapters.generation import Sampling, TextGenerator

    # A CPU multiplies one token at a time faster in float32, whatever suits whole batches.
    dtype: Literal["auto", "float32"] = "auto" if torch.accelerator.is_available() else "float32"
    generator = TextGenerator(model, adapter, dtype=dtype, device="auto")
    sampling = Sampling(max_new_tokens=MAX_ANSWER_TOKENS)
    answers = []
    for prompt in prompts:
        tokens = generator.encode(prompt)
        before, after = (
            generator.generate(tokens, sampling, with_adapter=with_adapter).strip()
            for with_adapter in (False, True)
        )
        answers.append(Answer(prompt=prompt, before=before, after=after))
        say(answers[-1])
    return answers


def _make_run(
    method: Any,
    model: str,
    data: "DataConfig",
    folder: Path,
    *,
    num_steps: int,
    seed: int,
    dtype: Any,
) -> "RunConfig":
    from pacatune.training import ModelConfig, RunConfig, TrainingConfig

    training = TrainingConfig(
        output_dir=str(folder / method),
        max_steps=num_steps,
        per_device_train_batch_size=BATCH_SIZE,
        per_device_eval_batch_size=2 * BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        bf16=None if dtype == "auto" else dtype == "bfloat16",
        use_cpu=dtype != "auto",
        eval_steps=num_steps,
        save_strategy="no",
        report_to="none",
        seed=seed,
    )
    model_config = ModelConfig(path=model, dtype=dtype)
    return RunConfig(method=method, model=model_config, data=data, training=training)


def _equal_rank(paca: "RunConfig", lora: "RunConfig") -> int:
    """Return the rank at which LoRA trains as many parameters as PaCA, or nearly."""
    from pacatune.training.task import task_of

    single = copy.deepcopy(lora)
    single.lora.r = 1
    numbers = [task_of(config).plan().num_trainable_parameters for config in (paca, single)]
    return max(1, round(numbers[0] / numbers[1]))


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
