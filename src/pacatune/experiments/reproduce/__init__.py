"""Every table and figure of the paper, reproduced: what it says beside what we find."""

from pacatune.experiments.reproduce import (
    fig2,
    fig3,
    table1,
    table2,
    table3,
    table4,
    table5,
    table6,
    table7,
)
from pacatune.experiments.reproduce.experiment import Experiment
from pacatune.experiments.reproduce.running import find_experiments, open_folder, run_experiments

__all__ = ["EXPERIMENTS", "Experiment", "find_experiments", "open_folder", "run_experiments"]

EXPERIMENTS: dict[str, Experiment] = {
    module.EXPERIMENT.name: module.EXPERIMENT
    for module in (table1, table2, table3, table4, table5, table6, table7, fig2, fig3)
}
