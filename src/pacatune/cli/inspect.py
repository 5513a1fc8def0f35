"""`pacatune inspect`: show what an adapter holds and what it fits, or what a patch changes."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pacatune.cli.options import new_parser

if TYPE_CHECKING:
    from pacatune.adapters.inspect import AdapterReport, Comparison
    from pacatune.patch import Patch

_MOST_ROWS = 12
_MOST_NAMES = 8


def run(argv: list[str]) -> int:
    """Run `pacatune inspect` with the words after it; return the exit status."""
    parser = new_parser(
        "inspect", "Show what an adapter or a patch holds; its base model is not needed."
    )
    add = parser.add_argument
    add("adapter", metavar="ADAPTER", help="folder or hub id of the adapter, or a patch file")
    add("--against", metavar="OTHER", help="compare the updates of two PaCA adapters instead")
    add("--columns", action="store_true", help="list the columns of each module")
    add("--all", action="store_true", help="list every module")
    add("--plot", metavar="FILE", help="draw which columns each module trains, as .png or .svg")
    add("--json", action="store_true", help="print everything as JSON")
    options = parser.parse_args(argv)

    from pacatune.patch.file import is_patch

    if is_patch(options.adapter):
        return _show_patch(options)

    from pacatune.adapters.inspect import compare, inspect_adapter

    result: AdapterReport | Comparison = (
        inspect_adapter(options.adapter)
        if options.against is None
        else compare(options.adapter, options.against)
    )
    if options.plot is not None:
        from pacatune.reports.columns import plot_columns

        plot_columns(result, Path(options.plot))
    if options.json:
        print(json.dumps(dataclasses.asdict(result), indent=2, default=str))  # the folder
        return 0
    most = None if options.all or options.columns else _MOST_ROWS
    if options.against is not None:
        _print_comparison(result, most)
    else:
        _print_report(result, most, with_columns=options.columns)
    return 0


def _show_patch(options: argparse.Namespace) -> int:
    from pacatune.patch.file import load

    for option in ("against", "plot"):
        if getattr(options, option) is not None:
            raise ValueError(
                f"{options.adapter} is a patch, for which there is no --{option}; `pacatune patch "
                "diff` compares patches."
            )
    patch = load(options.adapter)
    if options.json:
        tensors = {
            name: {
                "dim": edit.dim,
                "shape": edit.shape,
                "dtype": str(edit.dtype).removeprefix("torch."),
                "columns": edit.indices.tolist(),  # with row groups a list for each
            }
            for name, edit in patch.edits.items()
        }
        head = {"base": patch.base, "has_adapter": patch.adapter is not None}
        print(json.dumps({**head, "tensors": tensors}, indent=2))
        return 0
    _print_patch(options, patch)
    return 0


def _print_patch(options: argparse.Namespace, patch: "Patch") -> None:
    from pacatune.files.folder import format_bytes

    kept = patch.adapter
    rows = {
        "patch of": patch.base,
        "columns": f"{patch.num_columns} of {len(patch.edits)} tensors",
        "before, after": f"{format_bytes(patch.num_bytes)} each",
        "adapter": "none" if kept is None else format_bytes(kept.num_bytes),
        "file": format_bytes(Path(options.adapter).stat().st_size),
    }
    _print_rows(options.adapter, rows)
    cells = [
        [
            name,
            str(edit.rank),
            " x ".join(map(str, edit.shape)),
            str(edit.dtype).removeprefix("torch."),
            _listed(edit.indices.tolist()),
        ]
        for name, edit in patch.edits.items()
    ]
    head = ["tensor", "columns", "shape", "dtype"]
    if options.columns:
        head[1:] = ["changed", "shape", "dtype", "columns"]
    most = None if options.all or options.columns else _MOST_ROWS
    _print_table("tensors", head, [row[: len(head)] for row in cells], most)


def _print_report(report: Any, most: int | None, *, with_columns: bool) -> None:
    from pacatune.files.folder import format_bytes

    kinds = report.num_modules_by_kind.items()
    adapted = ", ".join(f"{kind} x {number}" for kind, number in sorted(kinds))
    rows = {
        "method": report.method,
        "base": report.base,
        "task": report.task_type,
        "rank, alpha": f"{report.rank}, {report.alpha:g} (scaling {report.scaling:g})"
        if report.scaling is not None
        else report.rank,
        "selection": _selection(report),
        "targets": _some(report.targets),
        "adapted": f"{len(report.modules)} modules: {adapted}" if report.modules else None,
        "also holds": _some(report.extra) if report.modules else None,
        "trained": f"{report.num_trainable_parameters:,} parameters",
        "file": format_bytes(report.file_bytes),
    }
    _print_rows(str(report.folder), rows)
    _print_modules(report, most, with_columns=with_columns)
    for note in report.notes:
        print(f"- {note}")


def _selection(report: Any) -> str | None:
    if report.selection is None:
        return None
    options = dict(report.selection_options or {})
    if report.selection == "random" and report.random_seed is not None:
        options["seed"] = report.random_seed
    if report.normalize not in (None, "none"):
        options["normalised by"] = report.normalize
    return ", ".join([report.selection, *(f"{key} {value}" for key, value in options.items())])


def _print_rows(title: str, rows: dict[str, Any]) -> None:
    print(title)
    width = max(map(len, rows)) + 2
    for name, value in rows.items():
        if value:
            print(f"  {name:<{width}}{value}")


def _print_table(title: str, head: list[str], rows: list[list[str]], most: int | None) -> None:
    """Print names to the left, numbers to the right, and what may be long at the end."""
    lines = [head, *rows[:most]]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(f"\n{title}")
    for name, *cells in lines:
        columns = cells.pop() if head[-1] == "columns" else ""
        numbers = "".join(
            f"  {cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=False)
        )
        print(f"  {name:<{widths[0]}}{numbers}  {columns}".rstrip())
    if most is not None and len(rows) > most:
        print(f"{len(rows) - most} more {head[0]}s; --all lists them")


def _print_modules(report: Any, most: int | None, *, with_columns: bool) -> None:
    if not report.modules:
        return
    head = ["module", "rank", "scaling", "out", "norm", *(["columns"] if with_columns else [])]
    rows = [
        [
            module.name,
            str(module.rank),
            f"{module.scaling:g}",
            str(module.out_features),
            f"{module.update_norm:.4g}",
            _columns(module),
        ][: len(head)]
        for module in report.modules
    ]
    _print_table("largest updates first", head, rows, most)


def _columns(module: Any) -> str:
    """List the columns of a module, those of its row groups apart."""
    if module.columns is None:
        return "-"
    return _listed(module.columns_of_groups or module.columns)


def _listed(columns: list[Any]) -> str:
    if isinstance(columns[0], list):
        return " | ".join(map(_listed, columns))
    return " ".join(map(str, columns))


def _print_comparison(comparison: Any, most: int | None) -> None:
    shared = sum(module.num_shared_columns for module in comparison.modules)
    columns = sum(module.rank_a for module in comparison.modules)
    rows = {
        "modules of both": len(comparison.modules),
        "only in the first": _some(comparison.only_a),
        "only in the other": _some(comparison.only_b),
        "shared columns": f"{shared} of {columns}",
        "cosine": f"{comparison.cosine:.4f}",
        "norms": f"{comparison.norm_a:.4g} and {comparison.norm_b:.4g}",
    }
    _print_rows("two adapters", rows)
    cells = [
        [
            module.name,
            f"{module.num_shared_columns} of {module.rank_a}",
            f"{module.cosine:.4f}",
            f"{module.norm_a:.4g}",
            f"{module.norm_b:.4g}",
        ]
        for module in sorted(comparison.modules, key=lambda module: module.cosine)
    ]
    head = ["module", "shared", "cosine", "norm", "other norm"]
    _print_table("least alike first", head, cells, most)


def _some(names: list[str]) -> str:
    rest = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {rest} more" if rest > 0 else "")
