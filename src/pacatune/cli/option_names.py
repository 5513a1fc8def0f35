"""Names of a run's options, read from source: importing TRL, transformers and torch takes seconds.

A misspelt option is found with these before anything is imported. The dataclasses stay the only
place that declares options; this reads them as text, those of TRL and transformers too.
"""

import ast
from functools import cache
from importlib.util import find_spec, resolve_name
from pathlib import Path


def option_annotations(module: str, name: str) -> dict[str, str]:
    """Return the names of a run's options, each with its annotation as the source has it.

    They are dotted, as `data.path`. A field of the class whose annotation is another class of ours
    is a section, whose own name is there too.
    """
    found: dict[str, str] = {}
    for option, (owner, annotation) in _fields(module, name).items():
        found[option] = annotation
        section = _find_class(owner, annotation)
        if section is not None:
            inner = _fields(*section).items()
            found |= {f"{option}.{one}": annotation for one, (_, annotation) in inner}
    return found


def _fields(module: str, name: str) -> dict[str, tuple[str, str]]:
    """Return the fields of a dataclass, inherited ones too: module of the class and annotation."""
    place = _find_class(module, name)
    if place is None:
        raise LookupError(f"no class {name} in {module}")
    owner = _parse(place[0])
    kind = next(n for n in owner.body if isinstance(n, ast.ClassDef) and n.name == place[1])
    fields: dict[str, tuple[str, str]] = {}
    for base in reversed(kind.bases):  # the first one's fields count
        plain = base.value if isinstance(base, ast.Subscript) else base
        if ast.unparse(plain) != "Generic":
            fields |= _fields(place[0], ast.unparse(plain))
    for node in kind.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            annotation = ast.unparse(node.annotation)
            value = "" if node.value is None else ast.unparse(node.value)
            if not annotation.startswith("ClassVar") and "init=False" not in value:
                fields[node.target.id] = place[0], annotation
    return fields


@cache
def _find_class(module: str, name: str) -> tuple[str, str] | None:
    """Return the module that defines a class, and its name there, following imports."""
    tree = _parse(module) if name.isidentifier() else None
    if tree is None:
        return None
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return module, name
    # Lazy packages import for type checkers only, so imports are followed wherever they stand.
    for imported in (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)):
        for alias in imported.names:
            if (alias.asname or alias.name) == name:
                return _find_class(_absolute(module, imported), alias.name)
    return None


def _absolute(module: str, node: ast.ImportFrom) -> str:
    is_package = _source(module).name == "__init__.py"
    package = module if is_package else module.rpartition(".")[0]
    return resolve_name("." * node.level + (node.module or ""), package)


@cache
def _parse(module: str) -> ast.Module:
    return ast.parse(_source(module).read_text(encoding="utf-8"))


@cache
def _source(module: str) -> Path:
    """Return the file of a module without importing it, or a package above it."""
    root, *parts = module.split(".")
    spec = find_spec(root)
    if spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent.joinpath(*parts)
        files = [path.with_name(f"{path.name}.py")] if parts else []
        for file in (*files, path / "__init__.py"):
            if file.is_file():
                return file
    raise LookupError(f"no source of {module}")
