"""`pacatune inspect`: show what an adapter holds, or what a patch changes."""

import json
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from typing import Any

from pacatune.files.folder import format_bytes
from pacatune.reports.rows import Table

_MOST_ROWS = 12
_MOST_NAMES = 8


@dataclass(frozen=True)
class Inspect:
    """Show what an adapter or a patch holds; its base model is not needed."""

    adapter: str
    """Folder or hub id of the adapter, or a patch file."""
    _: KW_ONLY
    columns: bool = False
    """List the columns of each module."""
    all: bool = False
    """List every module."""
    json: bool = False
    """Print everything as JSON."""

    def run(self) -> int:
        """Do it."""
        from pacatune.patch.file import is_patch

        page, values = (_show_patch if is_patch(self.adapter) else _show_adapter)(self)
        print(json.dumps(values, indent=2, default=str) if self.json else page)  # the folder
        return 0


command = Inspect


def _show_adapter(options: Inspect) -> tuple[str, dict[str, Any]]:
    """Return a page about an adapter, and the same and more for JSON."""
    from pacatune.adapters.inspect import inspect_adapter

    report = inspect_adapter(options.adapter)
    return _report(report, options), asdict(report)


def _show_patch(options: Inspect) -> tuple[str, dict[str, Any]]:
    from pacatune.patch.file import load

    patch = load(options.adapter)
    kept = patch.adapter_bytes
    tensors: dict[str, dict[str, Any]] = {
        name: {
            "dim": columns.dim,
            "shape": columns.shape,
            "dtype": str(columns.form).removeprefix("torch."),
            "columns": columns.indices.tolist(),
        }
        for name, columns in patch.after.items()
    }
    facts = {
        "patch of": patch.base,
        "columns": f"{patch.num_columns} of {len(patch.after)} tensors",
        "before, after": f"{format_bytes(patch.num_bytes)} each",
        "adapter": format_bytes(kept) if kept else "none",
        "file": format_bytes(Path(options.adapter).stat().st_size),
    }
    rows = [
        {
            "tensor": name,
            "changed": patch.after[name].rank,
            "shape": " x ".join(map(str, tensor["shape"])),
            "dtype": tensor["dtype"],
            "columns": tensor["columns"],
        }
        for name, tensor in tensors.items()
    ]
    values = {"base": patch.base, "has_adapter": bool(kept), "tensors": tensors}
    return _page(options.adapter, facts, "tensors", rows, options), values


def _report(report: Any, options: Inspect) -> str:
    kinds = report.num_modules_by_kind.items()
    adapted = ", ".join(f"{kind} x {number}" for kind, number in sorted(kinds))
    facts = {
        "method": report.method,
        "base": report.base,
        "quantised": report.base_quantization,
        "task": report.task_type,
        "rank, alpha": f"{report.rank}, {report.alpha:g} (scaling {report.scaling:g})"
        if report.scaling is not None
        else report.rank,
        "channels": report.channels,
        "selection": _selection(report),
        "targets": _some(report.targets),
        "adapted": f"{len(report.modules)} modules: {adapted}" if report.modules else None,
        "also holds": _some(report.extra) if report.modules else None,
        "trained": f"{report.num_trainable_parameters:,} parameters",
        "file": format_bytes(report.file_bytes),
    }
    rows = [
        {
            "module": module.name,
            "rank": module.rank,
            "scaling": f"{module.scaling:g}",
            "out": module.out_features,
            "norm": f"{module.update_norm:.4g}",
            "columns": module.columns,
        }
        for module in report.modules
    ]
    return _page(str(report.folder), facts, "largest updates first", rows, options)


def _selection(report: Any) -> str | None:
    if report.selection is None:
        return None
    options = dict(report.selection_options or {})
    if report.selection == "random":
        options["seed"] = report.random_seed
    shown = (f"{key} {value}" for key, value in options.items() if value not in (None, "none"))
    return ", ".join([report.selection, *shown])


def _page(
    title: str, facts: dict[str, Any], order: str, rows: list[dict[str, Any]], options: Inspect
) -> str:
    """Return facts that there are, and a table whose rows all have the keys of the first."""
    width = max(map(len, facts)) + 2
    page = [title, *(f"  {name:<{width}}{value}" for name, value in facts.items() if value)]
    if not rows:
        return "\n".join(page)
    head = [key for key in rows[0] if key != "columns" or options.columns]
    most = len(rows) if options.all or options.columns else _MOST_ROWS
    cells = [[_cell(row[key]) for key in head] for row in rows[:most]]
    shown = Table(header=head, cells=cells, num_index=len(head)).plain()
    page += ["", order, *(f"  {line}" for line in shown)]
    if len(rows) > most:
        page.append(f"{len(rows) - most} more {head[0]}s; --all lists them")
    return "\n".join(page)


def _cell(value: Any) -> str:
    if not isinstance(value, list):
        return "-" if value is None else str(value)
    return " ".join(map(_cell, value))


def _some(names: list[str]) -> str:
    rest = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {rest} more" if rest > 0 else "")
