"""Every table and figure of the paper, and the tables of the documentation made of our results."""

import re
from functools import partial
from textwrap import fill

from experiments.paper import PAPER
from experiments.reproduce import costs, images, texts
from experiments.reproduce.experiment import Experiment, comparison, read_results, sources
from pacatune.reports.rows import table

_JOBS = {
    "table1": texts.table_1_jobs,
    "table2": partial(texts.table_jobs, "table2"),
    "table3": partial(texts.table_jobs, "table3"),
    "table4": costs.table_4_jobs,
    "table5": partial(texts.table_jobs, "table5"),
    "table6": images.TABLE_6.jobs,
    "table7": images.TABLE_7.jobs,
    "fig2": costs.figure_2_jobs,
    "fig3": costs.figure_3_jobs,
}
EXPERIMENTS = {name: Experiment(paper=PAPER[name], jobs=jobs) for name, jobs in _JOBS.items()}


_EXPLAINS = re.compile(r"(.*): ([\d,]+) tokens .*; its settings allow ([\d,]+) at the most\.")


def doc_table(name: str) -> str:
    """Return the comparison of an experiment, the `memory` of three, or the `sources` of all."""
    if name == "sources":
        found = {
            f"{one}-{key}": job for one in EXPERIMENTS for key, job in read_results(one).items()
        }
        return "\n".join(f"- {line}" for line in sources(found))
    if name == "memory":
        return _memory(("table1", "table2", "table3"))
    rows = [row for job in read_results(name).values() for row in job.rows]
    compared = comparison(EXPERIMENTS[name], rows)
    assert compared is not None, f"no results of {name} are committed"
    return "\n".join(compared.markdown())


def _memory(names: tuple[str, ...]) -> str:
    """Return the memory of the paper's tables beside ours, and what would explain the paper's."""
    jobs = [
        job for one in names for key, job in read_results(one).items() if key.startswith("memory-")
    ]
    rows = [row for job in jobs for row in job.rows]
    simulated = {(row.model, row.method) for row in rows}
    papers = [
        row
        for one in names
        for row in EXPERIMENTS[one].paper.rows
        if row.what == "memory" and (row.model, row.method) in simulated
    ]
    shown = table([*papers, *rows], ("method",), ("model", "what", "origin"))
    found = [_EXPLAINS.fullmatch(row.note) for row in rows if row.note]
    tokens = "; ".join(f"{m[1]} {m[2]} ({m[3]})" for m in found if m)
    title = "Tokens per micro-batch that would take the paper's memory (its settings allow)"
    return "\n".join([*shown.markdown(), "", fill(f"{title}: {tokens}.", 118)])
