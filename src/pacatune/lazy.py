"""Names of a package that are imported when they are asked for."""

from collections.abc import Callable, Collection
from importlib import import_module
from types import ModuleType
from typing import Any

__all__ = ["import_later"]


def import_later(
    package: str, names: Collection[str], homes: Collection[str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` for a package that imports some of its names late.

    Args:
        package: Its `__name__`.
        names: Its `__all__`; what is not there when the package is imported is imported late.
        homes: Modules that have these names, relative to the package (`.part`), those that are
            fast to import first: a module is imported where none before it has the name.
    """

    def find(name: str) -> Any:
        if name in names:
            for home in homes:
                value = getattr(import_module(home, package), name, None)
                if not isinstance(value, ModuleType | None):  # a module of the same name is not it
                    return value
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def names_of_package() -> list[str]:
        return sorted({*vars(import_module(package)), *names})

    return find, names_of_package
