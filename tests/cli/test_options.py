"""Options that come from the fields of a dataclass."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import pytest

from pacatune.cli.options import add_fields, field_helps, field_values, new_parser
from pacatune.cli.train import read_run
from pacatune.evaluation.mt_bench import MtBenchConfig
from pacatune.measure.setting import BenchConfig, Setting
from tools import cli_reference


@dataclass(kw_only=True)
class Sizes:
    path: str
    """Not an option here."""
    num_rows: int = 3
    """Rows of 100 %
    of the data."""
    share: float | None = None
    kind: Literal["fine", "coarse"] = "fine"
    """Of what grain."""
    names: tuple[str, ...] = ()
    lengths: tuple[int, ...] = (1, 2)
    is_quick: bool = False
    folder: Path | None = None


def parse(*words):
    parser = new_parser("sizes", "Choose sizes.")
    add_fields(parser, Sizes, skip=("path",), num_rows={"default": 5})
    return field_values(parser.parse_args(words), Sizes)


@pytest.mark.parametrize("command", ["merge", "export", "generate", "evaluate-mmlu"])
def test_short_names_of_dtypes(command):
    parser = cli_reference.find_parser(command)
    needed = [action for action in parser._actions if action.required]
    words = [w for a in needed for w in (a.option_strings[-1], next(iter(a.choices or "x")))]
    assert parser.parse_args([*words, "--dtype", "fp16"]).dtype == "float16"


def test_short_name_of_the_dtype_of_a_run(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("model: {path: m, dtype: bf16}\ndata: {path: d}\n")
    assert read_run(["--config", str(config)]).model.dtype == "bfloat16"


def test_defaults_are_those_of_the_fields_unless_changed():
    assert parse() == {
        "num_rows": 5,
        "share": None,
        "kind": "fine",
        "names": (),
        "lengths": (1, 2),
        "is_quick": False,
        "folder": None,
    }


def test_words_become_values_of_the_fields_types():
    words = ["--num-rows", "7", "--share", "0.5", "--kind", "odd", "--names", "a, b", "--is-quick"]
    assert parse(*words, "--lengths", "4,5", "--folder", "a/b") == {
        "num_rows": 7,
        "share": 0.5,
        "kind": "odd",  # the dataclass refuses it, in one line
        "names": ("a", "b"),
        "lengths": (4, 5),
        "is_quick": True,
        "folder": Path("a/b"),
    }


def test_a_field_without_default_is_required():
    parser = new_parser("sizes", "Choose sizes.")
    add_fields(parser, Sizes)
    with pytest.raises(ValueError, match="arguments are required: --path; see"):
        parser.parse_args([])


def test_what_is_no_list_of_numbers_is_refused():
    with pytest.raises(ValueError, match=r"`lengths` \('4,x'\) must be whole numbers with commas"):
        parse("--lengths", "4,x")


def test_help_is_the_docstring_of_the_field():
    assert field_helps(Sizes)["num_rows"] == "rows of 100 %% of the data"
    parser = new_parser("sizes", "Choose sizes.")
    add_fields(parser, Sizes, skip=("path",))
    text = " ".join(parser.format_help().split())
    assert "--num-rows N rows of 100 % of the data (default: 3)" in text
    assert "--kind {fine,coarse} of what grain (default: fine)" in text


@pytest.mark.parametrize("kind", [BenchConfig, Setting, MtBenchConfig])
def test_every_field_of_a_command_has_a_help(kind):
    assert {field.name for field in fields(kind)} <= field_helps(kind).keys()
