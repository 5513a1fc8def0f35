"""Every table and figure of the paper, reproduced: what it says beside what we find."""

from pacatune.experiments.reproduce.experiment import Experiment
from pacatune.experiments.reproduce.fig2 import FIGURE_2_EXPERIMENT
from pacatune.experiments.reproduce.images import TABLE_6_EXPERIMENT, TABLE_7_EXPERIMENT
from pacatune.experiments.reproduce.instruction import (
    TABLE_2_EXPERIMENT,
    TABLE_3_EXPERIMENT,
    TABLE_5_EXPERIMENT,
)
from pacatune.experiments.reproduce.limits import FIGURE_3_EXPERIMENT, TABLE_4_EXPERIMENT
from pacatune.experiments.reproduce.mmlu import TABLE_1_EXPERIMENT
from pacatune.experiments.reproduce.running import find_experiments, open_folder, run_experiments

__all__ = ["EXPERIMENTS", "Experiment", "find_experiments", "open_folder", "run_experiments"]

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        TABLE_1_EXPERIMENT,
        TABLE_2_EXPERIMENT,
        TABLE_3_EXPERIMENT,
        TABLE_4_EXPERIMENT,
        TABLE_5_EXPERIMENT,
        TABLE_6_EXPERIMENT,
        TABLE_7_EXPERIMENT,
        FIGURE_2_EXPERIMENT,
        FIGURE_3_EXPERIMENT,
    )
}
