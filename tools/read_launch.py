"""Print, as JSON, what SkyPilot or Kubeflow reads in a launch file (tests/cli/test_launch.py).

.venv-launch/bin/python tools/read_launch.py skypilot|kubeflow FILE
"""

import json
import sys
from pathlib import Path

import yaml


def read(place, path):
    """Return a launch file as values, which went through the classes of the package."""
    if place == "kubeflow":
        from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        return TrainerV1alpha1TrainJob.from_dict(values).to_dict()
    import sky

    return sky.Task.from_yaml(path).to_yaml_config()


if __name__ == "__main__":
    print(json.dumps(read(*sys.argv[1:])))
