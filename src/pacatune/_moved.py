"""Public modules by the names they once had."""

import importlib
import sys
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_MEASURE = "pacatune.measure"
MOVED: dict[str, str | tuple[str, ...]] = {
    "pacatune.baselines": "pacatune.tuner.moslora",
    "pacatune.bench": (f"{_MEASURE}.bench", f"{_MEASURE}.setting", f"{_MEASURE}.models"),
    "pacatune.bench.child": f"{_MEASURE}.step",
    "pacatune.bench.comparison": f"{_MEASURE}.bench",
    "pacatune.bench.config": (f"{_MEASURE}.bench", f"{_MEASURE}.setting"),
    "pacatune.bench.device": (f"{_MEASURE}.device", "pacatune.precision"),
    "pacatune.bench.flops": f"{_MEASURE}.counters",
    "pacatune.bench.measure": f"{_MEASURE}.step",
    "pacatune.bench.methods": (f"{_MEASURE}.methods", f"{_MEASURE}.setting"),
    "pacatune.bench.model": f"{_MEASURE}.models",
    "pacatune.bench.output": f"{_MEASURE}.bench",
    "pacatune.bench.plots": f"{_MEASURE}.pictures",
    "pacatune.bench.record": "pacatune.reports.provenance",
    "pacatune.bench.report": f"{_MEASURE}.report",
    "pacatune.bench.running": f"{_MEASURE}.bench",
    "pacatune.bench.saved": f"{_MEASURE}.counters",
    "pacatune.bench.shape": f"{_MEASURE}.models",
    "pacatune.bench.sweep": f"{_MEASURE}.bench",
    "pacatune.bench.timing": f"{_MEASURE}.timing",
    "pacatune.data.images.config": "pacatune.data.config",
    "pacatune.data.mmlu": "pacatune.data.choices",
    "pacatune.demo": "pacatune.experiments.demo",
    "pacatune.evaluation.local_tasks": "pacatune.evaluation.tasks",
    "pacatune.evaluation.logits": "pacatune.evaluation.scoring",
    "pacatune.evaluation.mt_bench.answers": "pacatune.evaluation.mt_bench.answering",
    "pacatune.evaluation.mt_bench.json_lines": "pacatune.files.json_lines",
    "pacatune.functional": "pacatune.ops",
    "pacatune.memory": (f"{_MEASURE}.counters", f"{_MEASURE}.device"),
    "pacatune.memory.estimate": f"{_MEASURE}.estimate",
    "pacatune.memory.fake_model": f"{_MEASURE}.simulate",
    "pacatune.memory.gpu_kernels": f"{_MEASURE}.gpu_kernels",
    "pacatune.memory.gpus": f"{_MEASURE}.device",
    "pacatune.memory.measure": (f"{_MEASURE}.counters", f"{_MEASURE}.device"),
    "pacatune.memory.methods": (f"{_MEASURE}.methods", f"{_MEASURE}.models"),
    "pacatune.memory.models": f"{_MEASURE}.models",
    "pacatune.memory.plot": f"{_MEASURE}.pictures",
    "pacatune.memory.presets": f"{_MEASURE}.presets",
    "pacatune.memory.setting": f"{_MEASURE}.setting",
    "pacatune.memory.simulate": f"{_MEASURE}.simulate",
    "pacatune.memory.tracker": f"{_MEASURE}.tracker",
    "pacatune.packaged": "pacatune.data.packaged",
    "pacatune.packaged.cifar10": "pacatune.data.packaged.bigbench",
    "pacatune.packaged.language_models": "pacatune.data.packaged.models",
    "pacatune.packaged.multiple_choice": "pacatune.data.packaged.bigbench",
    "pacatune.packaged.question_types": "pacatune.data.packaged.bigbench",
    "pacatune.packaged.vision_models": "pacatune.data.packaged.models",
    "pacatune.reference": "pacatune.ops.reference",
    "pacatune.reproduce": "pacatune.experiments.reproduce",
    "pacatune.selection.strategies": "pacatune.strategies",
    "pacatune.study": "pacatune.experiments.study",
    "pacatune.study.images": "pacatune.experiments.study.tasks",
    "pacatune.study.task": "pacatune.experiments.study.tasks",
    "pacatune.study.text": "pacatune.experiments.study.tasks",
    "pacatune.training.checkpoints": "pacatune.training.trainer",
    "pacatune.training.finite": "pacatune.training.trainer",
    "pacatune.training.interrupt": "pacatune.training.trainer",
    "pacatune.training.precision": "pacatune.precision",
    "pacatune.vision": "pacatune.training.image",
    "pacatune.vision.base": "pacatune.training.image.model",
    "pacatune.vision.load": "pacatune.training.image.model",
    "pacatune.vision.parts": "pacatune.training.image.model",
    "pacatune.vision.presets": "pacatune.training.image.config",
    "pacatune.vision.trainer": "pacatune.training.image.task",
}
"""Old name -> new name; what lies under an old name is sought under the new one, unless it has an
entry of its own. With several new names, each holds a part of what the old one held."""


def find_moved_modules() -> None:
    """Let an import by an old name give the module at its new place, with a DeprecationWarning."""
    if not any(isinstance(finder, _MovedFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _MovedFinder())


class _MovedFinder(MetaPathFinder, Loader):
    """Comes first: others would find a second copy of a module under its package's old name."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        old = fullname
        while old and old not in MOVED:
            old = old.rpartition(".")[0]
        new = MOVED.get(old)
        if isinstance(new, tuple):
            # Nothing lies under a name that was taken apart but what has an entry.
            return ModuleSpec(fullname, self, origin=" ".join(new)) if old == fullname else None
        return ModuleSpec(fullname, self, origin=new + fullname.removeprefix(old)) if new else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        names = str(spec.origin).split()
        warnings.warn(
            f"{spec.name} is now {' and '.join(names)}.", DeprecationWarning, stacklevel=2
        )
        if len(names) > 1:
            return _Parts(spec.name, names)
        module = importlib.import_module(names[0])
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        if isinstance(module, _Parts):
            return
        # The import system wrote the alias into the module, which was loaded long ago.
        alias = module.__spec__
        assert alias is not None
        module.__spec__ = alias.loader_state


class _Parts(ModuleType):
    """Stands for a module whose names live in several ones now, and for a package of such."""

    def __init__(self, name: str, parts: list[str]) -> None:
        super().__init__(name)
        self.__path__: list[str] = []  # a package, under which old names are found
        self._parts = parts

    def __getattr__(self, name: str) -> Any:
        for part in self._parts:
            module = importlib.import_module(part)
            if not name.startswith("_") and hasattr(module, name):
                return getattr(module, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
