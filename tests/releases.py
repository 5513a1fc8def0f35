"""Marks for tests of what the core's floors do not have: other releases, other packages."""

from importlib.metadata import version
from importlib.util import find_spec

import pytest
from packaging.version import Version


def has(package, least="0"):
    """Whether a package is installed, and at least of a version."""
    return (
        find_spec(package) is not None
        and Version(version(package)).release >= Version(least).release
    )


def needs(package, least="0"):
    """Mark for tests that need a package, from a version on."""
    what = package if least == "0" else f"{package} >= {least}"
    return pytest.mark.skipif(not has(package, least), reason=f"needs {what}")


# Dynamo knows subclasses of parameters from 2.8 on; before, a graph ends at each adapted layer.
compiles_whole = needs("torch", "2.8")

# Before 2.10, reading a saved parameter in a Python autograd function, under saved-tensor hooks,
# takes away the hooks on its gradient.
parameters_keep_hooks = needs("torch", "2.10")

# Whether transformers finds in this PEFT what its own `load_adapter` uses.
LOADS_ADAPTERS = has("peft", "0.19") or not has("transformers", "5")
