"""The table of README's first screen: `train`'s default beside LoRA of rank 16."""

from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks import study_runs, verdict
from benchmarks.results import RESULTS, read
from experiments.study.statistics import Study, judged, paired
from pacatune.files.folder import format_bytes
from pacatune.reports.rows import Table

OURS, LORA = "paca16", "lora16"
"""Arms of the studies: the default, and what stands beside it."""


def block(results: Path = RESULTS) -> str:
    """Return the table; each cell has at most eight words."""
    state = _values("cost-8b", results)
    synced = _values("rl_sync", results, model="SmolLM2-135M")
    cells = [
        [
            "Kept for backward, LLaMA3-8B, per token",
            *_lengths(results, "kept per token", format_bytes),
            "counted",
        ],
        [
            "Longest sequence, LLaMA3-8B on 80 GB",
            *_lengths(results, "longest sequence", "{:,.0f}".format),
            "simulated",
        ],
        ["Step, 512 tokens and more", "1", _steps(results, "512", "2048"), "CPU, small Llama"],
        ["Step, 16 tokens", "1", _steps(results, "16"), "CPU, small Llama"],
        [
            "Adapter, gradients and optimizer, LLaMA3-8B",
            *(format_bytes(state["state", arm]) for arm in (LORA, OURS)),
            "computed",
        ],
        ["Test loss, 40 to 120 steps", "-", losses(study_runs.studies(results)), "CPU, four tasks"],
    ]
    long = verdict.studies(results)
    if verdict.has_all_seeds(long, OURS, LORA):  # one task of four would say too much
        cells.append(["Test loss, 480 to 600 steps", "-", losses(long), "CPU, four tasks"])
    cells += [
        ["Right answers, tuned in a 4-bit GGUF", *_served(results), "CPU, SmolLM2-135M"],
        [
            "Bytes of a sync, SmolLM2-135M",
            format_bytes(synced["sent per sync", "lora-adapter"]),
            format_bytes(synced["complete sync", "paca"]),
            "counted",
        ],
    ]
    return "\n".join(Table(header=["", "LoRA, r = 16", "PaCA, r = 16", ""], cells=cells).markdown())


def _values(name: str, results: Path, **names: str) -> dict[tuple[str, str], float]:
    """Return the values of a result by quantity and method, of the rows with these names."""
    rows = [r for r in read(name, results).rows if names.items() <= vars(r).items()]
    return {(row.what, row.method): row.value for row in rows}


def _lengths(results: Path, what: str, text: Callable[[float], str]) -> list[str]:
    """Return what LoRA has with adapters in float32 and bfloat16, and PaCA."""
    values = _values("lengths", results, setting="level 1")
    loras = sorted(values[what, name] for name in ("lora", "lora_bf16"))
    return [" to ".join(map(text, loras)), text(values[what, "paca"])]


def _steps(results: Path, *tokens: str) -> str:
    """Return PaCA's step as a share of LoRA's, with adapters in either dtype."""
    shares = [
        row.value
        for row in read("step", results).rows
        if row.method in ("paca / lora", "paca / lora_bf16")
        and row.setting.partition(" tokens")[0] in tokens
    ]
    return f"{min(shares):.2f} to {max(shares):.2f}"


def losses(tasks: Mapping[str, Study]) -> str:
    """Return on how many tasks PaCA is better or worse, by Holm's correction over the tasks."""
    arms = {task: verdict.arms_of(study) for task, study in tasks.items()}
    told = judged({(task, OURS): paired(arms[task][OURS], arms[task][LORA]) for task in tasks})
    said = [difference.said for difference in told.values()]
    return ", ".join(f"{word} on {said.count(word)}" for word in dict.fromkeys(sorted(said)))


def _served(results: Path) -> list[str]:
    """Return the shares of right answers, of LoRA merged and beside the file, and of PaCA."""
    values = _values("packed", results, setting="Q4_1, words reversed")
    merged, beside, ours = (values["score", name] for name in ("lora", "lora, beside", "paca"))
    return [f"{merged:.0f} % merged, {beside:.0f} % beside", f"{ours:.0f} %"]
