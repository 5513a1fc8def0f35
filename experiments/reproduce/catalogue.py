"""Every table and figure of the paper, and the tables of the documentation made of our results."""

from experiments.reproduce import costs, images, texts
from experiments.reproduce.experiment import Experiment, comparison, read_results, sources
from pacatune.reports.rows import table

EXPERIMENTS: dict[str, Experiment] = {
    one.paper.name: one
    for one in (
        texts.TABLE_1_EXPERIMENT,
        texts.TABLE_2_EXPERIMENT,
        texts.TABLE_3_EXPERIMENT,
        costs.TABLE_4_EXPERIMENT,
        texts.TABLE_5_EXPERIMENT,
        images.TABLE_6_EXPERIMENT,
        images.TABLE_7_EXPERIMENT,
        costs.FIGURE_2_EXPERIMENT,
        costs.FIGURE_3_EXPERIMENT,
    )
}


def doc_table(name: str) -> str:
    """Return the comparison of an experiment, or the `memory` of all of them."""
    names = ("table1", "table2", "table3") if name == "memory" else (name,)
    found = {
        f"{one}-{key}": job
        for one in names
        for key, job in read_results(one).items()
        if name != "memory" or key.startswith("memory-")
    }
    rows = [row for job in found.values() for row in job.rows]
    if name == "memory":
        simulated = {(row.model, row.method) for row in rows}
        papers = [
            row
            for one in names
            for row in EXPERIMENTS[one].paper.rows
            if row.what == "memory" and (row.model, row.method) in simulated
        ]
        notes = [f"- {row.note}" for row in rows if row.note]
        shown = table([*papers, *rows], ("model", "method"), ("what", "origin"))
        return "\n".join([*shown.markdown(), "", *notes, "", *sources(found)])
    compared = comparison(EXPERIMENTS[name], rows)
    assert compared is not None, f"no results of {name} are committed"
    return "\n".join([*compared.markdown(), "", *sources(found)])
