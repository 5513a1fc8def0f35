"""Puts a class of ours in place of a module's class, and takes it away again.

A module becomes lean by its class alone: nothing is added to it, its name, its children, its state
and its signature stay what they were, `super()` is the way it was before, and taking it off is one
assignment. A forward of the instance (`module.forward = ...`) would be copied with the module and
then run on the original; a class is not. Copies and pickles are plain modules again.
"""

import functools
import inspect
from typing import Any

from torch import nn

__all__ = ["LeanModule", "is_lean", "make_lean", "make_plain"]


class LeanModule(nn.Module):
    """What every class of ours has in front of the one that it replaces."""

    plain_class: type[nn.Module]
    """The class that the module had."""
    settings: Any = None
    """What the module was found to be."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        return (_new, (_plain(type(self)),), *reduced[2:])


def _new(kind: type[nn.Module]) -> nn.Module:
    return kind.__new__(kind)


def make_lean(module: nn.Module, kind: type[LeanModule], settings: Any = None) -> None:
    """Give a module the forward of `kind`.

    Args:
        module: Of a class of its own; changed in place.
        kind: Class whose methods come before the module's own.
        settings: Hashable; what `kind` knows about the module.
    """
    of_same: Any = _lean_class
    module.__class__ = of_same(type(module), kind, settings)


def make_plain(module: nn.Module) -> bool:
    """Undo `make_lean`; return whether there was anything to undo."""
    found = is_lean(module)
    if found:
        module.__class__ = _plain(type(module))
    return found


def is_lean(module: nn.Module) -> bool:
    """Whether a module has a class of ours, or one that was derived from it since (FSDP2)."""
    return any(_is_lean_class(kind) for kind in type(module).__mro__)


@functools.cache
def _lean_class(plain: type[nn.Module], kind: type[LeanModule], settings: Any) -> type[nn.Module]:
    body: dict[str, Any] = {"plain_class": plain, "settings": settings}
    for name in ("__module__", "__qualname__", "__doc__"):
        body[name] = getattr(plain, name)
    if "forward" in vars(kind):
        # Trainers read the names of a model's arguments.
        forward = functools.wraps(plain.forward)(_forward_of(kind))
        forward.__signature__ = inspect.signature(plain.forward)  # type: ignore[attr-defined]
        body["forward"] = forward
    return type(plain.__name__, (kind, plain), body)


def _forward_of(kind: type[LeanModule]) -> Any:
    own = vars(kind)["forward"]

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return own(self, *args, **kwargs)

    return forward


def _is_lean_class(kind: Any) -> bool:
    return isinstance(kind, type) and "plain_class" in vars(kind)


def _plain(kind: type) -> type:
    """Return a class without ours among its ancestors."""
    if _is_lean_class(kind):
        return _plain(vars(kind)["plain_class"])
    if not any(_is_lean_class(ancestor) for ancestor in kind.__mro__):
        return kind
    body = {n: v for n, v in vars(kind).items() if n not in ("__dict__", "__weakref__")}
    return type(kind.__name__, tuple(_plain(base) for base in kind.__bases__), body)
