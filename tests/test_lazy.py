import importlib
import sys
from types import ModuleType

import pytest

PACKAGES = (
    *("", ".evaluation", ".patch", ".selection", ".sync"),
    *(".study", ".training", ".training.image"),
)


@pytest.mark.parametrize("name", PACKAGES)
def test_every_public_name_is_found_and_listed(name):
    package = importlib.import_module(f"pacatune{name}")
    assert set(package.__all__) <= set(dir(package))
    for public in package.__all__:
        assert not isinstance(getattr(package, public), ModuleType | None)
    with pytest.raises(AttributeError, match=rf"module 'pacatune{name}' has no attribute 'nope'"):
        package.nope  # noqa: B018


PACKAGE = """
from pacatune.lazy import import_later
__getattr__, __dir__ = import_later(__name__, ('a', 'b'), ('.first', '.second'))
"""


def test_a_module_is_imported_where_none_before_it_has_the_name(tmp_path, monkeypatch):
    (tmp_path / "lately").mkdir()
    for module, text in {"__init__": PACKAGE, "first": "a = 1", "second": "b = 2"}.items():
        (tmp_path / "lately" / f"{module}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    import lately

    assert lately.a == 1
    assert "lately.second" not in sys.modules
    assert lately.b == 2
    assert {"a", "b"} <= set(dir(lately))
    for module in ("lately", "lately.first", "lately.second"):
        monkeypatch.delitem(sys.modules, module)
