"""Table 2: instruction tuning on Oasst1."""

from typing import Any, Literal

from pacatune.experiments.paper.settings import Settings, table_10
from pacatune.experiments.paper.tables import TABLE_2, Row
from pacatune.experiments.reproduce.bench_cells import bench_cell, bench_config, machine_of
from pacatune.experiments.reproduce.beside import fill_section
from pacatune.experiments.reproduce.cells import Cell
from pacatune.experiments.reproduce.chats import chat_cell, chat_column, chat_numbers, chat_settings
from pacatune.experiments.reproduce.experiment import Experiment, Mode, Results, SettingsBeside
from pacatune.experiments.reproduce.llm_columns import bench_columns, bench_numbers, full_columns
from pacatune.experiments.reproduce.memory_columns import (
    memory_cells,
    memory_column,
    simulated_memory,
)
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

_METHODS = TABLE_2.trained_methods
_ABOUT = (
    "The paper trains LLaMA3-8B to follow instructions, on conversations of the Oasst1 data set, "
    "and lets GPT4o-mini grade its answers to the 80 questions of MT-Bench from 1 to 10.",
)
_NOTES = (
    "The settings name the longest text (768 tokens), not the usual one; the notes below the "
    "simulated memory say how many tokens would explain the paper's.",
)


def _stated(row: Row) -> Settings:
    return table_10(row.rank or 64)


def _bench() -> Any:
    # The paper's 64 of 4,096 channels, in proportion.
    return bench_config("small", _METHODS, tokens=(768,), seq_len=768, rank=8)


def cells(mode: Mode) -> list[Cell]:
    """Return the work of a mode."""
    if mode == "full":
        return full_cells(TABLE_2, _stated)
    found = memory_cells(TABLE_2, explain=True)
    if mode == "small":
        found.append(bench_cell(_bench(), _METHODS))
        found += [
            chat_cell(row.method, row.rank, key=row.key)
            for row in TABLE_2.rows
            if row.method != "none"
        ]
    return found


def section(mode: Mode, results: Results) -> Section:
    """Return the report on what there is."""
    part = Section(
        name=TABLE_2.name,
        title=TABLE_2.title,
        place=TABLE_2.place,
        about=list(_ABOUT),
        notes=list(_NOTES),
    )
    if mode == "full":
        columns = [*full_columns(TABLE_2), *score_columns()]
        fill_section(part, TABLE_2, columns, full_scores(TABLE_2, results))
        return part
    ours = simulated_memory(TABLE_2, results)
    columns = [memory_column(TABLE_2)]
    bench = results.get("bench")
    if bench is not None:
        ours |= bench_numbers(TABLE_2, bench, {method: method for method in _METHODS})
        columns += bench_columns(TABLE_2, machine_of(bench))
    ours |= chat_numbers({row.key: row.key for row in TABLE_2.rows}, results)
    columns.append(chat_column(TABLE_2))
    fill_section(part, TABLE_2, columns, ours)
    return part


def settings(scale: Literal["small", "full"]) -> list[SettingsBeside]:
    """Return ours beside the paper's."""
    trained = [row for row in TABLE_2.rows if row.method != "none"]
    if scale == "small":
        return [chat_settings(row.title, row.method, row.rank, _stated(row)) for row in trained]
    return [
        SettingsBeside(
            title=f"{row.title}, rank {row.rank}",
            paper=_stated(row),
            ours=of_run(full_run(_stated(row), row, 1e-3), "Oasst1", grid=_stated(row)),
            why={"model": "its name on the hub"},
            commands=full_commands(_stated(row), row),
        )
        for row in trained
    ]


EXPERIMENT = Experiment(
    name=TABLE_2.name,
    title=TABLE_2.title,
    place=TABLE_2.place,
    methods=tuple(TABLE_2.methods()),
    cells=cells,
    section=section,
    settings=settings,
    cannot={},
)
