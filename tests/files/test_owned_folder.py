"""Folders of results: what is not ours stays, and one process works in them at a time."""

import json
import os
import subprocess
import sys

import pytest

from pacatune.files.owned_folder import OwnedFolder, alone_in

# Holds a folder until its input ends.
SCRIPT = """
import sys
from pathlib import Path
from pacatune.files.owned_folder import alone_in

with alone_in(Path(sys.argv[1]), ".pacatune/lock"):
    print("held", flush=True)
    sys.stdin.read()
"""


def folder_at(path, kind="a probe"):
    return OwnedFolder(path=path, kind=kind)


@pytest.fixture
def ours(tmp_path):
    """A folder that holds report.md, inner/a.json and big.bin, all of them ours."""
    folder = folder_at(tmp_path / "out")
    folder.start_anew()
    folder.write("report.md", "first")
    folder.write_json("inner/a.json", {"a": 1})
    big = tmp_path / "big.bin"
    big.write_bytes(bytes(3 * 2**20))
    folder.publish(big, "big.bin")
    return folder


def contents(path):
    """What lies in a folder, beside what is ours for the record."""
    found = (p for p in path.rglob("*") if p.is_file() and ".pacatune" not in p.parts)
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in found}


def test_what_is_ours_is_replaced_and_deleted(ours):
    assert ours.foreign() == []
    assert ours.owned() == ["big.bin", "inner/a.json", "report.md"]
    ours.write("report.md", "second")
    assert contents(ours.path)["report.md"] == b"second"
    ours.start_anew()
    assert contents(ours.path) == {}
    assert [path.name for path in ours.path.iterdir()] == [".pacatune"]


def test_foreign_files_stop_a_command_and_stay(ours):
    (ours.path / "notes.txt").write_text("mine")
    (ours.path / "inner" / "b.json").write_text("mine")
    before = contents(ours.path)
    with pytest.raises(
        FileExistsError,
        match=r"holds files that a probe did not write, or that were changed since "
        r"\(inner/b.json, notes.txt\); they stay as they are: move them, or choose another folder: "
        r"`--output DIR`",
    ):
        ours.start_anew()
    ours.clear()
    kept = ("notes.txt", "inner/b.json")
    assert contents(ours.path) == {name: before[name] for name in kept}


def test_what_the_user_changed_is_the_users(ours):
    (ours.path / "report.md").write_text("first, and what I think of it")
    big = ours.path / "big.bin"
    with big.open("r+b") as file:
        file.seek(2**20 + 5)
        file.write(b"x")
    assert ours.foreign() == ["big.bin", "report.md"]
    for name in ("report.md", "big.bin"):
        with pytest.raises(FileExistsError, match=rf"{name} is not of a probe, and stays as it is"):
            ours.write(name, "other")
        ours.clear(name)
        assert (ours.path / name).exists()


def test_going_on_minds_only_what_it_replaces(ours):
    (ours.path / "notes.txt").touch()
    with ours.going_on("*.md"):
        ours.write("report.md", "second")
    with pytest.raises(FileExistsError, match=r"\(notes.txt\)"), ours.going_on("*.txt"):
        pass
    (ours.path / "report.md").write_text("mine")
    with pytest.raises(FileExistsError, match=r"\(report.md\)"), ours.going_on("*.md"):
        pass


def test_a_folder_without_our_list_is_foreign_as_a_whole(tmp_path):
    (tmp_path / "mine").touch()
    for begin in (folder_at(tmp_path).start_anew, folder_at(tmp_path).going_on("other").__enter__):
        with pytest.raises(FileExistsError, match=r"did not write.*\(mine\)"):
            begin()
    with pytest.raises(FileExistsError, match="mine is a file; choose another"):
        folder_at(tmp_path / "mine").start_anew()
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_another_kind(ours):
    with pytest.raises(FileExistsError, match="holds a probe, not a demo; choose another"):
        folder_at(ours.path, "a demo").start_anew()
    assert not folder_at(ours.path, "a demo").is_ours
    assert ours.is_ours


def test_killed_before_the_list_was_written(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / ".pacatune").mkdir(parents=True)
        if name == "b":
            (tmp_path / name / ".pacatune" / "files.jsonl").touch()
        folder_at(tmp_path / name).start_anew()
        assert folder_at(tmp_path / name).is_ours


@pytest.mark.parametrize("lines", ["{}", "[]", "null\n", "\xff{"])
def test_a_list_that_is_not_ours(tmp_path, lines):
    (tmp_path / ".pacatune").mkdir()
    (tmp_path / ".pacatune" / "files.jsonl").write_text(lines)
    (tmp_path / "mine").touch()
    assert not folder_at(tmp_path).is_ours
    with pytest.raises(FileExistsError, match=r"\(mine\)"):
        folder_at(tmp_path).start_anew()


def test_a_hostile_list_reaches_nothing_outside(ours, tmp_path):
    (tmp_path / "mine").write_text("mine")
    with (ours.path / ".pacatune" / "files.jsonl").open("a") as file:
        for name in ("../mine", str(tmp_path / "mine"), "*"):
            file.write("\n" + json.dumps({"pattern": name}))
    ours.clear()
    assert (tmp_path / "mine").read_text() == "mine"


def test_links_are_never_followed(ours, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "a.json").write_text('{\n "a": 1\n}\n')
    (outside / "report.md").write_text("first")  # what ours holds
    (ours.path / "inner" / "a.json").unlink()
    (ours.path / "inner").rmdir()
    (ours.path / "inner").symlink_to(outside)
    (ours.path / "report.md").unlink()
    (ours.path / "report.md").symlink_to(outside / "report.md")
    assert ours.foreign() == ["inner", "report.md"]
    with pytest.raises(FileExistsError, match="inner is not of a probe"):
        ours.write("inner/b.json", "x")
    ours.clear()
    assert contents(outside) == {"a.json": b'{\n "a": 1\n}\n', "report.md": b"first"}
    assert (ours.path / "report.md").is_symlink()


def test_what_others_write_for_us(ours):
    ours.claim("runs/*/events.*")
    ours.claim("runs/*/events.*")
    (ours.path / "runs" / "a").mkdir(parents=True)
    for name in ("events.1", "notes"):
        (ours.path / "runs" / "a" / name).touch()
    assert ours.foreign() == ["runs/a/notes"]
    assert "runs/a/events.1" in ours.owned()


def test_staged_files_are_published_together_or_not_at_all(ours):
    def fail():
        with ours.staged() as staging:
            (staging / "new.txt").touch()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert "new.txt" not in contents(ours.path)
    with ours.staged() as staging:
        (staging / "folder").mkdir()
        (staging / "folder" / "new.txt").write_text("new")
    assert contents(ours.path)["folder/new.txt"] == b"new"
    assert ours.foreign() == []
    assert not staging.exists()


def test_the_last_of_staged_files(ours, monkeypatch):
    published = []
    monkeypatch.setattr(
        OwnedFolder, "publish", lambda self, path, name, **_: published.append(name)
    )
    with ours.staged(last="b") as staging:
        for name in "abc":
            (staging / name).touch()
    assert published == ["a", "c", "b"]


def test_what_cannot_take_its_place_is_kept(ours):
    """A user's file appeared while a command was at work."""
    (ours.path / "README.md").write_text("mine")

    def save():
        with ours.staged() as staging:
            (staging / "README.md").write_text("ours")

    with pytest.raises(FileExistsError, match=r"is not of a probe.*what is not in its place is in"):
        save()
    assert (ours.path / "README.md").read_text() == "mine"
    assert (ours.path / ".pacatune/incomplete/README.md").read_text() == "ours"


def test_all_is_on_disk_before_it_is_seen(ours, tmp_path, monkeypatch):
    """A folder that takes the place of another one."""
    new, place = tmp_path / "a", ours.path / "inner"
    new.mkdir()
    (new / "file").write_text("new")
    (new / "file").chmod(0o600)
    synced = []

    def sync(file):
        synced.append((os.fstat(file).st_ino, (place / "file").exists()))

    monkeypatch.setattr(os, "fsync", sync)
    parts = [new, new / "file", ours.path / ".pacatune" / "files.jsonl"]
    before = [(path.stat().st_ino, False) for path in parts]
    ours.publish(new, "inner")
    assert synced == [*before, (ours.path.stat().st_ino, True)]
    assert [path.name for path in place.iterdir()] == ["file"]
    assert (place / "file").stat().st_mode & 0o666 == ours.path.stat().st_mode & 0o666


def test_a_line_that_was_cut_off(ours):
    path = ours.path / ".pacatune" / "files.jsonl"
    path.write_bytes(path.read_bytes()[:-10])
    assert ours.foreign() == ["big.bin"]
    (ours.path / "big.bin").unlink()
    ours.write("other.txt", "other")
    assert ours.foreign() == []


def test_another_process_is_kept_out_until_its_end(tmp_path):
    folder = folder_at(tmp_path / "out")
    with folder.going_on():
        folder.write("report.md", "x")
    command = [sys.executable, "-c", SCRIPT, str(folder.path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    message = r"another run is at work in .*out; .*--output DIR"
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=message), folder_at(folder.path).going_on():
            pass
        process.kill()
    with folder_at(folder.path).going_on():
        pass


def test_a_lock_of_that_name_is_not_emptied(tmp_path):
    """Any program may have a file `.lock`; ours bears our name."""
    (tmp_path / ".lock").write_text("mine")
    with alone_in(tmp_path):
        assert (tmp_path / ".lock").read_text() == "mine"
