"""What is promised of a GPU, held to on one: by tools/gpu_check.py, and by the tests marked `gpu`.

Each check takes the device, and returns what it has found; a promise that is not kept is a
`BrokenPromise`. On a CPU the checks run as well, as far as there is something to check: the result
says what stood in for what.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

from benchmarks import kernels
from benchmarks.methods import OURS, make_contender
from benchmarks.results import read
from pacatune import lean
from pacatune.measure.estimate import estimate_memory
from pacatune.measure.methods import Contender
from pacatune.measure.models import (
    checkpoint_blocks,
    llama_values,
    load_values,
    loss_of,
    loss_of_graph,
    make_batch,
)
from pacatune.measure.setting import BenchConfig, MicroBatch, Setting
from pacatune.measure.step import count as measure
from pacatune.ops.columns import adapted_columns, read_columns
from pacatune.residency.put import can_exchange
from pacatune.tuner.layer import PacaLayer

ROOT = Path(__file__).resolve().parents[1]
SMALL = llama_values(64, 2, num_heads=4, num_kv_heads=2, intermediate_size=96, vocab_size=128)
SEED, NUM_STEPS, NUM_TOKENS = 0, 4, 128

Found = dict[str, Any]


class BrokenPromise(AssertionError):
    """What was found is not what is promised."""


def hold(is_kept: bool, message: str) -> None:
    """Refuse a promise that is not kept."""
    if not is_kept:
        raise BrokenPromise(message)


def free(device: torch.device) -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _contender(
    device: torch.device,
    dtype: torch.dtype,
    method: str = OURS,
    values: dict[str, Any] = SMALL,
) -> Contender:
    return make_contender(method, values, dtype, SEED, device)


def _batch(device: torch.device, seed: int = SEED) -> Tensor:
    return make_batch(1, NUM_TOKENS, SMALL["vocab_size"], seed).to(device)


def _step(
    contender: Contender, batch: Tensor, loss_of: Callable[[nn.Module, Tensor], Tensor] = loss_of
) -> Tensor:
    loss = loss_of(contender.model, batch)
    loss.backward()
    if contender.optimizer is not None:
        contender.optimizer.step()
        contender.optimizer.zero_grad()
    return loss.detach()


def _layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, PacaLayer)]


def _frozen(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters() if not p.requires_grad]


_TRY = """
import itertools, sys, torch
from pacatune.residency import put
for pair in itertools.product(put._DTYPES, put._DTYPES):
    put._try(torch.device(sys.argv[1]), *pair)
"""


def check_kernel(device: torch.device) -> Found:
    """Launch the kernel of the columns by the Triton that is installed, and by those in .cache."""
    folders = [path.parent for path in sorted(ROOT.glob(".cache/triton/*/installed"))]
    if device.type != "cuda":
        return {"by": "nothing: Triton has no GPU; tests/residency/test_put_apart.py compiles it"}
    for folder in (None, *folders):
        flaw = flaw_of_kernel(device, folder)
        hold(not flaw, f"the kernel of {folder or 'the installed Triton'} fails: {flaw}")
    return {"by": "a launch", "versions": ["installed", *(folder.name for folder in folders)]}


def flaw_of_kernel(device: torch.device, folder: Path | None) -> str:
    """Return why Triton, that of a folder or the installed one, does not do what torch does."""
    paths = map(str, filter(None, (folder, ROOT / "src", os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", _TRY, str(device)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    return "" if done.returncode == 0 else done.stderr.strip().rpartition("\n")[2]


_BAD_COLUMNS = {
    "out of range": (0, 1, 2, 10**6),
    "negative": (-1, 1, 2, 3),
    "doubled": (0, 1, 1, 2),
    "unsorted": (3, 2, 1, 0),
}


def check_bad_columns(device: torch.device) -> Found:
    """Train with columns that no weight has, put past every check of files: nothing is written."""
    for name, start in _BAD_COLUMNS.items():
        contender = _contender(device, torch.float32)
        before, layer = _frozen(contender.model), _layers(contender.model)[0]
        (indices,) = layer.paca_indices.values()
        indices[: len(start)] = torch.tensor(start, device=device)
        is_refused = False
        try:
            _step(contender, _batch(device))
        except ValueError as error:
            is_refused = "column numbers must be" in str(error)
        hold(is_refused, f"columns that are {name} are not refused")
        pairs = zip(_frozen(contender.model), before, strict=True)
        hold(all(torch.equal(*pair) for pair in pairs), f"{name} columns have changed a weight")
    return {"refused": list(_BAD_COLUMNS)}


def check_default_device(device: torch.device) -> Found:
    """Train with lean activations while another device is the default one."""
    other = torch.device(_stand_in(device, "cuda", "meta"))
    losses = []
    for default in (torch.device("cpu"), other):
        contender, batch = _contender(device, torch.float32), _batch(device)
        with default:
            lean.enable(contender.model, mode="require")
            losses.append([_step(contender, batch).item() for _ in range(NUM_STEPS)])
    far = _distance(*losses)
    hold(far <= 1e-4, f"with {other} as the default device, losses are {far:.1e} away")
    return {"by": str(other), "error_of_losses": far}


def check_generation(device: torch.device) -> Found:
    """Generate between steps with gradient checkpointing: the columns are in the weights."""
    contender, batch = _contender(device, torch.float32), _batch(device)
    model: Any = contender.model
    checkpoint_blocks(model)
    _step_elsewhere(contender, batch)
    seen: list[bool] = []
    for layer in _layers(model):
        layer.register_forward_hook(
            lambda layer, *args: seen.append(layer.residency.holds(layer._single_update()))
        )
    model.eval()
    model.generate(batch[:, :8], max_new_tokens=2, do_sample=False, pad_token_id=0)
    hold(bool(seen) and all(seen), "`generate` between steps adds the columns' product")
    return {"num_passes": len(seen), "by": _stand_in(device, "autograd's thread", "a thread")}


def _step_elsewhere(contender: Contender, batch: Tensor) -> None:
    """Train a step; on a CPU its backward has a thread of its own, as on a GPU it always has."""
    loss = loss_of(contender.model, batch)
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert contender.optimizer is not None
    contender.optimizer.step()
    contender.optimizer.zero_grad()


# Relative to the largest value; eager and reference round in another order.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def check_gradients(device: torch.device) -> Found:
    """Compare PaCA with plain autograd: losses of some steps, gradients of the last."""
    found: Found = {}
    for dtype, tolerance in _TOLERANCE.items():
        methods = (OURS, "additive")
        ours, plain = (_contender(device, dtype, method) for method in methods)
        batches = [_batch(device, seed) for seed in range(NUM_STEPS)]
        losses = [[_step(each, batch).item() for batch in batches] for each in (ours, plain)]
        for each in (ours, plain):
            loss_of(each.model, batches[0]).backward()
        gradients = [
            [cast(Tensor, p.grad) for p in each.model.parameters() if p.requires_grad]
            for each in (ours, plain)
        ]
        error = max(_error(*pair) for pair in zip(*gradients, strict=True))
        far = _distance(*losses)
        name = str(dtype).removeprefix("torch.")
        found[name] = {"error_of_gradients": error, "error_of_losses": far}
        hold(
            max(error, far) <= tolerance,
            f"{name}: PaCA is {error:.1e} (gradients) and {far:.1e} (losses) from plain autograd, "
            f"at most {tolerance:.0e} allowed",
        )
    return found


def _distance(losses: Sequence[float], expected: Sequence[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True))


def _error(found: Tensor, expected: Tensor) -> float:
    scale = expected.abs().max().clamp_min(1e-12)
    return float((found - expected).abs().max() / scale)


def check_columns(device: torch.device) -> Found:
    """Compare the columns that stand in the weights, and the base after a look, bit by bit."""
    num_columns = 0
    for dtype in (torch.float32, torch.bfloat16):
        contender = _contender(device, dtype)
        before, batch = _frozen(contender.model), _batch(device)
        for _ in range(NUM_STEPS):
            _step(contender, batch)
        loss_of(contender.model, batch).backward()
        for layer in _layers(contender.model):
            kept = layer.residency.present
            hold(kept is not None, f"{dtype}: a layer's columns are not in its weight")
            delta, indices, scaling = layer._single_update()
            expected = adapted_columns(kept.originals, delta.detach(), scaling)
            if device.type == "cuda":
                hold(can_exchange(kept.memory, delta), f"{dtype}: the columns are no one launch")
            there = read_columns(kept.memory, indices)
            hold(torch.equal(there, expected), f"{dtype}: columns in a weight have other bits")
            num_columns += indices.numel()
        after = _frozen(contender.model)
        same = all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
        hold(same, f"{dtype}: the base is not bit-identical after a look")
    return {"num_columns": num_columns, "is_base_identical": True}


# What a GPU would be waited for.
_READS = frozenset(["_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_dim"])


class Reads(TorchDispatchMode):
    """Finds where the host reads what a device computes, on any device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name.rpartition("::")[2]
        masks = (x for x in (args[1] if name == "index" else ()) if x is not None)
        if name in _READS or any(mask.dtype in (torch.bool, torch.uint8) for mask in masks):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def check_synchronisation(device: torch.device) -> Found:
    """Run training steps in which nothing may wait for the device: columns are written in them.

    transformers looks at the positions of the tokens in each forward pass, which is left out.
    """
    reads, batch = Reads(), _batch(device)
    contender = _contender(device, torch.bfloat16)
    for _ in range(2):
        _step(contender, batch)
    with _rows_of_one_sequence(), reads, ExitStack() as stack:
        if device.type == "cuda":
            stack.callback(torch.cuda.set_sync_debug_mode, torch.cuda.get_sync_debug_mode())
            torch.cuda.set_sync_debug_mode("error")
        for _ in range(2):
            _step(contender, batch)
            cast(Any, contender.model).zero_grad()  # a look at the base
    hold(not reads.names, f"a training step waits for the device in {', '.join(reads.names)}")
    return {"num_reads": 0, "by": _stand_in(device, "set_sync_debug_mode", "a dispatch mode")}


def _rows_of_one_sequence() -> Any:
    """Let transformers look for no others, as it does at the values of positions."""
    return patch.object(masking_utils, "find_packed_sequence_indices", lambda ids: None)


def _stand_in(device: torch.device, on_gpu: str, on_cpu: str) -> str:
    return on_gpu if device.type == "cuda" else on_cpu


def check_capture(device: torch.device) -> Found:
    """Capture a pass in a CUDA graph: additive and right."""
    if device.type != "cuda":
        return {"by": "nothing: there is no graph; tests/residency/test_traced.py acts as if"}
    contender, batch = _contender(device, torch.float32), _batch(device)
    plain = _contender(device, torch.float32, "additive")
    with _rows_of_one_sequence():
        # Allocations and handles of libraries come before the capture, without a step.
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            for _ in range(2):
                loss_of(contender.model, batch).backward()
        torch.cuda.current_stream(device).wait_stream(stream)
        cast(Any, contender.model).zero_grad()
        for layer in _layers(contender.model):
            layer.residency.was_written = False  # of the unchanged columns, before the capture
        with torch.cuda.graph(graph):
            loss = loss_of(contender.model, batch)
            loss.backward()
    ours = []
    for _ in range(3):
        graph.replay()
        ours.append(loss.item())
        assert contender.optimizer is not None
        contender.optimizer.step()  # the gradients are the graph's own memory, and stay
    written = any(layer.residency.was_written for layer in _layers(contender.model))
    hold(not written, "columns were written under a CUDA graph, which reads the memory later")
    theirs = [_step(plain, batch).item() for _ in range(3)]
    far = _distance(ours, theirs)
    hold(far <= 1e-4, f"the losses of a captured pass are {far:.1e} from plain autograd's")
    return {"by": "torch.cuda.graph", "error_of_losses": far}


def check_kernels(device: torch.device, methods: Iterable[str] = kernels.HELD) -> Found:
    """Count the kernels of a layer by the profiler, beside those counted without a GPU."""
    methods, is_gpu = tuple(methods), device.type == "cuda"
    count = _profiled if is_gpu else kernels.count_steps
    rows = [
        row
        for method in methods
        for row in kernels.rows_of(
            "eager", method, kernels.count_layer(method, device=device, count=count)
        )
    ]
    # What a profiler tells of the other counts is not promised.
    names = ("forward", "backward", "write of columns in all") if is_gpu else ()
    problems = kernels.exceeded(rows, names)
    hold(not problems, "; ".join(problems))
    counted = [r for r in read("kernels").rows if r.method in methods and r.setting == "eager"]
    return {
        "by": _stand_in(device, "torch.profiler", "a dispatch mode"),
        "rows": [row.to_dict() for row in rows],
        "counted": [row.to_dict() for row in counted],
    }


# Sums of a split product are part of it; what comes and goes to the host is no kernel.
_NO_LAUNCHES = ("splitkreduce", "memset", "htod", "dtoh")


def _profiled(contender: Contender) -> dict[str, int]:
    """Return the kernels of each phase."""
    device = next(contender.model.parameters()).device
    batch = make_batch(1, NUM_TOKENS, kernels.LAYER["vocab_size"], SEED).to(device)
    for _ in range(2):
        _step(contender, batch)
    counts: dict[str, int] = {}
    for phase, run in kernels.passes(contender, batch):
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            run()
            torch.cuda.synchronize(device)
        events = profiler.key_averages()
        counts[phase] = sum(
            event.count
            for event in events
            if event.device_type == torch.autograd.DeviceType.CUDA
            and not any(word in event.key.lower() for word in _NO_LAUNCHES)
        )
    return counts


MAX_ERROR_OF_MEMORY = 0.03


def check_memory(
    device: torch.device,
    methods: Iterable[str] = (OURS, "lora"),
    model: str | None = None,
    seq_len: int = NUM_TOKENS,
) -> Found:
    """Compare the peak of training steps with the estimate; on a CPU, it is only shown."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        if model is None:
            model = str(Path(folder) / "config.json")
            Path(model).write_text(json.dumps(SMALL), encoding="utf-8")
        for method in methods:
            setting = Setting(model=model, method=method, seq_len=seq_len, lean="off")
            expected, peak = estimate_memory(setting).peak_bytes, _peak(device, setting)
            found = {"estimated_bytes": expected, "peak_bytes": peak, "ratio": peak / expected}
            rows.append({"method": method, **found})
    if device.type == "cuda":
        _hold_memory(rows)
    return {"rows": rows}


def _hold_memory(rows: Iterable[Found]) -> None:
    for row in rows:
        hold(
            abs(row["ratio"] - 1) <= MAX_ERROR_OF_MEMORY,
            f"{row['method']}: the peak is {row['ratio']:.3f} of the estimate, at most "
            f"{MAX_ERROR_OF_MEMORY} from 1 promised",
        )


def _peak(device: torch.device, setting: Setting) -> float:
    free(device)
    config = BenchConfig(
        values=load_values(setting.model),
        title=setting.model,
        dtype="bfloat16",
        adapter_dtype="float32",
        rank=setting.rank,
        device=str(device),
    )
    batch = MicroBatch(num_rows=setting.batch_size, num_tokens=setting.seq_len)
    return next(row.value for row in measure(config, batch, setting.method) if row.what == "peak")


def backend_on(device: torch.device) -> str:
    """Return what graphs are compiled by: on a CPU, where that takes long, they run as they are."""
    return _stand_in(device, "inductor", "eager")


def check_compiled(device: torch.device) -> Found:
    """Compile a model: one graph for all steps, with the losses of eager mode."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    graphs = CompileCounterWithBackend(backend_on(device))
    values = SMALL | {"num_hidden_layers": 1}
    eager, compiled = (_contender(device, torch.float32, values=values) for _ in range(2))
    compiled.model.compile(dynamic=False, backend=graphs)
    pairs, batch = ((compiled, loss_of_graph), (eager, loss_of)), _batch(device)
    losses = [[_step(one, batch, loss).item() for _ in range(3)] for one, loss in pairs]
    torch.compiler.reset()
    hold(graphs.frame_count == 1, f"PaCA is compiled in {graphs.frame_count} graphs, 1 promised")
    far = _distance(*losses)
    hold(far <= 1e-3, f"compiled losses are {far:.1e} from eager ones")
    return {"backend": backend_on(device), "num_graphs": 1, "error_of_losses": far}


_PYTHON_OPERATORS = ("linear", "linear_grad", "experts_products", "experts_grad_delta")


def check_reduce_overhead(device: torch.device) -> Found:
    """Train a model that is compiled with CUDA graphs; they leave our operators out."""
    operators = [getattr(torch.ops.pacatune, name).default for name in _PYTHON_OPERATORS]
    tag = getattr(torch.Tag, "cudagraph_unsafe", None)
    hold(
        tag is None or all(tag in operator.tags for operator in operators),
        "CUDA graphs may record an operator that runs Python",
    )
    if device.type != "cuda":
        return {"by": "the tags of operators"}
    torch.compiler.reset()
    values = SMALL | {"num_hidden_layers": 1}
    eager, compiled = (_contender(device, torch.float32, values=values) for _ in range(2))
    compiled.model.compile(dynamic=False, mode="reduce-overhead")
    pairs, batch = ((compiled, loss_of_graph), (eager, loss_of)), _batch(device)
    losses = [[_step(one, batch, loss).item() for _ in range(NUM_STEPS)] for one, loss in pairs]
    torch.compiler.reset()
    far = _distance(*losses)
    hold(far <= 1e-3, f"losses with CUDA graphs are {far:.1e} from eager ones")
    return {"by": "torch.compile", "error_of_losses": far}


def check_fsdp2(device: torch.device) -> Found:
    """Shard a model over one process: the adapter and the base become what they are without."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    plain, sharded = (_contender(device, torch.float32) for _ in range(2))
    batch, before = _batch(device), _frozen(plain.model)
    backend = _stand_in(device, "nccl", "gloo")
    distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    try:
        model: Any = sharded.model
        mesh = init_device_mesh(device.type, (1,))
        for block in model.get_base_model().model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        trained = [p for p in model.parameters() if p.requires_grad]
        sharded = replace(sharded, optimizer=torch.optim.AdamW(trained, lr=1e-4))
        losses = [[_step(each, batch).item() for _ in range(3)] for each in (plain, sharded)]
        shards = [cast(Any, p).full_tensor() for p in model.parameters() if not p.requires_grad]
        pairs = zip(shards, before, strict=True)
        hold(all(torch.equal(*pair) for pair in pairs), "FSDP2: the base is not bit-identical")
        far = _distance(*losses)
        hold(far <= 1e-5, f"FSDP2: losses are {far:.1e} from those of one process")
    finally:
        distributed.destroy_process_group()
    return {"error_of_losses": far, "is_base_identical": True}
