"""Measure a sampler that serves FP8 beside a trainer of columns, or of LoRA.

    python -m benchmarks.rl_codes                  writes benchmarks/results/rl_codes.json

The base is SmolLM2-135M-Instruct as codes of FP8 (E4M3), a scale for each row. The trainer has what
transformers dequantises from them, in bfloat16; the sampler is transformers with the file that it
was sent: codes of columns, all weights quantised again, or the base's codes with LoRA beside them.
The gap between the two is `rl_sync`'s; the loss is that of new text after so many steps.
"""

import json
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks import rl_methods
from benchmarks.results import at_least_1, mean_row, new_parser, record
from benchmarks.rl_methods import SENT, Trainer, Transformers, agreement, text_ids
from pacatune.adapters.base import load_base
from pacatune.patch.packed import open_packed
from pacatune.reports.rows import Row
from pacatune.sync import ColumnReceiver, ColumnSource, GridSteps
from pacatune.sync.message import from_wire, to_wire

METHODS = {
    "paca, on codes": "PaCA, which computes with values of codes (`GridSteps`); codes are sent",
    "paca": "PaCA; the codes nearest to its columns are sent",
    "lora": "LoRA, merged, and every matrix quantised again with new scales",
    "lora-adapter": "LoRA beside the base's codes, its matrices in bfloat16 in the sampler",
}
_LARGEST = 448.0
_WEIGHTS = "model.safetensors"
_SECTION = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "ignore": ["lm_head"],
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 8,
                "type": "float",
                "strategy": "channel",
                "symmetric": True,
                "dynamic": False,
            },
        }
    },
}


def coded(weight: Tensor) -> dict[str, Tensor]:
    """Return codes of a (O, I) matrix, and a scale for each row."""
    scale = (weight.float().abs().amax(1, keepdim=True) / _LARGEST).bfloat16()
    codes = (weight.float() / scale.float()).clamp(-_LARGEST, _LARGEST)
    return {"weight": codes.to(torch.float8_e4m3fn), "weight_scale": scale}


def write_coded(plain: Path, output: Path) -> Path:
    """Write a folder of 16 bits as one of FP8; return it."""
    shutil.copytree(plain, output)
    tensors = {}
    for name, tensor in load_file(plain / _WEIGHTS).items():
        module, _, kind = name.rpartition(".")
        parts = coded(tensor) if module.endswith("_proj") and kind == "weight" else {kind: tensor}
        tensors |= {f"{module}.{part}": one for part, one in parts.items()}
    save_file(tensors, output / _WEIGHTS, {"format": "pt"})
    config = json.loads((output / "config.json").read_text(encoding="utf-8"))
    config |= {"quantization_config": _SECTION, "dtype": "bfloat16"}
    (output / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return output


class Codes(Transformers):
    """A sampler that reads its model from a folder of codes whenever that was changed."""

    name = "transformers, FP8"

    def __init__(self, folder: Path) -> None:
        self.folder, self.tensors = folder, load_file(folder / _WEIGHTS)
        self.receiver = ColumnReceiver(self.tensors, is_partial=False)

    def read(self) -> Any:
        """Write its tensors and read them as a server does."""
        save_file(self.tensors, self.folder / _WEIGHTS, {"format": "pt"})
        self.model = load_base(str(self.folder), task_type="CAUSAL_LM", dtype="bfloat16").eval()
        return self.model

    def quantise(self, tensors: Iterator[tuple[str, Tensor]]) -> int:
        """Take whole tensors of 16 bits as codes; return the bytes of what came."""
        num_bytes = 0
        for name, tensor in tensors:
            num_bytes += tensor.nbytes
            module = name.rpartition(".")[0]
            if f"{module}.weight_scale" in self.tensors:
                parts = coded(tensor).items()
                self.tensors |= {f"{module}.{part}": one for part, one in parts}
        return num_bytes


def run(method: str, seed: int, folder: Path, args: Any) -> dict[str, float]:
    """Train, sync after each step; return what was found at the end."""
    name = method.partition(",")[0]
    trainer = Trainer(name, load_base(str(folder), task_type="CAUSAL_LM", dtype="bfloat16"), seed)
    sampler, checkpoint = Codes(folder), open_packed(folder)
    source, num_bytes = None, list[int]()
    if method.endswith("on codes"):
        GridSteps(trainer.model, checkpoint, trainer.optimizer)
    if name == "paca":
        source = ColumnSource(trainer.model, codes=checkpoint)
        sampler.receiver.expect(from_wire(*to_wire(source.positions())))
    for _ in range(args.steps):
        trainer.step()
        if source is not None:
            header, body = to_wire(source.columns())
            sampler.receiver.apply(from_wire(header, body))
            num_bytes.append(body.nbytes)
    if name == "lora":
        num_bytes.append(sampler.quantise(trainer.tensors()))
    sampler.read()
    if name == "lora-adapter":
        sampler.model = rl_methods.adapt_by(name, sampler.model, 0, rl_methods.RANK).model
        sampler.own = dict(sampler.model.eval().named_parameters())
        num_bytes.append(sampler.write_adapter(trainer.model))
    ids, drawn = sampler.draw(text_ids(seed, 16, 8), args.drawn, seed)
    found = agreement(trainer.logps(ids)[:, -args.drawn :], drawn)
    new = text_ids(10**6 + seed, 16, 64)
    served, trained = sampler.score(new), trainer.logps(new)
    found["largest difference, fixed tokens"] = float((served - trained).abs().max())
    found["loss, trainer"], found["loss, sampler"] = -float(trained.mean()), -float(served.mean())
    found[SENT] = sum(num_bytes[1:] or num_bytes) / len(num_bytes[1:] or num_bytes)
    return found


def measure(args: Any) -> Iterator[Row]:
    """Return every row."""
    with tempfile.TemporaryDirectory() as folder:
        base = write_coded(Path(rl_methods.base_path()), Path(folder, "base"))
        for method in METHODS:
            found = defaultdict[str, dict[str, float]](dict)
            for seed in range(args.seeds):
                own = Path(shutil.copytree(base, Path(folder, f"{method}-{seed}")))
                for what, value in run(method, seed, own, args).items():
                    found[what][f"seed {seed}"] = value
                shutil.rmtree(own)
            for what, each in found.items():
                unit = {SENT: "bytes"}.get(what, "%" if "0.8" in what else "")
                names = {"method": method, "setting": Codes.name, "unit": unit}
                if what.startswith("largest") or what.endswith("max"):
                    value = max(each.values())
                    yield Row(what=what, value=value, n=len(each), each=each, **names)
                else:
                    yield mean_row(what, each=each, **names)


def main(options: list[str] | None = None) -> None:
    """Measure, write the result, print it."""
    parser = new_parser(__doc__, is_timed=True)
    add = parser.add_argument
    add("--steps", type=at_least_1, default=20, help="training steps, a sync after each")
    add("--drawn", type=at_least_1, default=128, help="tokens of each of 16 answers")
    add("--seeds", type=at_least_1, default=5)
    args = parser.parse_args(options)
    how = (
        "SmolLM2-135M-Instruct in FP8, a scale for each row, dequantised into bfloat16; all linear "
        f"layers, r = {rl_methods.RANK}, {args.steps} steps, {args.seeds} seeds; 16 drawn answers "
        f"of {args.drawn} tokens, and 1,008 fixed tokens of new text, for each"
    )
    record("rl_codes", how, lambda: list(measure(args)), args, options, METHODS)


if __name__ == "__main__":
    sys.exit(main())
