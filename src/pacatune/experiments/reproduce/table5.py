"""Table 5: strategies that choose PaCA's columns."""

from dataclasses import replace
from typing import Literal

from pacatune.experiments.paper.settings import Settings, table_10
from pacatune.experiments.paper.tables import TABLE_5, Row, Table
from pacatune.experiments.reproduce.beside import fill_section
from pacatune.experiments.reproduce.cells import Cell
from pacatune.experiments.reproduce.chats import chat_cell, chat_column, chat_numbers, chat_settings
from pacatune.experiments.reproduce.experiment import Experiment, Mode, Results, SettingsBeside
from pacatune.experiments.reproduce.mt_bench_runs import (
    full_cells,
    full_commands,
    full_run,
    full_scores,
    score_columns,
)
from pacatune.experiments.reproduce.section import Section
from pacatune.experiments.reproduce.settings_of import of_run

__all__ = ["EXPERIMENT"]

# Beyond the paper's four: columns by activations, which need forward passes only.
_MORE = ("activation", "weight_activation")
_ABOUT = (
    "PaCA trains a few columns of each weight. Which ones? The paper compares columns at random "
    "(with two seeds), those of the largest norm, and those that had the largest gradients in 100 "
    "batches, and finds no noticeable difference.",
    "Two more strategies are tried here that the paper has not: columns whose inputs are largest, "
    "and columns with the largest product of norm and input.",
)


def _table() -> Table:
    """Return the paper's table with lines for the strategies that it has not."""
    rows = [
        Row(model="llama3-8b", method="paca", rank=64, variant=variant, values={})
        for variant in _MORE
    ]
    return replace(TABLE_5, rows=(*TABLE_5.rows, *rows))


def _stated(row: Row) -> Settings:
    return table_10(64)


def _selection(row: Row) -> tuple[str, tuple[int, ...]]:
    """Return the strategy of a line, and the seeds of its runs: other ones for other columns."""
    kind, _, number = row.variant.partition("-")
    return kind, ((2, 3) if number == "2" else (0, 1))


def _trained() -> list[Row]:
    return [row for row in _table().rows if row.method == "paca"]


def cells(mode: Mode) -> list[Cell]:
    """Return the work of a mode."""
    if mode == "full":
        return full_cells(_table(), _stated)
    found = []
    for row in _trained():
        selection, seeds = _selection(row)
        found.append(chat_cell("paca", row.rank, row.key, selection, seeds))
    return found


def section(mode: Mode, results: Results) -> Section:
    """Return the report on what there is."""
    part = Section(name=TABLE_5.name, title=TABLE_5.title, place=TABLE_5.place, about=list(_ABOUT))
    table = _table()
    if mode == "full":
        fill_section(part, table, score_columns(), full_scores(table, results))
        return part
    ours = chat_numbers({row.key: row.key for row in _trained()}, results)
    fill_section(part, table, [chat_column(table)], ours)
    return part


def settings(scale: Literal["small", "full"]) -> list[SettingsBeside]:
    """Return ours beside the paper's."""
    if scale == "small":
        return [
            chat_settings(row.title, "paca", row.rank, _stated(row), _selection(row)[0])
            for row in _trained()
        ]
    return [
        SettingsBeside(
            title=row.title,
            paper=_stated(row),
            ours=of_run(full_run(_stated(row), row, 1e-3), "Oasst1", grid=_stated(row)),
            why={"model": "its name on the hub"},
            commands=full_commands(_stated(row), row),
        )
        for row in _trained()
    ]


EXPERIMENT = Experiment(
    name=TABLE_5.name,
    title=TABLE_5.title,
    place=TABLE_5.place,
    methods=("none", "paca"),
    cells=cells,
    section=section,
    settings=settings,
    cannot={"simulate": "it has no memory column; there is nothing to simulate."},
)
