"""Tables 1, 2, 3 and 5: language models on MMLU, and on Oasst1 scored by MT-Bench.

SmolLM2-135M is trained: to name the type of an answer (scored on others), and on
questions and answers. A judge of answers is not to be had offline, so there the loss on held-out
answers stands beside the score.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.results import mean_row
from examples.packaged import default_cache, prepare
from experiments import mmlu
from experiments.jobs import Job
from experiments.paper import MODEL, PAPER, Line
from experiments.reproduce.costs import memory_jobs, step_job
from experiments.reproduce.experiment import NATS
from experiments.reproduce.runs import at_best_rate, quiet, rate_note
from experiments.study.config import Arm, StudyConfig
from experiments.study.runner import run_study
from pacatune import resident
from pacatune.adapters.loading import load_language_model
from pacatune.methods import METHODS, size_options
from pacatune.precision import bfloat16_is_fast
from pacatune.reports.rows import Row, spread_of_mean
from pacatune.training import RunConfig, train

_SMALL_MODEL = "SmolLM2-135M-Instruct"


def small_dtype() -> str:
    """Return what this processor multiplies fast."""
    return "bfloat16" if bfloat16_is_fast(use_cpu=True) else "float32"


# Table 1: the types of answers.

TABLE_1 = PAPER["table1"]
_DATA = "type-choices"
_STEPS, _BATCH = 16, 8
# alpha / rank is 4 in Table 9 and multiplies the rate.
_RATES_1, _SEEDS = (1e-3, 2e-3, 4e-3), (0, 1)
_NUM_QUESTIONS = 300


def _small_job_1(line: Line) -> Job:
    """Return the job of one line: the best rate of a grid by validation loss, then all seeds."""
    return Job(
        key=f"small-{line.key}",
        title=f"{_SMALL_MODEL} on types of answers: {line.title}",
        inputs={
            "method": line.method,
            "settings": dict(line.settings) if line in TABLE_1.trained else {},
            "steps": [_STEPS, _BATCH],
            "learning_rates": list(_RATES_1),
            "model": _SMALL_MODEL,
            "data": _DATA,
            "seeds": list(_SEEDS),
            "num_questions": _NUM_QUESTIONS,
            "dtype": small_dtype(),
        },
        run=lambda folder: _run_small_1(line, folder),
    )


def _run_small_1(line: Line, folder: Path) -> list[Row]:
    model, data = prepare("smollm2"), prepare(_DATA)
    adapters, note = list[Path | None]([None]), ""
    if line in TABLE_1.trained:

        def trained(rate: float, seed: int) -> tuple[float, Path]:
            output = folder / f"rate{rate:g}-seed{seed}"
            run = _run_of(line, model, data / "train.jsonl", rate, seed, output)
            with quiet(folder):
                loss = train(run, overwrite=True).eval_loss_after
            assert loss is not None, "a part of the data is held out"
            return loss, output

        best, runs = at_best_rate(_RATES_1, _SEEDS, trained, lambda run: run[0])
        adapters, note = [output for _, output in runs], rate_note(line, best, _RATES_1)
    right = [_ask(model, adapter, data / "test.jsonl") for adapter in adapters]
    value = 100 * statistics.mean(statistics.mean(answers) for answers in right)
    names = {"unit": "%", "model": _SMALL_MODEL, "note": note}
    return [accuracy_row(Row(what="average", method=line.title, value=value, **names), right)]


def _run_of(line: Line, model: Path, data: Path, rate: float, seed: int, output: Path) -> RunConfig:
    """Return a run of `pacatune train` by Table 9, but for what two cores cannot do."""
    stated, method = line.settings, METHODS[line.method]
    dropout = 0.0 if method.is_paca else stated["dropout"]
    adapter = size_options(method, stated["rank"], stated["alpha"], dropout)
    if method.is_paca:
        adapter["random_seed"] = seed
    options = {
        "output_dir": str(output),
        "max_steps": _STEPS,
        "learning_rate": rate,
        "lr_scheduler_type": stated["scheduler"],
        "warmup_steps": 0.1,
        "per_device_train_batch_size": _BATCH,
        "max_length": stated["seq_len"],
        "bf16": small_dtype() == "bfloat16",
        "seed": seed,
        "report_to": "none",
        "eval_steps": _STEPS + 1,  # before and after alone
        "save_strategy": "no",
    }
    return RunConfig(
        method=line.method,
        model={"path": str(model), "dtype": small_dtype()},
        data={"path": str(data), "format": "prompt-completion", "eval_fraction": 0.03},
        training=options,
        # As the paper's code computes.
        lean="off",
        **{method.sections[0]: adapter},
    )


def accuracy_row(row: Row, right: Sequence[Sequence[float]]) -> Row:
    """Return an accuracy in per cent with its 95 % interval: of the questions, and of the seeds.

    What differences are made of are the seeds, which all answer the same questions, or those where
    there is one seed.

    Args:
        row: What it is called, and its value.
        right: For each seed 1 or 0 for each question.
    """
    questions = [100 * statistics.mean(one) for one in zip(*right, strict=True)]
    seeds, spread = [100 * statistics.mean(one) for one in right], spread_of_mean(questions)
    if len(seeds) > 1:
        spread = math.hypot(spread, spread_of_mean(seeds))
    each = {str(i): one for i, one in enumerate(seeds if len(seeds) > 1 else questions)}
    low, high = row.value - spread, row.value + spread
    return replace(row, low=low, high=high, n=len(questions), each=each)


def _ask(model: Path, adapter: Path | None, heldout: Path) -> list[float]:
    """Return 1 or 0 for each question."""
    task = {
        "task": _DATA,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(heldout)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        # Names of columns, so that no text of the data is taken for a template.
        "doc_to_text": "prompt",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
    }
    loaded = load_language_model(str(model), adapter, dtype=small_dtype(), device="cpu")
    with resident(loaded.model):
        results = mmlu.lm_eval_results(
            loaded.model, loaded.tokenizer, [task], batch_size=16, limit=_NUM_QUESTIONS
        )
    return [float(each["acc"]) for each in results["samples"][_DATA]]


def table_1_jobs() -> list[Job]:
    """Return the jobs of Table 1."""
    lines = [line for line in TABLE_1.lines if line.model == MODEL]
    small = [_small_job_1(line) for line in lines]
    return [*memory_jobs(TABLE_1), step_job(TABLE_1, tokens=1024, seq_len=512), *small]


# Tables 2, 3 and 5: a study of one arm for each line.

_STEPS_2 = 12
# Columns of the largest gradients need smaller ones than others.
_RATES_2 = (5e-4, 1.5e-3, 4e-3)
# Of some 560 questions; what rates are chosen by.
_VALIDATION = 0.05


def _small_job_2(line: Line) -> Job:
    """Return the study of one line, whose first seed chooses the rate."""
    options: dict[str, Any] = {
        "model": {"dtype": small_dtype()},
        "training": {"max_steps": _STEPS_2, "lr_scheduler_type": "linear", "warmup_steps": 0.1},
    }
    if line.method.endswith("paca"):
        strategy = line.variant.partition("-")[0] or "random"
        options["paca"] = {"selection": strategy, "selection_batches": 8}
    # alpha = rank: the update is not scaled, and the grid of rates is the same for every rank.
    arm = Arm(method=line.method, rank=line.rank, learning_rates=list(_RATES_2))
    config = StudyConfig(
        task=str(default_cache() / "smollm2-chat.yaml"),
        arms={line.method: arm},
        options=options,
        # Other ones for other columns.
        seeds=[2, 3] if line.variant.endswith("-2") else [0, 1],
        validation_fraction=_VALIDATION,
        forgetting_tokens=0,
    )
    title = f"{_SMALL_MODEL} on questions and answers: {line.title}"

    def run(folder: Path) -> list[Row]:
        folder.parent.mkdir(parents=True, exist_ok=True)
        prepare("smollm2-chat")
        (reached,) = run_study(config, folder).values()
        if reached.learning_rate is None:
            raise RuntimeError(f"no run of {line.title} ended well: {' '.join(reached.failures)}")
        each = {str(seed): value for seed, value in reached.values.items()}
        note = rate_note(line, reached.learning_rate, _RATES_2)
        names = {"unit": NATS, "model": _SMALL_MODEL, "setting": "loss on held-out answers"}
        return [mean_row("average", line.title, each, note, **names)]

    return Job(key=f"small-{line.key}", title=title, inputs=asdict(config), run=run)


def table_jobs(name: str) -> list[Job]:
    """Return the jobs of Table 2, 3 or 5."""
    table, jobs = PAPER[name], list[Job]()
    if "memory" in table.units:
        jobs = [*memory_jobs(table, explain=True), step_job(table, tokens=768, seq_len=768)]
    return jobs + [_small_job_2(line) for line in table.trained if line.model == MODEL]
