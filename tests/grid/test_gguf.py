"""Training in a GGUF file: read, trained, written back as codes, and taken out again."""

import contextlib
import io
import json
import re
from dataclasses import replace

import pytest
import torch

pytest.importorskip("gguf")
import gguf
from peft import LoraConfig, PeftModel, get_peft_model

from pacatune import PacaConfig
from pacatune.adapters.base import load_base
from pacatune.adapters.folder import read_adapter
from pacatune.cli import main
from pacatune.files.journal import journal_of
from pacatune.grid.gguf import GgufCheckpoint
from pacatune.patch import apply_in_place, apply_to_folder, load, make, recover, save
from pacatune.patch.packed import merge_packed
from pacatune.pretrained import find_model
from pacatune.training.held_out import HeldOut
from tests.conftest import build_model
from tests.grid.conftest import ROWS, build, digest, train_in
from tests.grid.files import write_gguf

# PEFT looks for a config.json beside a base, which a GGUF has within.
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file in .*gguf")


def outputs(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(6, 40)[None]).logits.float()


def assert_only_trained_columns_change(base, tuned, run_dir):
    before, after = GgufCheckpoint.open(base), GgufCheckpoint.open(tuned)
    trained = read_adapter(run_dir).modules
    names = {before.name_of(f"{module}.weight", 2): u.indices for module, u in trained.items()}
    assert len(names) == 14
    for name, entry in before.entries.items():
        every = torch.arange(entry.shape[-1])
        if len(entry.shape) == 1:
            assert torch.equal(before.tensor(name), after.tensor(name))
            continue
        old, new = (one.columns(name, 1, every) for one in (before, after))
        changed = (old != new).any(dim=0).nonzero()[:, 0]
        assert set(changed.tolist()) <= set(names.get(name, torch.tensor([])).tolist())
        assert (name in names) == (len(changed) > 0)


def test_it_is_trained_written_and_taken_out(model_file, run_dir, tmp_path, capsys):
    before, output = digest(model_file), tmp_path / "tuned.gguf"
    words = ["--model", str(model_file), "--adapter", str(run_dir), "--output", str(output)]
    assert main(["merge", *words[2:]]) == 0  # the adapter names its file
    said = capsys.readouterr().out
    assert "2 of Q4_1" in said
    assert "trained codes moved" in said
    assert "verified  outputs differ from the trained model's by" in said
    assert digest(model_file) == before
    assert output.stat().st_size == model_file.stat().st_size
    base, tuned = (load_base(str(path), task_type="CAUSAL_LM") for path in (model_file, output))
    trained = PeftModel.from_pretrained(load_base(str(model_file), task_type="CAUSAL_LM"), run_dir)
    effect = (outputs(trained) - outputs(base)).abs().mean()
    error = (outputs(tuned) - outputs(trained)).abs().mean()
    assert error < effect / 3
    assert_only_trained_columns_change(model_file, output, run_dir)
    # As a patch: the same file, in place too, and the base's bytes again.
    patch, copy = tmp_path / "p.safetensors", tmp_path / "copy.gguf"
    copy.write_bytes(model_file.read_bytes())
    assert main(["patch", "make", *words[:4], "--output", str(patch)]) == 0
    assert {columns.grid for columns in load(patch).after.values()} == {
        "Q4_0",
        "Q4_1",
        "Q5_1",
        "Q8_0",
        "",
    }
    for word, expected in (("apply", digest(output)), ("revert", before)):
        how = ["--model", str(copy), "--patch", str(patch), "--in_place"]
        assert main(["patch", word, *how]) == 0
        assert digest(copy) == expected
    assert main(["patch", "apply", "--model", str(copy), "--patch", str(patch), "--output",
                 str(tmp_path / "again.gguf")]) == 0  # fmt: skip
    assert digest(tmp_path / "again.gguf") == digest(output)
    assert main(["inspect", str(patch)]) == 0
    assert "Q4_0" in capsys.readouterr().out


def test_what_rounding_may_take(model_file, run_dir, tmp_path):
    """Half of what training gained: of the held-out loss, else of the change of the outputs."""

    def merge(name, *losses):
        seen, output = iter(losses), tmp_path / name

        def warn(text):
            assert not output.exists()
            warned.append(text)

        return merge_packed(model_file, run_dir, output, measure=lambda *_: next(seen), warn=warn)

    warned = []
    assert merge("kept.gguf", 4.0, 3.0, 3.09).verified.losses == [4.0, 3.0, 3.09]
    assert not warned
    assert merge("noted.gguf", 4.0, 3.0, 3.11).verified.losses == [4.0, 3.0, 3.11]
    (text,) = warned
    assert text.startswith("writing takes 11% of what training gained: the held-out loss is 4.")
    assert "3.0000 as trained, 3.1100 as written. 9" in text
    assert "trained codes moved" in text
    assert "a lower `r` of the same alpha" in text
    for written in (3.6, float("nan")):
        with pytest.raises(ValueError, match="of the 1 by which training lowered the loss"):
            merge("lost.gguf", 4.0, 3.0, written)
    merge("worse.gguf", 3.0, 4.0, 9.0)  # a loss that rose says nothing
    assert len(warned) == 1
    assert {path.stem for path in tmp_path.iterdir()} == {"kept", "noted", "worse"}


FEW_MOVE = ["--paca.r", "16", "--paca.paca_alpha", "4", "--training.learning_rate"]


def test_a_run_says_that_its_steps_move_few_codes(model_file, tmp_path):
    said = train_in(model_file, tmp_path, "--data.eval_fraction", "0", *FEW_MOVE, "0.0005")
    (line,) = (line for line in said.splitlines() if line.startswith("warning: after "))
    assert re.match(r"warning: after 3 of 8 steps \d+\.\d% of the trained codes of /", line)
    assert "updates of less than half a step of the file are lost" in line
    assert "Lower `paca.r` beside the same `paca.paca_alpha`" in line


def test_a_merge_says_what_writing_takes_of_the_held_out_gain(model_file, tmp_path, capsys):
    held_out = ["--data.eval_path", tmp_path / "chats.jsonl"]
    said = train_in(model_file, tmp_path, *held_out, *FEW_MOVE, "0.0022")
    assert "warning: after" not in said
    capsys.readouterr()
    words = ["--adapter", tmp_path / "run", "--output", tmp_path / "tuned.gguf", "--held_out"]
    assert main(["merge", *map(str, words)]) == 0
    out, err = capsys.readouterr()
    (line,) = (line for line in err.splitlines() if line.startswith("warning: "))
    losses = re.findall(r"[0-9]\.[0-9]{4}", line)
    assert losses == re.findall(r"[0-9]\.[0-9]{4}", out[out.index("held out  loss") :])
    assert "trained codes moved" in line
    assert "held-out loss, " not in err  # a bar is for terminals

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    model, terminal = load_base(str(model_file), task_type="CAUSAL_LM"), Terminal()
    with contextlib.redirect_stderr(terminal):
        loss = HeldOut(tmp_path / "run").loss(model, "the base")
    assert f"{loss:.4f}" == losses[0]
    assert "held-out loss, the base" in terminal.getvalue()


def test_a_rate_that_moves_no_code(model_file, tmp_path):
    base = load_base(str(model_file), task_type="CAUSAL_LM")
    config = PacaConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "paca_delta" in name:
            parameter.data.fill_(1e-4)
    model.save_pretrained(tmp_path / "run")
    with pytest.raises(ValueError, match="by which training changed the outputs; nothing was"):
        merge_packed(model_file, tmp_path / "run", tmp_path / "new.gguf")
    assert not (tmp_path / "new.gguf").exists()


def wide_file(tokenizer, path, others):
    """A layer of 256 channels, which have a block each, and an adapter of random values on it."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    write_gguf(path, build_model(len(tokenizer), **sizes), tokenizer, "Q8_0", others)
    base = load_base(str(path), task_type="CAUSAL_LM", dtype="float32")
    config = PacaConfig(r=4, target_modules="all-linear", init_weights=False, task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(path.with_suffix(""))
    return path, path.with_suffix("")


def test_k_quants(tiny_tokenizer, tmp_path):
    """Formats that nothing here can write: their codes are trained all the same."""
    others = {"ffn_gate": "Q4_K", "ffn_up": "Q5_K", "ffn_down": "Q6_K"}
    path, folder = wide_file(tiny_tokenizer, tmp_path / "k.gguf", others)
    patch, _ = make(path, folder)
    apply_to_folder(path, patch, tmp_path / "tuned.gguf")
    plain, tuned = (
        load_base(str(one), task_type="CAUSAL_LM", dtype="float32")
        for one in (path, tmp_path / "tuned.gguf")
    )
    adapter = read_adapter(folder)
    for module, update in adapter.modules.items():
        before, found = (m.get_submodule(module).weight.detach() for m in (plain, tuned))
        wanted = before.clone()
        wanted[:, update.indices] += adapter.scaling(module) * update.delta
        others = torch.ones(wanted.shape[1], dtype=torch.bool)
        others[update.indices] = False
        assert torch.equal(found[:, others], wanted[:, others])
        assert (found - wanted).abs().sum() < (before - wanted).abs().sum()


def test_a_format_whose_codes_are_not_known(tiny_tokenizer, tmp_path, capsys):
    """It is named with its tensor where it is a target, and left alone elsewhere."""
    path, folder = wide_file(tiny_tokenizer, tmp_path / "t.gguf", {"ffn_down": "TQ1_0"})
    words = ["--model", path, "--adapter", folder, "--output", tmp_path / "new.gguf"]
    said = refused(capsys, "merge", *words)
    assert "holds 'blk.0.ffn_down.weight' as TQ1_0, whose codes cannot be trained" in said
    assert "formats are Q4_0" in said
    assert not (tmp_path / "new.gguf").exists()
    said = train_in(path, tmp_path / "other", "--data.eval_fraction", "0", "--paca.r", "4")
    assert "warning: what is trained here cannot become codes of the file: " in said
    assert said.count("holds 'blk.0.ffn_down.weight' as TQ1_0") == 1


def test_tensors_that_share_bytes_are_refused(model_file, run_dir, tmp_path):
    """A patch in place would change both, and could not be taken back."""
    changes, _ = make(model_file, run_dir, with_adapter=False)
    fields = {tensor.name: tensor.field for tensor in gguf.GGUFReader(model_file).tensors}
    field, other = fields["blk.0.attn_q.weight"], int(fields["blk.0.ffn_gate.weight"].parts[-1][0])
    # The last number of a tensor's entry in the header says where it begins.
    place = field.offset + sum(part.nbytes for part in field.parts[:-1])
    copy = tmp_path / "copy.gguf"

    def refuse(offset, message):
        content = bytearray(model_file.read_bytes())
        content[place : place + 8] = (offset % 2**64).to_bytes(8, "little")
        copy.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            apply_in_place(copy, changes)
        save(replace(changes, fingerprint={}), journal_of(copy))
        with pytest.raises(ValueError, match=message):
            recover(copy)
        journal_of(copy).unlink()
        assert copy.read_bytes() == content

    for offset in (other, other + 32, other - 32):
        refuse(offset, r"'blk\.0\..*' and 'blk\.0\..*' share bytes of")
    refuse(-4096, "damaged|can be read")  # in the header


def refused(capsys, *words):
    assert main([*map(str, words)]) == 2
    *bars, said = capsys.readouterr().err.splitlines()  # of transformers and datasets
    shown = ("GGUF tensors", "Loading", "Generating")
    assert all(not bar or any(name in bar for name in shown) for bar in bars)
    return said


def test_bad_input_is_one_line_and_nothing_is_written(
    model_file, run_dir, tiny_tokenizer, tmp_path, capsys
):
    def merge(model=model_file, adapter=run_dir, output="new.gguf", *more):
        words = ["--model", model, "--adapter", adapter, "--output", tmp_path / output]
        said = refused(capsys, "merge", *words, *more)
        assert not (tmp_path / "new.gguf").exists()
        return said

    damaged = tmp_path / "damaged.gguf"
    for content in (b"", b"GGUF", model_file.read_bytes()[:200]):
        damaged.write_bytes(content)
        assert "GGUF file" in merge(damaged)
        words = ["train", "--model.path", damaged, "--data.path", tmp_path / "d.jsonl"]
        (tmp_path / "d.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
        refused(capsys, *words, "--training.output_dir", tmp_path / "out")
    damaged.write_bytes(model_file.read_bytes()[:-5000])
    assert "GGUF file" in merge(damaged)
    assert "must end in .gguf" in merge(output="folder")
    (tmp_path / "there.gguf").write_bytes(b"mine")
    assert "exists; choose another name" in merge(output="there.gguf")
    assert (tmp_path / "there.gguf").read_bytes() == b"mine"
    dtype = merge(model_file, run_dir, "new.gguf", "--dtype", "bf16")
    assert "`dtype` ('bfloat16'): a quantised model keeps its own formats" in dtype
    assert "holds out no data" in merge(model_file, run_dir, "new.gguf", "--held_out")
    both = merge(model_file, run_dir, "new.gguf", "--held_out", "--no_verify")
    assert "`no_verify` compares nothing; drop one of them" in both
    base = merge(model_file, run_dir, "new.gguf", "--base", "nf4")
    assert "is saved in few bits. `pacatune merge` writes PaCA's columns as codes" in base
    # Another model, of the same shapes.
    other = write_gguf(tmp_path / "other.gguf", build(tiny_tokenizer, seed=5), tiny_tokenizer)
    assert "are not those it was trained on" in merge(other)


def test_other_commands(model_file, run_dir, tmp_path, capsys):
    words = ["--model", str(model_file), "--adapter", str(run_dir)]
    assert main(["generate", *words, "--prompt", "Is it?", "--max_new_tokens", "3"]) == 0
    assert main(["inspect", str(run_dir)]) == 0
    assert str(model_file) in capsys.readouterr().out
    assert "gguf_file='base.gguf'" in (run_dir / "README.md").read_text()
    data = tmp_path / "chats.jsonl"
    data.write_text(json.dumps(ROWS[0]) + "\n")
    quantised = ["--model.path", model_file, "--data.path", data, "--data.eval_fraction", "0"]
    quantised += ["--model.quantization", "nf4"]
    said = refused(capsys, "train", *quantised, "--training.output_dir", tmp_path / "out")
    assert "is saved quantised already" in said
    other = tmp_path / "there-is-none.gguf"
    said = refused(capsys, "train", "--model.path", other, "--data.path", data)
    assert f"model file {other} does not exist" in said
    said = refused(capsys, "patch", "diff", "--model", model_file, "--with", model_file)
    assert "is a GGUF file; model folders are compared" in said


def test_lora_is_refused(model_file, tmp_path, capsys):
    base = load_base(str(model_file), task_type="CAUSAL_LM")
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(tmp_path / "lora")
    words = ["--model", model_file, "--adapter", tmp_path / "lora"]
    said = refused(capsys, "merge", *words, "--output", tmp_path / "new.gguf")
    assert "is a LoRA adapter, which changes every element of a weight" in said


def test_an_interrupted_patch_is_rolled_back(model_file, run_dir, tmp_path, monkeypatch):
    from pacatune.patch import folder

    patch, _ = make(model_file, run_dir)
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(model_file.read_bytes())
    real = GgufCheckpoint.put_columns_
    calls = []

    def dies(self, *args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(self, *args)

    monkeypatch.setattr(GgufCheckpoint, "put_columns_", dies)
    monkeypatch.setattr(folder, "_roll", lambda model, finish: [])  # as if it were killed
    with pytest.raises(KeyboardInterrupt):
        apply_in_place(copy, patch)
    monkeypatch.undo()
    assert not copy.exists()
    assert (copy.parent / "copy.gguf.patching").exists()
    with pytest.raises(ValueError, match="is being patched in place, or that was interrupted"):
        find_model(str(copy))
    assert "rolled back" in recover(copy)[0]
    assert digest(copy) == digest(model_file)
    assert recover(copy) == []
