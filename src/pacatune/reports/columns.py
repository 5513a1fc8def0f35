"""A picture of the columns that an adapter trains."""

from pathlib import Path
from typing import Any

from pacatune.installation import require_extra
from pacatune.reports.figures import check_picture_path, new_figure, plain_text, save_figure

# A whole picture fits a screen of 1920 x 1080 pixels, whatever the model.
_WIDTH, _MOST_HEIGHT = 12.0, 6.6
_INCHES_PER_ROW, _INCHES_PER_PANEL = 0.18, 1.1
_MOST_PANELS, _PANELS_PER_LINE = 12, 4
_MOST_LABELS = 16


def plot_columns(report: Any, path: Path) -> None:
    """Draw a row of marks for each adapted module, one for each trained column.

    There is a panel for each kind of module, such as `q_proj`, with a row for each layer; modules
    of more kinds than a screen shows share one panel. The picture is never larger than a screen.
    `report` is what `adapters.inspect.inspect_adapter` returns for a PaCA adapter.
    """
    rows = [(one.name, one.columns) for one in report.modules if one.columns is not None]
    if not rows:
        raise ValueError("there are no columns to draw: only PaCA adapters have them.")
    check_picture_path(path)
    require_extra("a plot", "train", ("matplotlib",))
    panels = _panels(dict(sorted(rows, key=lambda row: _natural(row[0]))))
    num_columns = min(len(panels), _PANELS_PER_LINE)
    num_lines = -(-len(panels) // num_columns)
    most_rows = max(map(len, panels.values()))
    height = num_lines * (_INCHES_PER_PANEL + _INCHES_PER_ROW * most_rows)
    figure = new_figure(_WIDTH, min(height, _MOST_HEIGHT))
    grid = list(figure.subplots(num_lines, num_columns, squeeze=False).flat)
    for axes, (title, columns) in zip(grid, panels.items(), strict=False):
        _draw_columns(axes, columns)
        axes.set_title(plain_text(title), fontsize="small")
    for axes in grid[len(panels) :]:
        axes.remove()
    figure.suptitle(f"{report.selection}: columns of {len(rows)} modules")
    save_figure(figure, path)


def _panels(rows: dict[str, list[int]]) -> dict[str, dict[str, list[int]]]:
    """Return title -> label of a row -> columns: a panel for each name but for its numbers."""
    kinds: dict[str, dict[str, list[int]]] = {}
    for name, columns in rows.items():
        parts = name.split(".")
        kind = ".".join("*" if part.isdigit() else part for part in parts)
        label = ".".join(part for part in parts if part.isdigit())
        kinds.setdefault(kind, {})[label] = columns
    if len(kinds) > _MOST_PANELS:
        return {"": rows}
    last = [kind.rpartition(".")[2] for kind in kinds]
    is_clear = len(set(last)) == len(last)
    return dict(zip(last if is_clear else kinds, kinds.values(), strict=True))


def _draw_columns(axes: Any, columns: dict[str, list[int]]) -> None:
    axes.eventplot(list(columns.values()), linelengths=0.8, linewidths=1)
    step = -(-len(columns) // _MOST_LABELS)
    labels = [plain_text(label) for label in columns]
    axes.set_yticks(range(0, len(labels), step), labels[::step], fontsize=7)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlim(left=-1)
    axes.tick_params(axis="x", labelsize=7)
    axes.set_xlabel("column", fontsize="small")


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key by which layer 10 comes after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
