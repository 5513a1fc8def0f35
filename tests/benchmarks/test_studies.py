"""The configurations of the studies can be read, and name options that there are."""

from dataclasses import fields
from pathlib import Path

import pytest

from examples.packaged.table import TASKS as PACKAGED_TASKS
from pacatune.study.config import read_study
from pacatune.study.tasks import KINDS
from pacatune.training.config import sections_of

STUDIES = sorted((Path(__file__).parents[2] / "benchmarks" / "studies").glob("*.yaml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_study(path):
    study = read_study(path)
    assert Path(study.task).stem in PACKAGED_TASKS
    sections = sections_of(KINDS[study.command])
    for name, arm in study.arms.items():
        for section, options in arm.options.items():
            assert options.keys() <= {field.name for field in fields(sections[section])}, name
