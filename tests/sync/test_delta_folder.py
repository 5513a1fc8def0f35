"""Versions in a folder lead engines to the bits of a merge; the reader here knows schemas alone."""

import json
import shutil
import zlib

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pacatune import PacaConfig
from pacatune.sync import ColumnSource, DeltaFolder, SkyrlDeltaFolder
from tests.adapters import kinds
from tests.full_disk import limited_files
from tests.sync.conftest import adapt, change, merged, nudge, served

zstandard = pytest.importorskip("zstandard")
xxhash = pytest.importorskip("xxhash")

FOLDERS = {"slime": DeltaFolder, "skyrl": SkyrlDeltaFolder}


def read_file(path):
    """Return what safetensors' description of its format says: metadata, and bytes by name."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    words = header.pop("__metadata__", {})
    spans = {name: entry["data_offsets"] for name, entry in header.items()}
    return words, {
        name: np.frombuffer(data[start + first : start + last], np.uint8).copy()
        for name, (first, last) in spans.items()
    }


class Engine:
    """What an engine keeps: the bytes of its base's tensors, changed by one version at a time."""

    def __init__(self, base):
        files = [read_file(path)[1] for path in base.glob("*.safetensors")]
        self.tensors = {name: data for file in files for name, data in file.items()}
        self.version = 0

    def pull(self, layout, folder, version):
        items = getattr(self, f"_{layout}")(folder, version)
        for name, frame, digest_of, expected in items:
            new = self.tensors[name]
            difference = zstandard.ZstdDecompressor().decompress(frame.tobytes())
            assert len(difference) == len(new)
            new ^= np.frombuffer(difference, np.uint8)
            if digest_of(new.tobytes()) != expected:
                raise ValueError(f"{name} has another digest")
        self.version = version
        return len(items)

    def _slime(self, folder, version):
        path = folder / f"weight_v{version:06d}"
        index = json.loads((path / "model.safetensors.index.json").read_text())
        assert index["metadata"] == {
            "version": f"{version:06d}",
            "base_version": f"{self.version:06d}",
            "delta_encoding": "xor",
            "compression_format": "zstd",
            "checksum_format": "adler32",
        }
        files = {shard: read_file(path / shard) for shard in {*index["weight_map"].values()}}
        assert {one.name for one in path.iterdir()} == {*files, "model.safetensors.index.json"}
        return [
            (name, files[shard][1][name], lambda d: f"{zlib.adler32(d):08x}", files[shard][0][name])
            for name, shard in index["weight_map"].items()
        ]

    def _skyrl(self, folder, version):
        path = folder / f"delta-{version:08d}"
        manifest = json.loads((path / "manifest.json").read_text())
        assert manifest.pop("version") == version
        assert manifest.pop("base_version") == self.version
        files = {name: read_file(path / name)[1] for name in manifest.pop("payload_files")}
        assert {one.name for one in path.iterdir()} == {*files, "manifest.json"}
        items, sizes = [], np.zeros(2, int)
        for one in manifest.pop("tensors"):
            name, frame = one.pop("name"), files[one.pop("payload_file")][one.pop("payload_key")]
            size = [one.pop("uncompressed_num_bytes"), one.pop("compressed_num_bytes")]
            assert size == [self.tensors[name].nbytes, frame.nbytes]
            assert one.pop("checksum_algorithm") == "xxh3-128"
            width = getattr(torch, one.pop("dtype")).itemsize
            assert width * int(np.prod(one.pop("shape"))) == size[0]
            items.append(
                (name, frame, lambda d: xxhash.xxh3_128(d).hexdigest(), one.pop("checksum"))
            )
            assert not one
            sizes += size
        assert sizes.tolist() == [
            manifest.pop(f"total_{one}compressed_num_bytes") for one in ("un", "")
        ]
        assert not manifest
        return items

    def assert_holds(self, state):
        assert self.tensors.keys() <= state.keys()
        for name, data in self.tensors.items():
            assert data.tobytes() == state[name].reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    served(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(params=FOLDERS)
def layout(request):
    return request.param


@pytest.fixture
def start(layout, base, tmp_path):
    """Start a writer, perhaps after another one."""
    return lambda base=base: FOLDERS[layout](tmp_path / "sync", base=base)


@pytest.fixture
def sync(layout, base):
    """Have an engine take each version, which then holds the trainer's merge."""
    engine = Engine(base)

    def send(source, writer, expected=None):
        columns = source.send(writer)
        assert writer.version == engine.version + 1
        num_changed = engine.pull(layout, writer.folder, writer.version)
        engine.assert_holds(expected or merged(source.model))
        return columns, num_changed

    return send


def test_engines_hold_the_bits_of_a_merge(start, sync):
    source, writer = ColumnSource(model := adapt(torch.bfloat16), complete_every=4), start()
    num_sets = len(source.positions().sets)
    columns, num_changed = sync(source, writer)
    assert (columns.last, num_changed) == (None, 0)  # deltas begin at zero
    for number in range(2, 7):
        nudge(model, number)
        columns, num_changed = sync(source, writer)
        assert (columns.last is not None) == (number != 5)
        assert num_changed == num_sets
    change(model, 3)
    assert sync(source, writer)[1] == 1
    assert sync(source, writer)[1] == 0  # a version of its own, for nothing


@pytest.mark.parametrize("kind", ["conv1d", "gpt_oss", "several files"])
def test_other_tensors(kind, start, layout, tmp_path):
    several = kind == "several files"
    build = served if several else lambda: kinds.build(kind)
    folder = tmp_path / "base"
    build().save_pretrained(folder, max_shard_size="20KB" if several else "1GB")
    assert (len(list(folder.glob("*.safetensors"))) > 1) == several
    options = {} if several else kinds.OPTIONS[kind]
    model = adapt(base=build(), init_weights=False, **options)
    ColumnSource(model).send(writer := start(folder))
    engine = Engine(folder)
    assert engine.pull(layout, writer.folder, 1) > 0
    engine.assert_holds(merged(model))


def other_columns(model):
    model.add_adapter("other", PacaConfig(r=3, target_modules=["q_proj", "down_proj"]))
    model.set_adapter("other")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "paca_delta.other" in name:
                parameter.normal_(std=0.1)
    return model


def test_columns_that_left_are_the_bases_again(start, sync):
    source, writer = ColumnSource(model := adapt(torch.bfloat16, init_weights=False)), start()
    sync(source, writer)
    other_columns(model)
    sync(source, writer)
    nudge(model, 0)
    assert sync(source, writer)[0].last is not None
    with model.disable_adapter():
        sync(source, writer, served(torch.bfloat16).state_dict())
    sync(source, writer)


def test_a_restarted_trainer_goes_on(layout, base, start, sync):
    model = adapt(torch.bfloat16, init_weights=False)
    source, writer = ColumnSource(model), start()
    for number in range(3):
        sync(source, writer)
        nudge(model, number)
    (writer.folder / ".weight_v000004.killed").mkdir()
    for other in (model, adapt(torch.bfloat16, r=2, target_modules=["o_proj", "q_proj"])):
        source, writer = ColumnSource(other), start()
        assert sync(source, writer)[1] > 0
        nudge(other, 4)
        sync(source, writer)
    late = Engine(base)
    for number in range(1, 8):
        late.pull(layout, writer.folder, number)
    late.assert_holds(merged(other))


def test_engines_of_another_base_notice(start, layout, tmp_path):
    model = adapt(torch.bfloat16, init_weights=False)
    ColumnSource(model).send(writer := start())
    other = served(torch.bfloat16)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[0, 0] += 1  # in no column, perhaps
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"up_proj.weight has another digest"):
        Engine(tmp_path / "other").pull(layout, writer.folder, 1)
    message = r"do not lead on from .*other in '.*up_proj.weight': they have another base, or"
    with pytest.raises(ValueError, match=message):
        ColumnSource(model).send(start(tmp_path / "other"))
    save_file({"other": torch.ones(2)}, tmp_path / "other" / "model.safetensors")
    with pytest.raises(ValueError, match=r"has no tensor 'model.layers.*; the nearest is 'other'"):
        start(tmp_path / "other")


@pytest.mark.parametrize("damage", [b"", b"damaged", zstandard.compress(b"too short")])
def test_damaged_versions(damage, start):
    model = adapt(torch.bfloat16, init_weights=False)
    ColumnSource(model).send(writer := start())
    (path,) = writer.folder.glob("*/*.safetensors")
    words, frames = read_file(path)
    frames = {name: torch.from_numpy(frame) for name, frame in frames.items()}
    name = min(frames)
    frames[name] = torch.tensor([*damage], dtype=torch.uint8)
    save_file(frames, path, words)
    held = path.read_bytes()
    with pytest.raises(ValueError, match=f"do not lead on .* in '{name}'.* or are damaged"):
        ColumnSource(model).send(start())
    assert [*writer.folder.glob("*/*.safetensors")] == [path]
    assert path.read_bytes() == held


@pytest.mark.parametrize(
    "name",
    ["README.md", "weight_v000002", "weight_v000003", "delta-00000002", "000001.safetensors"],
)
def test_a_folder_of_something_else(name, base, start):
    ColumnSource(adapt(torch.bfloat16)).send(writer := start())
    path = writer.folder / name
    if name == writer._version.format(3):  # a version is missing
        shutil.copytree(writer.folder / writer._version.format(1), path)
    elif "." in name:
        path.write_text("")
    else:
        path.mkdir()  # is not complete, or of another layout
    before = sorted(writer.folder.rglob("*"))
    with pytest.raises(ValueError, match=f"{name} is none of the complete versions"):
        start()
    assert sorted(writer.folder.rglob("*")) == before
    with pytest.raises(NotADirectoryError):
        type(writer)(base / "config.json", base=base)


def test_two_trainers(start):
    model, first, second = adapt(torch.bfloat16), start(), start()
    ColumnSource(model).send(first)
    before = {path: path.read_bytes() for path in first.folder.glob("*/*")}
    with pytest.raises(FileExistsError, match="another trainer writes to"):
        ColumnSource(model).send(second)
    assert {path: path.read_bytes() for path in first.folder.glob("*/*")} == before
    assert [path.name for path in first.folder.iterdir()] == [first._version.format(1)]


def test_a_full_disk(start, sync):
    source, writer = ColumnSource(model := adapt(torch.bfloat16)), start()
    sync(source, writer)
    nudge(model, 0)
    full = pytest.raises(ValueError, match=r"could not write .* nothing was left behind")
    with limited_files(), full:
        source.send(writer)
    assert writer.version == len(list(writer.folder.iterdir())) == 1
    sync(source, writer)
    nudge(model, 1)
    source.columns()  # another transport's
    change(model, 3)
    sync(source, writer)


def test_what_is_refused(base, start, tmp_path, monkeypatch):
    writer = start()
    with pytest.raises(ValueError, match="this end writes"):
        writer.receive()
    writer.close()
    message = r"proj.weight' is \(.*\) in torch.bfloat16, but the columns are for .*float32"
    with pytest.raises(ValueError, match=message):
        ColumnSource(adapt()).send(writer)
    save_file({"model.embed_tokens.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    experts = adapt(base=kinds.build("mixtral"), **kinds.EXPERTS)
    with pytest.raises(ValueError, match="Experts that the base's files split cannot be targets"):
        ColumnSource(experts).send(start(tmp_path))
    with pytest.raises(FileNotFoundError, match="only models that are saved as safetensors"):
        start(tmp_path / "none")
    assert not writer.folder.exists()
    monkeypatch.setattr("pacatune.installation.find_spec", lambda name: None)
    packages = ", ".join(writer._packages)
    with pytest.raises(ValueError, match=rf"not installed \({packages}\): .*'.\[delta\]'"):
        start()
