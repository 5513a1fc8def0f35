"""Model folders: patched copies, patches in place, and kills at every moment of these."""

import filecmp
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pacatune import patch
from pacatune.files.checkpoint import Checkpoint
from pacatune.files.journal import JOURNAL_NAME
from pacatune.patch import Patch, edit_of
from pacatune.patch import folder as folder_module
from pacatune.pretrained import find_model
from tests.conftest import build_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def sharded_dir(tmp_path_factory):
    """The model of `bf16_dir` in several files."""
    folder = tmp_path_factory.mktemp("sharded") / "base"
    build_model(300).bfloat16().save_pretrained(folder, max_shard_size="30KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture(params=["single", "sharded"])
def base(request, bf16_dir, sharded_dir, tmp_path):
    """A base of our own, in one file or several."""
    source = bf16_dir if request.param == "single" else sharded_dir
    return Path(shutil.copytree(source, tmp_path / "base"))


def names_of(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def assert_same_files(one, other):
    names = names_of(other)
    assert [name for name in names_of(one) if name != ".lock"] == names
    assert filecmp.cmpfiles(one, other, names, shallow=False)[0] == names


def contents(folder):
    return {name: (folder / name).read_bytes() for name in names_of(folder) if name != ".lock"}


def test_a_copy_is_patched_and_the_base_left_alone(base, bf16_patch, tmp_path):
    before = contents(base)
    result = patch.apply_to_folder(base, bf16_patch, tmp_path / "out")
    assert contents(base) == before
    assert (result.num_tensors, result.num_columns, result.notes) == (6, 24, [])
    assert result.column_bytes == bf16_patch.num_bytes < result.page_bytes
    assert result.page_bytes % 4096 == 0
    assert names_of(tmp_path / "out") == names_of(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    patch.apply(model, bf16_patch)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, written.get_parameter(name))
    patch.apply_to_folder(tmp_path / "out", bf16_patch, tmp_path / "back", revert=True)
    assert_same_files(tmp_path / "back", base)


def test_in_place_and_back(base, bf16_patch, tmp_path):
    before, size = contents(base), Checkpoint.open(base).num_bytes
    shutil.copytree(base, tmp_path / "copy")
    patch.apply_to_folder(base, bf16_patch, tmp_path / "out")
    assert patch.apply_in_place(base, bf16_patch).checkpoint_bytes == size
    assert contents(base) == contents(tmp_path / "out")
    with pytest.raises(ValueError, match=r"is already applied to .*; there is nothing to apply"):
        patch.apply_in_place(base, bf16_patch)
    patch.apply_in_place(base, bf16_patch, revert=True)
    assert contents(base) == before
    with pytest.raises(ValueError, match=r"is not applied to .*; there is nothing to revert"):
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


@pytest.mark.parametrize("header", [b"{}", b'{"__metadata__":{"a":"b"}}'])
def test_files_whose_tensors_are_not_aligned(tmp_path, header):
    """Other writers than safetensors' own do not pad the header."""
    weight = torch.arange(24.0).view(4, 6)
    text = json.loads(header) | {"w": {"dtype": "F32", "shape": [4, 6], "data_offsets": [0, 96]}}
    raw = json.dumps(text).encode()
    raw += b" " * (1 - len(raw) % 2)  # an odd length
    (tmp_path / "m").mkdir()
    path = tmp_path / "m" / "model.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + weight.numpy().tobytes())
    edit = edit_of("w", 1, weight, torch.tensor([1, 4]), torch.full((4, 2), -1.0))
    patch.apply_in_place(tmp_path / "m", Patch(edits={"w": edit}))
    weight[:, [1, 4]] = -1
    assert torch.equal(load_file(path)["w"], weight)


def test_what_comes_along(tiny_model_dir, adapter_dir, tmp_path):
    base = Path(shutil.copytree(tiny_model_dir, tmp_path / "base"))
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text("{}")
    for name in ("pytorch_model.bin", "consolidated.safetensors", ".hidden"):
        (base / name).write_text("x")
    made, _ = patch.make(base, adapter_dir)
    result = patch.apply_to_folder(base, made, tmp_path / "out")
    assert result.notes == [
        "left out, as they hold the base's weights unpatched: consolidated.safetensors, "
        "pytorch_model.bin."
    ]
    left_out = {"pytorch_model.bin", "consolidated.safetensors", ".hidden"}
    assert set(names_of(base)) - set(names_of(tmp_path / "out")) == left_out
    AutoTokenizer.from_pretrained(tmp_path / "out")


def test_the_hubs_cache_is_read_through_its_links(bf16_dir, bf16_patch, tmp_path):
    blobs, snapshot = tmp_path / "models--a" / "blobs", tmp_path / "models--a" / "snapshots" / "1"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in bf16_dir.iterdir():
        shutil.copy(path, blobs / f"hash-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/hash-{path.name}")
    patch.apply_to_folder(snapshot, bf16_patch, tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    before = contents(blobs)
    with pytest.raises(ValueError, match="is a link, or has several names"):
        patch.apply_in_place(snapshot, bf16_patch)
    assert contents(blobs) == before
    (snapshot / "notes.txt").symlink_to(tmp_path / "elsewhere.txt")
    (tmp_path / "elsewhere.txt").write_text("private")
    with pytest.raises(ValueError, match=r"is a link to .*elsewhere.txt, outside of the folder"):
        patch.apply_to_folder(snapshot, bf16_patch, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_file_with_a_second_name_is_not_changed(base, bf16_patch, tmp_path):
    (path,) = [
        base / Checkpoint.open(base).entries[name].file for name in [next(iter(bf16_patch.edits))]
    ]
    os.link(path, tmp_path / "second")
    before = contents(base)
    with pytest.raises(ValueError, match=r"has several names.*--output"):
        patch.apply_in_place(base, bf16_patch)
    assert contents(base) == before


def test_disjoint_patches_go_on_and_off_in_any_order(bf16_dir, tmp_path):
    from tests.adapters.fixtures import save_adapter

    base = Path(shutil.copytree(bf16_dir, tmp_path / "base"))
    before, patches = contents(base), []
    for number, columns in enumerate(([0, 5, 9], [1, 6, 31])):
        save_adapter(
            bf16_dir,
            tmp_path / str(number),
            dtype="bfloat16",
            seed=number,
            r=3,
            target_modules=["q_proj", "v_proj"],
            selection={".*": columns},
        )
        patches.append(patch.make(bf16_dir, tmp_path / str(number))[0])
    one, two = patches
    patch.apply_in_place(base, one)
    (note,) = patch.apply_in_place(base, two).notes
    assert note.endswith("differ from its base: another patch is applied, or it is another base.")
    patch.apply_to_folder(bf16_dir, patch.stack([two, one]), tmp_path / "joint")
    both = contents(base)
    assert both == contents(tmp_path / "joint")
    patch.apply_in_place(base, one, revert=True)
    patch.apply_to_folder(bf16_dir, two, tmp_path / "two")
    assert contents(base) == contents(tmp_path / "two")
    patch.apply_in_place(base, two, revert=True)
    assert contents(base) == before


def test_overlapping_patches_come_off_in_order_only(bf16_dir, bf16_patch, tmp_path):
    base = Path(shutil.copytree(bf16_dir, tmp_path / "base"))
    name, first = next(iter(bf16_patch.edits.items()))
    patch.apply_in_place(base, bf16_patch)
    patched = Checkpoint.open(base).tensor(name)
    over = edit_of(name, first.dim, patched, first.indices[:1], patched[:, :1] * 3)
    second = Patch(edits={name: over})
    patch.apply_in_place(base, second)
    with pytest.raises(
        ValueError, match=r"1 of 6 tensors.* than the patch wrote. If another .*over"
    ):
        patch.apply_in_place(base, bf16_patch, revert=True)
    patch.apply_in_place(base, second, revert=True)
    patch.apply_in_place(base, bf16_patch, revert=True)
    assert contents(base) == contents(bf16_dir)


def test_a_base_that_differs_elsewhere_alone(bf16_dir, bf16_patch, tmp_path):
    """A fine-tune that froze the columns: the patch fits, but what comes out was never trained."""
    other = Path(shutil.copytree(bf16_dir, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    for name, edit in bf16_patch.edits.items():
        noise = torch.randn(edit.shape, generator=torch.Generator().manual_seed(0)).bfloat16()
        noise[:, edit.indices] = tensors[name][:, edit.indices]
        tensors[name] = noise
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    before = contents(other)
    for write in (patch.apply_in_place, lambda *args: patch.apply_to_folder(*args, tmp_path / "x")):
        with pytest.raises(ValueError, match=r"is not the base .* although those it changes are"):
            write(other, bf16_patch)
    assert contents(other) == before
    assert not (tmp_path / "x").exists()
    assert patch.apply_in_place(other, bf16_patch, allow_other_base=True).notes


def test_bases_that_a_patch_does_not_fit(bf16_patch, tmp_path):
    for name, model, message in (
        ("seed", build_model(300, seed=3).bfloat16(), r"is not the base .*\('my-base'\): 6 of 6"),
        ("dtype", build_model(300).half(), r"is F16, but the patch is for torch.bfloat16: bits"),
        ("sizes", build_model(300, intermediate_size=48).bfloat16(), r"\(32, 48\), but the patch"),
        ("layers", build_model(300, num_hidden_layers=1).bfloat16(), "has no tensor '.*1.mlp"),
    ):
        base = tmp_path / name
        model.save_pretrained(base)
        before = contents(base)
        with pytest.raises(ValueError, match=message):
            patch.apply_in_place(base, bf16_patch)
        with pytest.raises(ValueError, match=message):
            patch.apply_to_folder(base, bf16_patch, tmp_path / "out")
        assert contents(base) == before
        assert not (tmp_path / "out").exists()


def test_folders_that_are_no_models_in_safetensors(bf16_patch, tmp_path, sharded_dir):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        patch.apply_in_place(tmp_path / "nowhere", bf16_patch)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        patch.recover(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has neither model.safetensors nor"):
        patch.apply_in_place(tmp_path / "empty", bf16_patch)
    base = Path(shutil.copytree(sharded_dir, tmp_path / "base"))
    index = base / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    for weight_map, message in (
        ({}, "has no `weight_map`"),
        ({"a": "../base/model.safetensors"}, "must be a plain name that ends with"),
        ({"a": "model.bin"}, "must be a plain name that ends with"),
        ({**good["weight_map"], "b": "lost.safetensors"}, "has no lost.safetensors, which its"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            patch.apply_in_place(base, bf16_patch)
    index.write_text(json.dumps(good))
    (first, *_) = sorted(base.glob("*.safetensors"))
    shutil.copy(first, base / "twice.safetensors")
    index.write_text(json.dumps({"weight_map": {**good["weight_map"], "b": "twice.safetensors"}}))
    with pytest.raises(ValueError, match="only one of them can be the model's"):
        patch.apply_in_place(base, bf16_patch)


def test_a_damaged_base_is_refused(bf16_dir, bf16_patch, tmp_path):
    base = Path(shutil.copytree(bf16_dir, tmp_path / "base"))
    path = base / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(ValueError, match="it is truncated"):
        patch.apply_in_place(base, bf16_patch)
    path.write_bytes(whole.replace(b'"BF16"', b'"BF17"', 1))
    with pytest.raises(ValueError, match="is not a valid safetensors file"):
        patch.apply_in_place(base, bf16_patch)


def test_an_output_in_use_stays_as_it_is(bf16_dir, bf16_patch, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(FileExistsError, match="is not empty"):
        patch.apply_to_folder(bf16_dir, bf16_patch, tmp_path / "out")
    assert names_of(tmp_path / "out") == ["mine"]


def test_what_was_written_is_read_back(bf16_dir, bf16_patch, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_module, "_write", lambda *args: None)
    with pytest.raises(ValueError, match="was not written as it should be; nothing was left"):
        patch.apply_to_folder(bf16_dir, bf16_patch, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_known_before(base, bf16_patch, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 2**16))
    before = contents(base)
    with pytest.raises(ValueError, match=r"64.0 KiB free, but patching in place needs 1\.\d MiB"):
        patch.apply_in_place(base, bf16_patch)
    assert contents(base) == before


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_an_error_while_writing_is_rolled_back_at_once(base, bf16_patch, monkeypatch, error):
    before, write, calls = contents(base), folder_module._write, []

    def failing(path, checkpoint, edits):
        write(path, checkpoint, edits[: len(edits) // 2] if not calls else edits)
        calls.append(path)
        if len(calls) == 1:
            raise error

    monkeypatch.setattr(folder_module, "_write", failing)
    with pytest.raises(type(error)):
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
    from pacatune.files.result_folder import alone_in

    with alone_in(base):
        for action in (lambda: patch.apply_in_place(base, bf16_patch), lambda: patch.recover(base)):
            with pytest.raises(ValueError, match="another run is at work in"):
                action()


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
            assert f"{action} in place was interrupted earlier; it is rolled back." in notes[0]
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
    patch.save(bf16_patch, base / JOURNAL_NAME, extra={"action": "apply"})
    with pytest.raises(ValueError, match="is a link"):
        patch.recover(base)
    assert (tmp_path / "theirs.safetensors").read_bytes() == theirs
