"""Patches in place, and kills at every moment of these."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pacatune import patch
from pacatune.files.checkpoint import Checkpoint
from pacatune.files.journal import JOURNAL_NAME, PARKED_SUFFIX
from pacatune.patch import Patch, edit_of
from pacatune.patch import folder as folder_module
from pacatune.pretrained import find_model
from tests.full_disk import limited_files
from tests.patch.folders import contents


def test_in_place_and_back(base, bf16_patch, tmp_path):
    before, size = contents(base), Checkpoint.open(base).num_bytes
    shutil.copytree(base, tmp_path / "copy")
    patch.apply_to_folder(base, bf16_patch, tmp_path / "out")
    assert patch.apply_in_place(base, bf16_patch).checkpoint_bytes == size
    assert contents(base) == contents(tmp_path / "out")
    with pytest.raises(ValueError, match="base already holds the columns that would be"):
        patch.apply_in_place(base, bf16_patch)
    patch.apply_in_place(base, bf16_patch, revert=True)
    assert contents(base) == before
    with pytest.raises(ValueError, match="base already holds the columns that would be"):
        patch.apply_in_place(base, bf16_patch, revert=True)
    assert contents(base) == before
    assert patch.recover(base) == []


def test_only_pages_with_columns_are_written(tmp_path):
    """16 columns of 64 KiB rows: a page for each row, as mincore of the file would say."""
    weight = torch.zeros(8, 32768, dtype=torch.bfloat16)
    (tmp_path / "m").mkdir()
    save_file({"w": weight, "x": torch.ones(4)}, tmp_path / "m" / "model.safetensors")
    edit = edit_of("w", 1, weight, torch.arange(16), torch.ones(8, 16, dtype=torch.bfloat16))
    result = patch.apply_in_place(tmp_path / "m", Patch(edits={"w": edit}))
    assert result.page_bytes == 8 * 4096
    assert result.column_bytes == 8 * 16 * 2
    rows = edit_of("w", 0, weight, torch.tensor([3]), torch.ones(1, 32768, dtype=torch.bfloat16))
    assert folder_module._page_bytes(Checkpoint.open(tmp_path / "m"), Patch(edits={"w": rows})) in (
        16 * 4096,
        17 * 4096,
    )


def test_a_file_with_a_second_name_is_not_changed(base, bf16_patch, tmp_path):
    (path,) = [
        base / Checkpoint.open(base).entries[name].file for name in [next(iter(bf16_patch.edits))]
    ]
    os.link(path, tmp_path / "second")
    before = contents(base)
    with pytest.raises(ValueError, match=r"has several names.*--output"):
        patch.apply_in_place(base, bf16_patch)
    assert contents(base) == before


def test_a_full_disk_is_known_before(base, bf16_patch, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 2**16))
    before = contents(base)
    with pytest.raises(ValueError, match=r"64.0 KiB free but 1\d\.\d MiB are needed; make room"):
        patch.apply_in_place(base, bf16_patch)
    assert contents(base) == before


def test_a_disk_that_runs_full_at_the_journal_changes_nothing(base, bf16_patch):
    before = contents(base)
    full = pytest.raises(ValueError, match=r"could not write '.*journal' .*nothing was left")
    with limited_files(), full:
        patch.apply_in_place(base, bf16_patch)
    assert contents(base) == before


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError("denied"), OSError),
        (OSError(errno.ENOSPC, "no space left"), ValueError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_an_error_while_writing_is_rolled_back_at_once(
    base, bf16_patch, monkeypatch, error, expected
):
    before, write, calls = contents(base), folder_module._write, []

    def failing(path, checkpoint, edits):
        write(path, checkpoint, edits[: len(edits) // 2] if not calls else edits)
        calls.append(path)
        if len(calls) == 1:
            raise error

    monkeypatch.setattr(folder_module, "_write", failing)
    with pytest.raises(expected, match=r"denied|could not write '.*base' .*no space left|^$"):
        patch.apply_in_place(base, bf16_patch)
    assert contents(base) == before


def test_a_rollback_that_fails_says_what_to_do(base, bf16_patch, monkeypatch):
    before, write = contents(base), folder_module._write

    def failing(path, checkpoint, edits):
        write(path, checkpoint, edits[:1])
        raise OSError("input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(folder_module, "_write", failing)
        with pytest.raises(ValueError, match=r"output error.*Its journal is kept.*recover --model"):
            patch.apply_in_place(base, bf16_patch)
    assert patch.recover(base)
    assert contents(base) == before


def test_what_cannot_be_written_is_left_alone(base, bf16_patch, monkeypatch):
    def refused(path):
        raise PermissionError(f"{path} is read-only")

    monkeypatch.setattr(folder_module, "writable", refused)
    before = contents(base)
    with pytest.raises(PermissionError, match="is read-only"):
        patch.apply_in_place(base, bf16_patch)
    assert contents(base) == before


def test_one_process_at_a_time(base, bf16_patch):
    from pacatune.files.owned_folder import alone_in

    with alone_in(base):
        for action in (lambda: patch.apply_in_place(base, bf16_patch), lambda: patch.recover(base)):
            with pytest.raises(ValueError, match="another run is at work in"):
                action()


ROOT = Path(__file__).parents[2]


# Forks children that kill themselves at the n-th change of the file system, or in the midst of
# writing columns. Each leaves a folder behind; the last one ends by itself.
_DRIVER = """
import os, signal, sys, shutil
from pathlib import Path
import torch
torch.set_num_threads(1)
from pacatune import patch
from pacatune.patch import folder as f

base, patch_path, out, action = sys.argv[1:5]
made = patch.load(patch_path)

def run(folder):
    if action == "recover":
        patch.recover(folder)
    else:
        patch.apply_in_place(folder, made, revert=action == "revert")

def child(folder, number):
    count = 0
    def step():
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
    def stepping(function):
        def wrapped(*args, **kwargs):
            step()
            return function(*args, **kwargs)
        return wrapped
    for owner, name in ((Path, "rename"), (Path, "replace"), (Path, "unlink")):
        setattr(owner, name, stepping(getattr(owner, name)))
    os.fsync = lambda handle: step()  # the machine goes on, so nothing need reach the disk
    put = torch.Tensor.index_copy_
    def half(self, dim, index, source):
        middle = len(index) // 2
        put(self, dim, index[:middle], source.narrow(dim, 0, middle))
        step()
        return put(self, dim, index, source)
    torch.Tensor.index_copy_ = half
    run(folder)
    os._exit(0)

for number in range(1, 500):
    folder = Path(out) / f"{number:03}"
    shutil.copytree(base, folder)
    if (pid := os.fork()) == 0:
        child(folder, number)
    status = os.waitpid(pid, 0)[1]
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0
        break
else:
    raise AssertionError("never ends")
print(number)
"""


def killed_folders(base, patch_path, out, action):
    """Folders of an action that was killed at every moment, and one of the action itself."""
    out.mkdir()
    words = [str(base), str(patch_path), str(out), action]
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(sys.path))
    done = subprocess.run(
        [sys.executable, "-c", _DRIVER, *words], capture_output=True, text=True, env=env, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    *killed, whole = sorted(out.iterdir())
    assert int(done.stdout) == len(killed) + 1
    return killed, whole


def state(folder, before, after):
    """What a loader makes of a folder: "before", "after" or "refused"; never anything else."""
    files = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values()
    if not all((folder / name).exists() for name in files):
        with pytest.raises(OSError, match="safetensors"):
            AutoModelForCausalLM.from_pretrained(folder)
        with pytest.raises(ValueError, match="pacatune patch recover --model"):
            find_model(str(folder))
        return "refused"
    found = {name: (folder / name).read_bytes() for name in set(files)}
    (name,) = (
        name
        for name, whole in (("before", before), ("after", after))
        if all(whole[file] == content for file, content in found.items())
    )
    return name


@pytest.fixture(scope="module", params=["apply", "revert"])
def killed(request, tmp_path_factory, sharded_dir, bf16_patch):
    """Folders left by kills; not to be changed. With the action, and contents before and after."""
    folder, action = tmp_path_factory.mktemp(request.param), request.param
    patch.save(bf16_patch, folder / "p.safetensors")
    patch.apply_to_folder(sharded_dir, bf16_patch, folder / "patched")
    start, end = sharded_dir, folder / "patched"
    if action == "revert":
        start, end = end, start
    killed, whole = killed_folders(start, folder / "p.safetensors", folder / "killed", action)
    before, after = contents(start), contents(end)
    assert contents(whole) == after
    return action, killed, before, after


def test_a_kill_at_any_moment_loses_nothing(killed, bf16_patch, tmp_path):
    action, killed, before, after = killed
    is_revert = action == "revert"
    states = [state(folder, before, after) for folder in killed]
    assert states.count("refused") > 10
    # Before, then an error, then after: and never back.
    assert states == sorted(states, key=["before", "refused", "after"].index)
    for source, found in zip(killed, states, strict=True):
        folder, again = (Path(shutil.copytree(source, tmp_path / name)) for name in ("one", "two"))
        has_journal = (folder / JOURNAL_NAME).exists()
        notes = patch.recover(folder)
        assert bool(notes) == has_journal
        assert contents(folder) == (after if found == "after" and not has_journal else before)
        if has_journal:
            assert "patching in place was interrupted earlier; it is rolled back." in notes[0]
            finished = Path(shutil.copytree(again, tmp_path / "finished"))
            assert patch.recover(finished, finish=True)
            assert contents(finished) == after
            shutil.rmtree(finished)
            # The next command rolls it back by itself, and does what it is asked for.
            result = patch.apply_in_place(again, bf16_patch, revert=is_revert)
            assert "rolled back" in result.notes[0]
            assert contents(again) == after
        shutil.rmtree(folder)
        shutil.rmtree(again)


@pytest.mark.parametrize("killed", ["apply"], indirect=True)
def test_a_recovery_may_be_killed_as_well(killed, bf16_patch, tmp_path):
    _, killed, before, _ = killed
    half = [folder for folder in killed if (folder / JOURNAL_NAME).exists()]
    patch.save(bf16_patch, tmp_path / "p.safetensors")
    start = half[len(half) // 2]
    again, whole = killed_folders(start, tmp_path / "p.safetensors", tmp_path / "k", "recover")
    assert contents(whole) == before
    for folder in again:
        patch.recover(folder)
        assert contents(folder) == before


def test_after_a_kill_asking_for_what_was_there_is_no_error(killed, bf16_patch, tmp_path):
    action, killed, before, _ = killed
    source = next(folder for folder in killed if (folder / JOURNAL_NAME).exists())
    folder = Path(shutil.copytree(source, tmp_path / "folder"))
    (note,) = patch.apply_in_place(folder, bf16_patch, revert=action == "apply").notes
    assert note.endswith("it is rolled back.")
    assert contents(folder) == before


def interrupt(base, made):
    """Leave a folder as a kill does while its columns are written."""
    patch.save(made, base / JOURNAL_NAME)
    files = {Checkpoint.open(base, half_edited=True).entries[name].file for name in made.edits}
    for name in files:
        (base / name).rename(base / f"{name}{PARKED_SUFFIX}")
    return sorted(files)


def refused(base, made, message):
    """See that nobody writes to a folder that is out of order."""
    before = contents(base)
    for action in (patch.recover, lambda folder: patch.apply_in_place(folder, made)):
        with pytest.raises(ValueError, match=message):
            action(base)
        with pytest.raises(ValueError, match=message):
            patch.recover(base, finish=True)
        assert contents(base) == before


def test_what_was_saved_after_an_interruption_is_kept(base, bf16_patch):
    before = contents(base)
    name = interrupt(base, bf16_patch)[-1]
    (base / name).write_bytes(b"theirs")
    refused(base, bf16_patch, rf"has both {name} and {name}.patching: .* Move it away, or remove")
    (base / name).unlink()
    assert patch.recover(base)
    assert contents(base) == before


def test_a_model_saved_in_place_of_an_interrupted_one_is_kept(base, bf16_patch):
    before = contents(base)
    for name in interrupt(base, bf16_patch):
        tensors = load_file(path := base / f"{name}{PARKED_SUFFIX}")
        for key in bf16_patch.edits.keys() & tensors.keys():
            tensors[key][0, 0] += 1
        save_file(tensors, base / name, metadata={"format": "pt"})
        path.unlink()
    refused(base, bf16_patch, r"was replaced after .* interrupted: .* remove .*journal to keep it")
    for name, whole in before.items():  # the base again
        (base / name).write_bytes(whole)
    assert patch.recover(base)
    assert contents(base) == before


def test_a_damaged_journal_is_said_to_be_so(base, bf16_patch):
    before = contents(base)
    (base / JOURNAL_NAME).write_bytes(b"x")
    with pytest.raises(ValueError, match="truncated or no safetensors file"):
        patch.recover(base)
    (base / JOURNAL_NAME).unlink()
    assert contents(base) == before


def test_a_strangers_journal_leads_nowhere_else(base, bf16_patch, tmp_path):
    name = next(iter(bf16_patch.edits))
    file = Checkpoint.open(base).entries[name].file
    shutil.move(base / file, tmp_path / "theirs.safetensors")
    (base / file).symlink_to(tmp_path / "theirs.safetensors")
    theirs = (tmp_path / "theirs.safetensors").read_bytes()
    patch.save(bf16_patch, base / JOURNAL_NAME)
    with pytest.raises(ValueError, match="is a link"):
        patch.recover(base)
    assert (tmp_path / "theirs.safetensors").read_bytes() == theirs
