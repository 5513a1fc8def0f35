"""Public modules by the names they once had."""

import importlib
import sys
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["MOVED", "find_moved_modules"]

MOVED = {
    "pacatune.baselines": "pacatune.tuner.moslora",
    "pacatune.demo": "pacatune.experiments.demo",
    "pacatune.functional": "pacatune.ops",
    "pacatune.packaged": "pacatune.data.packaged",
    "pacatune.reference": "pacatune.ops.reference",
    "pacatune.reproduce": "pacatune.experiments.reproduce",
    "pacatune.selection.strategies": "pacatune.strategies",
    "pacatune.study": "pacatune.experiments.study",
    "pacatune.vision": "pacatune.training.image",
}
"""Old name -> new name; what lies under an old name is sought under the new one."""


def find_moved_modules() -> None:
    """Let an import by an old name give the module at its new place, with a DeprecationWarning."""
    if not any(isinstance(finder, _MovedFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _MovedFinder())


class _MovedFinder(MetaPathFinder, Loader):
    """Comes first: others would find a second copy of a module under its package's old name."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        for old, new in MOVED.items():
            if fullname == old or fullname.startswith(f"{old}."):
                return ModuleSpec(fullname, self, origin=new + fullname.removeprefix(old))
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        name = str(spec.origin)
        warnings.warn(f"{spec.name} is now {name}.", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(name)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # The import system wrote the alias into the module, which was loaded long ago.
        alias = module.__spec__
        assert alias is not None
        module.__spec__ = alias.loader_state
