"""`pacatune reproduce`: names, options, folders."""

import pytest

from pacatune.cli import main
from pacatune.experiments.reproduce import EXPERIMENTS
from pacatune.experiments.reproduce.running import result_folder


def error_of(capsys, *words):
    assert main(["reproduce", *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_list_names_every_experiment(capsys):
    assert main(["reproduce", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(EXPERIMENTS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tabel4"], "unknown name 'tabel4'; did you mean 'table4'? Choose from table1"),
        (["fall"], "unknown name 'fall'; did you mean 'all'?"),
        (["xyz"], "unknown name 'xyz'; Choose from table1"),
        (["table1", "--only", "pacca"], "unknown method 'pacca'; did you mean 'paca'?"),
        (["table4", "--only", "full"], "unknown method 'full'; Choose from lora, dora, moslora"),
    ],
)
def test_unknown_names_suggest_the_nearest(words, message, capsys, tmp_path):
    output = tmp_path / "out"
    assert message in error_of(capsys, *words, "--simulate", "--output", str(output))
    assert not output.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give a NAME"),
        (["table1", "--output", "x"], "give one of --scale, --simulate"),
        (["table1", "--simulate", "--scale", "small"], "give only one of --scale, --simulate"),
        (["table1", "--simulate"], "give --output DIR"),
        (["table1", "--scale", "large"], "`scale` ('large') must be one of small, full"),
    ],
)
def test_words_that_are_missing_or_contradict(words, message, capsys):
    assert main(["reproduce", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_is_only_ever_our_own(tmp_path, capsys):
    words = ("table1", "--simulate", "--output")
    (tmp_path / "notes.txt").touch()
    assert "did not write, or that were changed since (notes.txt)" in error_of(
        capsys, *words, str(tmp_path)
    )
    assert "is a file; choose another" in error_of(capsys, *words, str(tmp_path / "notes.txt"))
    ours = tmp_path / "ours"
    result_folder(ours).begin()
    assert "go on with them: --resume" in error_of(capsys, *words, str(ours))


def test_one_run_at_a_time(tmp_path, capsys):
    words = ("table1", "--simulate", "--resume", "--output", str(tmp_path))
    with result_folder(tmp_path).going_on():
        assert "another run is at work" in error_of(capsys, *words)
    assert not (tmp_path / "cells").exists()


def test_print_shows_settings_and_commands(capsys):
    assert main(["reproduce", "table1", "--print"]) == 0
    text = capsys.readouterr().out
    assert "| batch size | 8 | 8 | same |" in text
    assert "pacatune train --config RUN.yaml" in text
    assert main(["reproduce", "table1", "--print", "--scale", "small"]) == 0
    assert (
        "| steps | not said | 16 | a quarter of an hour for the table |" in capsys.readouterr().out
    )


def test_what_cannot_be_simulated_is_an_error(capsys, tmp_path):
    output = tmp_path / "out"
    message = error_of(capsys, "table6", "--simulate", "--output", str(output))
    assert message.startswith(
        "pacatune: error: table6: `pacatune estimate` runs the steps of causal"
    )
    assert not output.exists()
