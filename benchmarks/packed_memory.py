"""Measure training in the blocks of a GGUF file: bytes, peaks, times, and what fits.

    python -m benchmarks.packed_memory       writes benchmarks/results/packed_memory.json; an hour

Weights stay in the file's blocks, or are dequantised to bfloat16, or are that copy in NF4 by
bitsandbytes. The files: SmolLM2-135M as somebody's Q4_1; the same in Q4_K by ggml, where rows that
are no multiple of 256 become Q5_0, as llama.cpp has it; and a Llama of 1.1 billion random weights
in Q4_0 (by gguf; its layers have the same weights), which trains ten steps. Peaks are those of a
fresh process, its libraries included. What fits a device is simulated.
"""

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize, quantize
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from benchmarks.llama_cpp import SERVER, fetch
from benchmarks.models import make_batch
from benchmarks.results import at_least_1, compare, counted, new_parser, record, take_turns
from benchmarks.timing import Contender, Step
from examples.packaged import default_cache, prepare
from pacatune import PacaConfig, lean
from pacatune.measure.estimate import estimate_memory, find_max
from pacatune.measure.setting import Setting
from pacatune.pretrained import bitsandbytes_config, load_packed, load_weights
from pacatune.reports.rows import Row

OURS = "packed"
METHODS = {
    OURS: "PaCA, r = 16, its weights in the blocks of the file",
    "dequantised": "PaCA, r = 16, on a copy in bfloat16",
    "qpaca": "PaCA, r = 16, on that copy in NF4",
    "qlora": "PEFT's LoRA, r = 16, on that copy in NF4",
}
TOKENS = (16, 512, 2048)
# Hidden size, layers, heads, heads of keys and values, intermediate size, words.
LARGE = (2048, 22, 32, 4, 5632, 32_000)
DEVICES = (8, 12, 16, 24)
SIMULATED = {
    "paca, Q4_K_M": {"method": "paca", "quantization": "q4_k_m"},
    "qpaca": {"method": "qpaca"},
    "qlora": {"method": "qlora"},
    "paca, bfloat16": {"method": "paca"},
}


def in_q4_k(file: Path, output: Path) -> None:
    """Write a copy of a file whose matrices are in Q4_K, or Q5_0 where rows do not divide."""
    (library,) = (fetch(*SERVER) / "xllamacpp").glob("*.so")
    ggml = ctypes.CDLL(str(library)).ggml_quantize_chunk
    ggml.restype, pointer, number = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int64
    ggml.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    reader = gguf.GGUFReader(file)
    architecture = str(reader.fields["general.architecture"].contents())
    writer = gguf.GGUFWriter(str(output), architecture)
    for name, field in reader.fields.items():
        if not name.startswith(("GGUF.", "general.architecture", "general.file_type")):
            sub_type = field.types[1] if field.types[0] is gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type)
    for tensor in reader.tensors:
        data, kind = tensor.data, tensor.tensor_type
        if kind not in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
            values = np.ascontiguousarray(dequantize(data, kind), dtype=np.float32)
            rows, width = values.shape
            kinds = gguf.GGMLQuantizationType
            kind = kinds.Q5_0 if width % 256 else kinds.Q4_K
            block, size = gguf.GGML_QUANT_SIZES[kind]
            data = np.empty((rows, width // block * size), dtype=np.uint8)
            ggml(int(kind), values.ctypes.data, data.ctypes.data, 0, rows, width, None)
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    _finish(writer)


def random_llama(output: Path, sizes: tuple[int, ...]) -> None:
    """Write a Llama of random weights in Q4_0."""
    hidden, num_layers, heads, kv_heads, intermediate, num_words = sizes
    writer, generator = gguf.GGUFWriter(str(output), "llama"), np.random.default_rng(0)
    writer.add_context_length(2048)
    writer.add_embedding_length(hidden)
    writer.add_block_count(num_layers)
    writer.add_feed_forward_length(intermediate)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(num_words)
    kind, kv = gguf.GGMLQuantizationType.Q4_0, hidden // heads * kv_heads

    def matrix(rows: int, columns: int) -> Any:
        values = generator.standard_normal((rows, columns), dtype=np.float32)
        return quantize(values / columns**0.5, kind)

    shapes = {
        **{"attn_q": (hidden, hidden), "attn_k": (kv, hidden), "attn_v": (kv, hidden)},
        **{"attn_output": (hidden, hidden), "ffn_down": (hidden, intermediate)},
        **{"ffn_gate": (intermediate, hidden), "ffn_up": (intermediate, hidden)},
    }
    of_layer = {name: matrix(*shape) for name, shape in shapes.items()}
    for name in ("token_embd", "output"):
        writer.add_tensor(f"{name}.weight", matrix(num_words, hidden), raw_dtype=kind)
    ones = np.ones(hidden, dtype=np.float32)
    writer.add_tensor("output_norm.weight", ones)
    for layer in range(num_layers):
        for name, data in of_layer.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", data, raw_dtype=kind)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", ones)
    _finish(writer)


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def contender(method: str, file: Path, copy: Path, level: int = 1) -> Contender:
    """Return a model ready to train; `copy` is a folder of the file's values in bfloat16."""
    load = partial(load_weights, AutoModelForCausalLM, dtype=torch.bfloat16)
    if method == OURS:
        model = load_packed(AutoModelForCausalLM, str(file), dtype=torch.bfloat16)
    elif method == "dequantised":
        model = load(str(file))
    else:
        config = bitsandbytes_config("nf4", torch.bfloat16)
        model = load(str(copy), quantization_config=config, device_map={"": "cpu"})
    model.requires_grad_(False)
    config = PacaConfig(r=16, paca_alpha=16, task_type="CAUSAL_LM")
    if method == "qlora":
        everywhere = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        config = LoraConfig(r=16, lora_alpha=16, **everywhere)
    torch.manual_seed(0)
    adapted = get_peft_model(model, config).train()
    model.enable_input_require_grads()
    lean.enable(adapted, level=level)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    return Contender(method, adapted, torch.optim.AdamW(trained, lr=1e-4, fused=True))


def weight_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of what is frozen, quantisation constants included."""
    frozen = [p for p in model.parameters() if not p.requires_grad]
    states = [getattr(p, "quant_state", None) for p in frozen]
    constants = 0
    for state in filter(None, states):
        parts = (state.absmax, getattr(state.state2, "absmax", None))
        constants += sum(part.nbytes for part in parts if part is not None)
    return sum(p.nbytes for p in frozen) + constants


def step_of(made: Contender, tokens: int) -> Step:
    """Return a step on a row of random tokens."""
    words = int(made.model.get_base_model().config.vocab_size)  # type: ignore[operator]
    return Step(contender=made, batch=make_batch(1, tokens, words, 0), autocast=torch.bfloat16)


def child(args: argparse.Namespace) -> None:
    """Train some steps, and print the peak of this process."""
    torch.set_num_threads(args.threads)
    made = contender(args.child, args.file, args.copy, args.level)
    step, losses = step_of(made, args.tokens[0]), []
    for _ in range(args.steps):
        loss = step.forward()
        loss.backward()
        made.optimizer.step()  # type: ignore[union-attr]
        made.optimizer.zero_grad()  # type: ignore[union-attr]
        losses.append(loss.item())
    peak = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    print(json.dumps({"peak": peak, "weights": weight_bytes(made.model), "losses": losses}))


def fresh(
    method: str, file: Path, copy: Path, tokens: int, level: int, steps: int, threads: int
) -> dict[str, Any]:
    """Return what a process of its own finds of a method."""
    words = ["--child", method, "--file", file, "--copy", copy, "--tokens", tokens]
    words += ["--level", level, "--steps", steps, "--threads", threads]
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.packed_memory", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{method} on {file}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure_file(kind: str, file: Path, scratch: Path, args: argparse.Namespace) -> Iterator[Row]:
    """Compare all methods on a file of SmolLM2."""
    copy = scratch / kind
    load_weights(AutoModelForCausalLM, str(file), dtype=torch.bfloat16).save_pretrained(copy)
    names = {"model": "SmolLM2-135M", "setting": kind}
    yield counted("file", "file", file.stat().st_size, "bytes", **names)
    for method in METHODS:
        found = fresh(method, file, copy, 512, 1, 3, args.threads)
        yield counted("weights", method, found["weights"], "bytes", **names)
        peak = names | {"setting": f"{kind}, 512 tokens"}
        yield Row(what="peak", method=method, value=found["peak"], unit="bytes", **peak)
        if method == OURS:
            share = found["weights"] / file.stat().st_size
            yield counted("weights / file", method, share, "ratio", **names)
    made = {method: contender(method, file, copy) for method in METHODS}
    pairs = [(OURS, other) for other in METHODS if other != OURS]
    for tokens in args.tokens:
        steps = {method: step_of(one, tokens) for method, one in made.items()}
        setting = names | {"setting": f"{kind}, {tokens} tokens"}
        for method, step in steps.items():
            yield counted("kept for backward", method, step.kept_bytes(), "bytes", **setting)
        runs = {method: step.seconds for method, step in steps.items()}
        yield from compare(take_turns(runs, args), args.seed, pairs, **setting)


def measure_large(scratch: Path, args: argparse.Namespace) -> Iterator[Row]:
    """Train the large one in a fresh process, and ask the estimate about it."""
    file, available = scratch / "large.gguf", 2 * 2**30
    random_llama(file, args.large)
    names = {"model": "Llama of random weights", "setting": "Q4_0"}
    yield counted("file", "file", file.stat().st_size, "bytes", **names)
    setting = Setting(
        model=str(file), rank=16, lean="auto", lean_level=2, gradient_checkpointing=False
    )
    weights = estimate_memory(setting.but(seq_len=16)).by_category["weights"]
    by_estimate: dict[str, Any] = {"method": "estimate", "origin": "simulated"}
    yield Row(what="weights", value=weights, unit="bytes", **by_estimate, **names)
    longest, _ = find_max(setting, "seq_len", available)
    for tokens in args.tokens:
        found = fresh(OURS, file, scratch, tokens, 2, args.steps, args.threads)
        one = names | {"setting": f"Q4_0, {tokens} tokens, {args.steps} steps"}
        yield counted("weights", OURS, found["weights"], "bytes", **one)
        yield Row(what="peak", method=OURS, value=found["peak"], unit="bytes", **one)
        for place, name in ((0, "first loss"), (-1, "last loss")):
            yield Row(what=name, method=OURS, value=found["losses"][place], **one)
        estimated = estimate_memory(setting.but(seq_len=tokens)).peak_bytes
        yield Row(what="peak", value=estimated, unit="bytes", **by_estimate, **one)
    in_2 = names | {"setting": "Q4_0, 2 GiB"}
    yield Row(what="longest", value=longest, unit="tokens", **by_estimate, **in_2)


def simulate(model: str) -> Iterator[Row]:
    """Return what a step of 4,096 tokens needs, and the longest sequence on devices."""
    for is_checkpointed in (False, True):
        for method, values in SIMULATED.items():
            setting = Setting(
                model=model,
                rank=16,
                lean="auto",
                lean_level=2,
                gradient_checkpointing=is_checkpointed,
                **values,
            )
            which = "checkpointed blocks" if is_checkpointed else "level 2"
            names: dict[str, Any] = {"model": model, "method": method, "origin": "simulated"}
            found = estimate_memory(setting.but(seq_len=4096))
            ends = {"low": found.low_bytes / 2**30, "high": found.high_bytes / 2**30}
            needs = (ends["low"] + ends["high"]) / 2
            at = f"{which}, 4096 tokens"
            yield Row(what="a device needs", value=needs, unit="GiB", setting=at, **ends, **names)
            for gib in DEVICES:
                longest, _ = find_max(setting, "seq_len", gib * 2**30)
                at = f"{which}, {gib} GiB"
                yield Row(what="longest", value=longest, unit="tokens", setting=at, **names)


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """Measure all parts."""
    prepare("smollm2-gguf")
    # transformers asks for it once per tensor, and it takes 20 ms.
    gguf.get_tensor_name_map = cache(gguf.get_tensor_name_map)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        file, other = default_cache() / "smollm2-135m-instruct-gguf" / "model.gguf", scratch / "k"
        yield from measure_file("Q4_1", file, scratch, args)
        other = other.with_suffix(".gguf")
        in_q4_k(file, other)
        yield from measure_file("Q4_K", other, scratch, args)
        yield from measure_large(scratch, args)
    yield from simulate(args.simulated)


def main(options: list[str] | None = None) -> None:
    """Measure, write the result, print it."""
    parser = new_parser(__doc__, is_timed=True)
    add = parser.add_argument
    add("--tokens", nargs="+", type=at_least_1, default=list(TOKENS), metavar="N")
    add("--large", nargs=6, type=at_least_1, default=LARGE, metavar="SIZE", help="of the large one")
    add("--simulated", default="llama3-8b", help="model whose memory is simulated")
    add("--steps", type=at_least_1, default=10, help="of the large one")
    add("--seconds", type=float, default=30.0, help="time for each setting, warm-up excluded")
    add("--min-rounds", type=at_least_1, default=5, help="rounds at the least")
    add("--warmup", type=int, default=1, help="rounds before, not counted")
    for name, kind in {"child": str, "file": Path, "copy": Path, "level": int}.items():
        add(f"--{name}", type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args(options)
    if args.child:
        child(args)
        return
    how = (
        "bfloat16, a row of tokens per step, lean level 1 (the large one and what is simulated: "
        "level 2); medians of whole steps, all methods alternating in one run"
    )
    record("packed_memory", how, lambda: list(measure(args)), args, options, METHODS)


if __name__ == "__main__":
    sys.exit(main())
