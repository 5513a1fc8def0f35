"""Options that come from the fields of a dataclass."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Literal

import pytest

from pacatune.cli.options import from_words, give_one
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
    folder: Path | None = None


def parse(line, text="w"):
    return from_words("sizes", Sizes, ["p", f"--with={text}", *line.split()])


def test_words_become_values_of_the_fields_types():
    assert parse("") == Sizes("p", with_="w")
    words = "--num_rows -7 --share -1e-3 --kind coarse --names a,b --is_quick --lengths 4,5"
    values = {"num_rows": -7, "share": -1e-3, "kind": "coarse", "names": ("a", "b")}
    values |= {"is_quick": True, "lengths": (4, 5), "folder": Path("a/b"), "files": ["x", "y"]}
    assert parse(f"{words} --folder a/b --files x y") == Sizes("p", with_="w", **values)
    for text in ("null", "1e3", "no", "[a", "{x: 1}", "- a: b", ""):
        assert parse("", text).with_ == text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("p --with w --lengths 4,x", r"`lengths` \('4,x'\) must be whole numbers with com"),
        ("p --with w --kind fin", r"`kind` \('fin'\) must be one of .* mean 'fine'\?"),
        ("p --with w --num_rows x", r"`num_rows` \('x'\) must be a whole number; see"),
        ("p --with w --nmes x", "unknown option --nmes; did you mean '--names'?"),
    ],
)
def test_what_is_wrong_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        from_words("sizes", Sizes, words.split())


def test_give_one():
    give_one(one=None, two="x")
    with pytest.raises(ValueError, match="give only one of --one, --the_other"):
        give_one(one=1, the_other="x")
    with pytest.raises(ValueError, match="give one of --one, --two"):
        give_one(one=None, two="", needed=True)


@pytest.mark.parametrize("command", ["estimate", "patch-stack", "train"])
def test_every_option_has_a_help(command):
    parser = cli_reference.find_parser(command)
    assert [action.dest for action in parser._actions if not action.help] == []
