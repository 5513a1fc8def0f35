"""What an evaluation writes: JSON, Markdown, and a line per question."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from pacatune.adapters.base import innermost
from pacatune.adapters.fingerprint import fingerprint, unwrap
from pacatune.adapters.loading import LoadedModel
from pacatune.evaluation.harness import Score
from pacatune.files.folder import check_output
from pacatune.files.owned_folder import to_json, write_whole
from pacatune.format.tensors import TENSORS_NAME
from pacatune.precision import dtype_name
from pacatune.reports.provenance import sha256_of, versions, versions_text
from pacatune.reports.rows import Table
from pacatune.tuner.layout import Conv1DLayout, ConvolutionLayout, Layout, layout_of

RESULT_NAME, REPORT_NAME, QUESTIONS_NAME = "evaluation.json", "evaluation.md", "questions.jsonl"
_SPARE_BYTES = 2**20
# Layers whose weights tell one base from another.
_HASHED = (Layout, Conv1DLayout, ConvolutionLayout)


@dataclass(frozen=True, kw_only=True)
class Report:
    """One evaluation's result, for people and for programs."""

    title: str
    headings: list[str]
    rows: list[list[str]]
    """Cells of a table; the first says what was scored."""
    result: dict[str, Any]
    """The same and more, as JSON."""
    notes: list[str] = field(default_factory=list)
    """What the reader should know, a sentence each."""
    questions: list[dict[str, Any]] = field(default_factory=list, repr=False)

    def table(self) -> Table:
        """Return the scores as a table."""
        return Table(header=list(self.headings), cells=self.rows)

    def markdown(self, head: dict[str, Any]) -> str:
        """Return a page with the table, the settings and the notes."""
        settings = {
            "command": f"`{head['command']}`",
            "model": head["model"]["name"],
            "adapter": head["model"]["adapter"] or "none",
            "number type": head["model"]["dtype"],
            "base held as": head["model"]["quantization"],
            **head["settings"],
            "versions": versions_text(head["versions"]),
        }
        known = [[name, str(value)] for name, value in settings.items() if value is not None]
        lines = [f"# {self.title}", "", *self.table().markdown(), ""]
        lines += [*(f"- {note}" for note in self.notes), ""]
        lines += Table(header=["setting", ""], cells=known, num_index=2).markdown()
        return "\n".join(lines) + "\n"


def open_output(path: Path) -> None:
    """Make an evaluation's folder before anything is loaded: a result is never overwritten."""
    check_output(path, _SPARE_BYTES)
    path.mkdir(parents=True, exist_ok=True)


def describe(loaded: LoadedModel, command: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return what belongs to any result: the model, the command, its settings and versions."""
    adapter = None if loaded.adapter is None else loaded.adapter.folder
    return {
        "command": command,
        "settings": settings,
        "model": {
            "name": loaded.name,
            "dtype": dtype_name(loaded.model.dtype),
            "device": str(loaded.model.device),
            "quantization": _quantization(loaded.model),
            "base": _fingerprint(loaded.model),
            "adapter": None if adapter is None else str(adapter),
            "adapter_sha256": None if adapter is None else sha256_of(adapter / TENSORS_NAME),
        },
        "versions": versions("lm-eval", "datasets", "bitsandbytes"),
    }


def write_report(folder: Path, head: dict[str, Any], report: Report, *, finished: bool) -> None:
    """Write a result as far as it is known, under the head that `describe` returned."""
    if report.questions:
        lines = (json.dumps(each, ensure_ascii=False) + "\n" for each in report.questions)
        write_whole(folder / QUESTIONS_NAME, "".join(lines))
    write_whole(folder / REPORT_NAME, report.markdown(head))
    values = {
        "finished": finished,
        "title": report.title,
        **head,
        "result": report.result,
        "notes": report.notes,
    }
    write_whole(folder / RESULT_NAME, to_json(values))


def result_dict(result: Any) -> dict[str, Any]:
    """Return a result for JSON, without its questions, which have a file of their own."""
    return {name: value for name, value in asdict(result).items() if name != "questions"}


def percent(score: Score) -> str:
    """Return a score as the tables show it, such as `41.5 ± 2.1`."""
    spread = "" if score.stderr is None else f" ± {100 * score.stderr:.1f}"
    return f"{100 * score.value:.1f}{spread}"


def _quantization(model: Any) -> str | None:
    """Return how the base is held, such as `nf4`; None where it is not quantised."""
    config = getattr(unwrap(model).config, "quantization_config", None)
    if config is None:
        return None
    values = config if isinstance(config, dict) else config.to_dict()
    if values.get("load_in_4bit"):
        return str(values["bnb_4bit_quant_type"])
    return "int8" if values.get("load_in_8bit") else str(values.get("quant_method"))


def _fingerprint(model: Any) -> dict[str, Any]:
    """Return the base's class and sizes, and one hash over the hashes of its linear layers.

    Quantised layers have none, so one base has two hashes, as it is and quantised.
    """
    base = unwrap(model)
    names: list[str] = []
    for name, module in base.named_modules():
        # What lies inside a layer (an adapter's own layers) follows it.
        is_layer = type(layout_of(innermost(module))) in _HASHED
        if is_layer and not (names and name.startswith(f"{names[-1]}.")):
            names.append(name)
    found = fingerprint(base, {name: torch.empty(0, dtype=torch.int64) for name in names})
    modules = {name: hashes for name, hashes in found.pop("modules").items() if hashes}
    text = json.dumps(modules, sort_keys=True)
    found["weights_sha256"] = hashlib.sha256(text.encode()).hexdigest() if modules else None
    return found
