"""R5: patches in place, all or nothing; also with kills at every moment of these."""

import errno
import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from pacatune import patch
from pacatune.files.checkpoint import Checkpoint
from pacatune.files.journal import JOURNAL_NAME, PARKED_SUFFIX, journal_of
from pacatune.files.owned_folder import alone_in
from pacatune.patch import folder as folder_module
from pacatune.pretrained import find_model
from tests.adapters.fixtures import edit_tensors
from tests.forks import run_python
from tests.full_disk import limited_files
from tests.patch.conftest import change_of, contents


@pytest.fixture
def unchanged(base):
    """The base, which the test leaves as it was."""
    before = contents(base)
    yield base
    assert contents(base) == before


def test_in_place_and_back(unchanged, bf16_patch, tmp_path):
    size = Checkpoint.open(unchanged).num_bytes
    patch.apply_to_folder(unchanged, bf16_patch, tmp_path / "out")
    assert patch.apply_in_place(unchanged, bf16_patch).checkpoint_bytes == size
    assert contents(unchanged) == contents(tmp_path / "out")
    with pytest.raises(ValueError, match="base already holds the columns that would be"):
        patch.apply_in_place(unchanged, bf16_patch)
    patch.apply_in_place(unchanged, bf16_patch, revert=True)
    with pytest.raises(ValueError, match="base already holds the columns that would be"):
        patch.apply_in_place(unchanged, bf16_patch, revert=True)
    assert patch.recover(unchanged) == []


def test_only_pages_with_columns_are_written(tmp_path):
    """16 columns of 64 KiB rows: a page for each row, as mincore of the file would say."""
    weight = torch.zeros(8, 32768, dtype=torch.bfloat16)
    save_file({"w": weight, "x": torch.ones(4)}, tmp_path / "model.safetensors")
    columns = change_of("w", 1, weight, [*range(16)], torch.ones(8, 16, dtype=torch.bfloat16))
    assert patch.apply_in_place(tmp_path, columns).page_bytes == 8 * 4096
    weight[:, :16] = 1
    row = change_of("w", 0, weight, [3], torch.full((1, 32768), 2, dtype=torch.bfloat16))
    assert patch.apply_in_place(tmp_path, row).page_bytes in (16 * 4096, 17 * 4096)


def test_a_file_with_a_second_name_is_not_changed(unchanged, bf16_patch, tmp_path):
    name = next(iter(bf16_patch.after))
    os.link(unchanged / Checkpoint.open(unchanged).entries[name].file, tmp_path / "second")
    with pytest.raises(ValueError, match=r"has several names.*--output"):
        patch.apply_in_place(unchanged, bf16_patch)


def test_one_process_at_a_time(unchanged, bf16_patch):
    with alone_in(unchanged), pytest.raises(ValueError, match="another run is at work in"):
        patch.recover(unchanged)
    with alone_in(unchanged), pytest.raises(ValueError, match="another run is at work in"):
        patch.apply_in_place(unchanged, bf16_patch)


def test_a_full_disk_is_known_before_or_at_the_journal(unchanged, bf16_patch, monkeypatch):
    full = pytest.raises(ValueError, match=r"could not write '.*journal' .*nothing was left")
    with limited_files(), full:
        patch.apply_in_place(unchanged, bf16_patch)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**16))
    with pytest.raises(ValueError, match=r"64.0 KiB free but 1\d\.\d MiB are needed; make room"):
        patch.apply_in_place(unchanged, bf16_patch)


# Killed by the system in the midst of writing a file of more than 1,000 bytes.
_TOO_LARGE = """
import resource, signal, sys
from pacatune import patch
made = patch.load(sys.argv[2])
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
patch.apply_in_place(sys.argv[1], made)
"""


def test_a_kill_while_the_journal_is_written_leaves_nothing(single, bf16_patch, tmp_path):
    before = contents(single)
    patch.save(bf16_patch, tmp_path / "p.safetensors")
    killed = run_python(_TOO_LARGE, single, tmp_path / "p.safetensors")
    assert killed.returncode == -signal.SIGXFSZ
    assert len(contents(single)) == len(before) + 1  # what safetensors calls .tmp and letters
    assert patch.recover(single) == []
    assert contents(single) == before
    assert {path.name for path in single.iterdir()} == {*before, ".pacatune-lock"}


@pytest.mark.parametrize("exists", [False, True])
def test_a_link_is_no_journal(unchanged, bf16_patch, tmp_path, exists):
    patch.save(bf16_patch, tmp_path / "elsewhere") if exists else None
    journal = unchanged / JOURNAL_NAME
    journal.symlink_to(tmp_path / "elsewhere")
    for action in (patch.recover, lambda folder: patch.apply_in_place(folder, bf16_patch)):
        with pytest.raises(ValueError, match=r"journal is a link, which pacatune never .* remove"):
            action(unchanged)
    journal.unlink()


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (OSError("denied"), OSError, "denied"),
        (OSError(errno.ENOSPC, "no space left"), ValueError, r"not write '.*base' .*no space left"),
        (KeyboardInterrupt(), KeyboardInterrupt, "^$"),
    ],
)
def test_an_error_while_writing_is_rolled_back_at_once(
    unchanged, bf16_patch, monkeypatch, error, expected, message
):
    write, calls = folder_module._write, []

    def failing(path, checkpoint, edits):
        write(path, checkpoint, edits[: len(edits) // 2] if not calls else edits)
        calls.append(path)
        if len(calls) == 1:
            raise error

    monkeypatch.setattr(folder_module, "_write", failing)
    with pytest.raises(expected, match=message):
        patch.apply_in_place(unchanged, bf16_patch)


def test_a_rollback_that_fails_says_what_to_do(unchanged, bf16_patch, monkeypatch):
    write = folder_module._write

    def failing(path, checkpoint, edits):
        write(path, checkpoint, edits[:1])
        raise OSError("input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(folder_module, "_write", failing)
        with pytest.raises(ValueError, match=r"output error.*Its journal is kept.*recover --model"):
            patch.apply_in_place(unchanged, bf16_patch)
    assert patch.recover(unchanged)


def test_what_cannot_be_written_is_left_alone(unchanged, bf16_patch, monkeypatch):
    monkeypatch.setattr(folder_module, "writable", Mock(side_effect=PermissionError("read-only")))
    with pytest.raises(PermissionError, match="read-only"):
        patch.apply_in_place(unchanged, bf16_patch)


# Forks children that kill themselves at the n-th change of the file system, or in the midst of
# writing columns. Each leaves a folder behind; the last one ends by itself.
_DRIVER = """
import os, signal, sys, shutil
from pathlib import Path
import torch
torch.set_num_threads(1)
from pacatune import patch

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
    done = run_python(_DRIVER, base, patch_path, out, action)
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


def test_an_unfinished_journal_of_a_file_beside_it_stays(tmp_path):
    """In a pattern `m[1]` is `m1`."""
    names = ("m1", "m[1]")
    mine, other = (
        tmp_path / f".{journal_of(tmp_path / f'{name}.gguf').name}.0a1b2c3d" for name in names
    )
    for path in (mine, other):
        path.write_text("x")
    assert patch.recover(tmp_path / "m[1].gguf") == []
    assert (mine.exists(), other.exists()) == (True, False)


@pytest.fixture
def interrupted(unchanged, bf16_patch):
    """Leave a folder as a kill does while its columns are written."""
    patch.save(bf16_patch, unchanged / JOURNAL_NAME)
    entries = Checkpoint.open(unchanged, half_edited=True).entries
    for name in {entries[one].file for one in bf16_patch.after}:
        (unchanged / name).rename(unchanged / f"{name}{PARKED_SUFFIX}")
    return unchanged


def parked_in(folder):
    return sorted(folder.glob(f"*{PARKED_SUFFIX}"))


def refused(base, made, message):
    """See that nobody writes to a folder that is out of order."""
    before = contents(base)
    for action in (
        patch.recover,
        lambda folder: patch.recover(folder, finish=True),
        lambda folder: patch.apply_in_place(folder, made),
    ):
        with pytest.raises(ValueError, match=message):
            action(base)
        assert contents(base) == before


def test_what_was_saved_after_an_interruption_is_kept(interrupted, bf16_patch):
    theirs = parked_in(interrupted)[-1].with_suffix("")
    theirs.write_bytes(b"theirs")
    name = theirs.name
    message = rf"has both {name} and {name}.patching: .* Move it away, or remove"
    refused(interrupted, bf16_patch, message)
    theirs.unlink()
    assert patch.recover(interrupted)


def test_a_model_saved_in_place_of_an_interrupted_one_is_kept(interrupted, bf16_patch):
    def train(tensors):
        for name in bf16_patch.after.keys() & tensors.keys():
            tensors[name][0, 0] += 1

    before = {path.with_suffix(""): path.read_bytes() for path in parked_in(interrupted)}
    for path in parked_in(interrupted):
        edit_tensors(path.rename(path.with_suffix("")), train)
    message = r"was replaced after .* interrupted: .* remove .*journal to keep it"
    refused(interrupted, bf16_patch, message)
    for path, whole in before.items():  # the base again
        path.write_bytes(whole)
    assert patch.recover(interrupted)


def test_a_strangers_journal_leads_nowhere_else(base, bf16_patch, tmp_path):
    (base / JOURNAL_NAME).write_bytes(b"x")
    with pytest.raises(ValueError, match="truncated or no safetensors file"):
        patch.recover(base)
    (base / JOURNAL_NAME).unlink()
    name = Checkpoint.open(base).entries[next(iter(bf16_patch.after))].file
    outside = Path(shutil.move(base / name, tmp_path / "theirs.safetensors"))
    (base / name).symlink_to(outside)
    theirs = outside.read_bytes()
    patch.save(bf16_patch, base / JOURNAL_NAME)
    with pytest.raises(ValueError, match="is a link"):
        patch.recover(base)
    assert outside.read_bytes() == theirs
