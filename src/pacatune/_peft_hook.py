"""Registers PaCA as soon as PEFT is there, without importing PEFT: that takes seconds."""

import importlib
import sys
import threading
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def register_with_peft() -> None:
    """Import the method now if PEFT is imported, else right after its first import."""
    if not any(isinstance(finder, _PeftFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PeftFinder())
    # Another thread may be importing PEFT, past the point where the finder would be asked: wait.
    importlib._bootstrap._lock_unlock_module("peft")  # type: ignore[attr-defined]
    if sys.modules.get("peft") is not None:
        _register()


def _register() -> None:
    importlib.import_module("pacatune.tuner")
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _PeftFinder)]


class _PeftFinder(MetaPathFinder):
    """Answers for `peft` alone, with a loader that registers ours after loading it.

    It stays until PEFT has been imported: a look-up (`importlib.util.find_spec`, by which libraries
    see what is installed) and an import that fails are no import.
    """

    def __init__(self) -> None:
        self._asking = threading.local()  # an import and a look-up can meet in two threads

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != "peft" or getattr(self._asking, "is_now", False):
            return None
        self._asking.is_now = True  # another finder may ask them all again, this one included
        try:
            spec = self._find_elsewhere(fullname, path, target)
        finally:
            self._asking.is_now = False
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec

    def _find_elsewhere(self, *wanted: Any) -> ModuleSpec | None:
        for finder in tuple(sys.meta_path):
            spec = finder.find_spec(*wanted) if finder is not self else None
            if spec is not None:
                return spec
        return None


class _RegisteringLoader(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _register()
