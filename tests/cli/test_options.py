"""Options that come from the fields of a dataclass."""

from dataclasses import KW_ONLY, dataclass
from typing import Literal

import pytest

from pacatune.cli.options import from_words
from tools import cli_reference


@dataclass
class Sizes:
    """Choose sizes.

    Of rows, mostly.
    """

    path: str
    """A word without a name."""
    _: KW_ONLY
    with_: str
    """A name that Python keeps for itself."""
    num_rows: int = 3
    """Rows of 100 %
    of the data."""
    share: float | None = None
    kind: Literal["fine", "coarse"] = "fine"
    """The grain."""
    names: tuple[str, ...] = ()
    lengths: tuple[int, ...] = (1, 2)
    files: list[str] | None = None
    is_quick: bool = False


def parse(line, text="w"):
    return from_words("sizes", Sizes, ["p", f"--with={text}", *line.split()])


def test_words_become_values_of_the_fields_types():
    assert parse("") == Sizes("p", with_="w")
    words = "--num_rows -7 --share -1e-3 --kind coarse --names a,b --is_quick --lengths 4,5"
    values = {"num_rows": -7, "share": -1e-3, "kind": "coarse", "names": ("a", "b")}
    values |= {"is_quick": True, "lengths": (4, 5), "files": ["x", "y"]}
    assert parse(f"{words} --files x y") == Sizes("p", with_="w", **values)
    for text in ("null", "1e3", "no", "[a", "{x: 1}", "- a: b", ""):
        assert parse("", text).with_ == text


def test_what_is_no_list_of_numbers_is_refused():
    with pytest.raises(ValueError, match=r"`lengths` \('4,x'\) must be whole numbers with com"):
        parse("--lengths 4,x")


@pytest.mark.parametrize("command", ["estimate", "patch-stack", "train"])
def test_every_option_has_a_help(command):
    parser = cli_reference.find_parser(command)
    assert [action.dest for action in parser._actions if not action.help] == []
