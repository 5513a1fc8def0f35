"""`TextTask` by the module that it was in; it is in `pacatune.experiments.study.tasks`."""

from pacatune.experiments.study.tasks import TextTask

__all__ = ["TextTask"]
