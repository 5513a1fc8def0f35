import importlib
from types import ModuleType

import pytest

PACKAGES = (
    *("", ".patch", ".selection", ".sync"),
    ".training",
)


@pytest.mark.parametrize("name", PACKAGES)
def test_every_public_name_is_found_and_listed(name):
    package = importlib.import_module(f"pacatune{name}")
    assert set(package.__all__) <= set(dir(package))
    for public in package.__all__:
        assert not isinstance(getattr(package, public), ModuleType | None)
    with pytest.raises(AttributeError, match=rf"module 'pacatune{name}' has no attribute 'nope'"):
        package.nope  # noqa: B018
