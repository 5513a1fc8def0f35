"""Table 1: fine-tuning on MMLU."""

from pacatune.paper.table1 import TABLE
from pacatune.reproduce.beside import fill_section
from pacatune.reproduce.cells import Cell
from pacatune.reproduce.experiment import Experiment, Mode, Results
from pacatune.reproduce.memory_columns import memory_cells, memory_column, simulated_memory
from pacatune.reproduce.section import Section

__all__ = ["EXPERIMENT"]

_ABOUT = (
    "The paper fine-tunes three language models on the training questions of MMLU, a test of 57 "
    "subjects with four answers to each question, and asks the test questions with five examples "
    "before each. It compares PaCA, which trains a few columns of every weight, with LoRA, DoRA "
    "and MosLoRA, which train small matrices beside every weight.",
)


def cells(mode: Mode) -> list[Cell]:
    """Return the work of a mode."""
    return memory_cells(TABLE)


def section(mode: Mode, results: Results) -> Section:
    """Return the report on what there is."""
    part = Section(name=TABLE.name, title=TABLE.title, place=TABLE.place, about=list(_ABOUT))
    fill_section(part, TABLE, [memory_column(TABLE)], simulated_memory(TABLE, results))
    return part


EXPERIMENT = Experiment(
    name=TABLE.name,
    title=TABLE.title,
    place=TABLE.place,
    methods=tuple(m for m in TABLE.methods() if m != "none"),
    cells=cells,
    section=section,
    settings=lambda scale: [],
    cannot={},
)
