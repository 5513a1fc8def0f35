"""What is promised of a GPU. What stands in for one on a CPU is tested in tests/residency."""

import os
import subprocess
import sys
import threading
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from peft import get_peft_model
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, masking_utils

from benchmarks import kernels
from benchmarks.methods import OURS, make_contender
from benchmarks.models import llama_values, loss_of, loss_of_graph, make_batch
from pacatune import PacaConfig, lean
from pacatune.grid import decoding
from pacatune.grid.formats import GRIDS
from pacatune.lean import fused
from pacatune.measure.estimate import estimate_memory
from pacatune.measure.models import checkpoint_blocks, load_config
from pacatune.measure.setting import Setting
from pacatune.ops.columns import read_columns, with_columns
from pacatune.ops.products import grad_delta
from pacatune.pretrained import load_packed, load_weights
from pacatune.residency.put import can_exchange
from pacatune.tuner.layer import PacaLayer
from tests.conftest import build_model
from tests.reads import Reads

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]
SMALL = llama_values(64, 2, num_heads=4, num_kv_heads=2, intermediate_size=96, vocab_size=128)


def contender_of(device, dtype=torch.float32, method=OURS, **values):
    return make_contender(method, SMALL | values, dtype, 0, device)


def tokens(device, seed=0):
    return make_batch(1, 128, SMALL["vocab_size"], seed).to(device)


def step(contender, batch, loss_of=loss_of):
    loss = loss_of(contender.model, batch)
    loss.backward()
    contender.optimizer.step()
    contender.optimizer.zero_grad()
    return loss.item()


def losses(contender, batch, loss_of=loss_of):
    return [step(contender, batch, loss_of) for _ in range(4)]


def layers(model):
    return [module for module in model.modules() if isinstance(module, PacaLayer)]


def frozen(model):
    return [p.detach().clone() for p in model.parameters() if not p.requires_grad]


def assert_same(tensors, others):
    assert all(torch.equal(*pair) for pair in zip(tensors, others, strict=True))


def close(expected, tolerance=1e-4):
    return pytest.approx(expected, rel=tolerance)


_TRY = """
import itertools, torch, warnings
from pacatune.residency import put
warnings.warn = lambda message, stacklevel: print(message)
kinds = [(torch.device("cuda"), *pair) for pair in itertools.product(put._DTYPES, put._DTYPES)]
print(all([put._works(*kind) for kind in kinds]))
"""


def kernel_works(tmp_path, triton="", **variables):
    paths = filter(None, (triton, str(ROOT / "src"), os.environ.get("PYTHONPATH")))
    settings = {
        "PYTHONPATH": os.pathsep.join(paths),
        "TRITON_CACHE_DIR": str(tmp_path),
        **variables,
    }
    command, environment = [sys.executable, "-c", _TRY], {**os.environ, **settings}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_kernel_that_decodes_blocks_works(cuda):
    for name in GRIDS:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            decoding._try(cuda, name, dtype)


@pytest.mark.parametrize("kind", ["Q4_1", "Q6_K"])
def test_a_model_in_blocks_trains_as_dequantised(device, kind, tmp_path, tiny_tokenizer):
    pytest.importorskip("gguf")
    from tests.grid.files import write_gguf

    model = build_model(len(tiny_tokenizer), hidden_size=256, intermediate_size=256)
    others = {"token_embd": kind, "output.weight": kind}
    path = write_gguf(tmp_path / "base.gguf", model, tiny_tokenizer, kind, others)
    found = []
    for load in (load_weights, load_packed):
        base = load(AutoModelForCausalLM, str(path), dtype=torch.bfloat16).to(device)
        base.requires_grad_(False)
        model = get_peft_model(base, PacaConfig(r=4, random_seed=0, task_type="CAUSAL_LM")).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        ids = tokens(device) % len(tiny_tokenizer)
        of_steps = []
        for _ in range(4):
            with torch.autocast(device.type, torch.bfloat16):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            of_steps.append(loss.item())
        found.append(of_steps)
    assert found[1] == close(found[0])
    assert found[0][-1] < found[0][0]


@pytest.mark.parametrize(
    "triton", ["", *(str(path.parent) for path in ROOT.glob(".cache/triton/*/installed"))]
)
def test_the_kernel_of_the_columns_works_by_every_triton(cuda, tmp_path, triton):
    """By the installed one, and the oldest and newest that `make test` keeps."""
    assert kernel_works(tmp_path, triton) == "True\n"


def test_columns_are_written_one_by_one_without_a_compiler(cuda, tmp_path):
    said = kernel_works(tmp_path, CC="/bin/false", PATH="")
    assert "they are written layer by layer" in said
    assert said.endswith("False\n")


@pytest.mark.parametrize(
    "start", [(0, 1, 2, 10**6), (-1, 1, 2, 3), (0, 1, 1, 2), (3, 2, 1, 0)], ids=str
)
def test_columns_that_no_weight_has_are_refused(device, start):
    """Put past every check of files: a kernel would write somewhere."""
    contender = contender_of(device)
    before = frozen(contender.model)
    (indices,) = layers(contender.model)[0].paca_indices.values()
    indices[: len(start)] = torch.tensor(start, device=device)
    with pytest.raises(ValueError, match="column numbers must be"):
        step(contender, tokens(device))
    assert_same(frozen(contender.model), before)


def test_lean_activations_beside_another_default_device(device):
    both, failed = [], set(fused._failed)
    for default in ("cpu", "cuda" if device.type == "cuda" else "meta"):
        contender, batch = contender_of(device), tokens(device)
        with torch.device(default):
            lean.enable(contender.model, mode="require")
            both.append(losses(contender, batch))
    assert both[0] == close(both[1])
    assert fused._failed == failed  # kernels that could not be compiled


def test_generation_between_steps_with_checkpointing_reads_columns_in_the_weights(device):
    contender, batch = contender_of(device), tokens(device)
    model = contender.model
    checkpoint_blocks(model)
    loss = loss_of(model, batch)
    thread = threading.Thread(target=loss.backward)  # on a GPU it always has its own
    thread.start()
    thread.join()
    contender.optimizer.step()
    contender.optimizer.zero_grad()
    seen = []
    for layer in layers(model):
        layer.register_forward_hook(
            lambda layer, *args: seen.append(layer.residency.holds(layer._single_update()))
        )
    model.eval()
    model.generate(batch[:, :8], max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert seen
    assert all(seen)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_gradients_are_those_of_plain_autograd(device, dtype, error):
    both = [contender_of(device, dtype, method) for method in (OURS, "additive")]
    for seed in range(4):
        ours, plain = (step(contender, tokens(device, seed)) for contender in both)
        assert ours == close(plain, error)
    for contender in both:
        loss_of(contender.model, tokens(device)).backward()
    gradients = [[p.grad for p in c.model.parameters() if p.requires_grad] for c in both]
    for ours, plain in zip(*gradients, strict=True):
        assert (ours - plain).abs().max() <= error * plain.abs().max().clamp_min(1e-12)


@pytest.mark.parametrize("channels", [8, 48])
def test_gradients_of_low_rank_are_those_of_plain_autograd(device, channels):
    """By the gradient of their product, which is made for few columns, and by thin products."""
    base = torch.nn.Sequential(torch.nn.Linear(64, 40)).to(device)
    config = PacaConfig(r=8, paca_alpha=16, channels=channels, target_modules=["0"])
    model = get_peft_model(base, config)
    (layer,) = layers(model)
    x, gy = torch.randn(96, 64, device=device), torch.randn(96, 40, device=device)
    with torch.no_grad():
        layer._single_update().delta.normal_()
    model(x).backward(gy)
    ours = layer._single_update()
    delta, mix = (values.detach().clone().requires_grad_() for values in ours.trained())
    weight, bias = base[0].get_base_layer().weight.detach(), base[0].get_base_layer().bias
    columns = read_columns(weight, ours.indices) + ours.scaling * delta @ mix
    y = torch.nn.functional.linear(x, with_columns(weight, ours.indices, columns), bias)
    y.backward(gy)
    for found, plain in zip(ours.trained(), (delta, mix), strict=True):
        assert (found.grad - plain.grad).abs().max() <= 1e-4 * plain.grad.abs().max()


@pytest.mark.parametrize("method", [OURS, "channels"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_columns_are_in_the_weights_and_the_base_comes_back_bit_for_bit(device, dtype, method):
    contender, batch = contender_of(device, dtype, method), tokens(device)
    before = frozen(contender.model)
    losses(contender, batch)
    loss_of(contender.model, batch).backward()
    for layer in layers(contender.model):
        kept = layer.residency.present
        update = layer._single_update()
        there = read_columns(kept.memory, update.indices)
        assert torch.equal(there, update.adapted(kept.originals))
        is_one_launch = device.type == "cpu" or can_exchange(kept.memory, *update.trained())
        assert is_one_launch
    assert_same(frozen(contender.model), before)


def no_packed_rows():
    """transformers looks for sequences packed into one row, at the values of positions."""
    return patch.object(masking_utils, "find_packed_sequence_indices", lambda ids: None)


def test_a_training_step_does_not_wait_for_the_device(device):
    contender, batch, reads = contender_of(device, torch.bfloat16), tokens(device), Reads()

    def train():
        loss_of(contender.model, batch).backward()
        contender.optimizer.step()
        contender.optimizer.zero_grad()
        contender.model.zero_grad()  # a look at the base

    train()
    train()
    with no_packed_rows(), reads, ExitStack() as stack:
        if device.type == "cuda":
            stack.callback(torch.cuda.set_sync_debug_mode, torch.cuda.get_sync_debug_mode())
            torch.cuda.set_sync_debug_mode("error")
        train()
        train()
    assert not reads.names


def test_a_stream_of_its_own(cuda):
    contender, plain, batch = contender_of(cuda), contender_of(cuda), tokens(cuda)
    expected = losses(plain, batch)
    stream = torch.cuda.Stream(cuda)
    stream.wait_stream(torch.cuda.current_stream(cuda))
    with torch.cuda.stream(stream):
        assert losses(contender, batch) == close(expected)


def test_a_pass_in_a_cuda_graph_is_additive_and_right(cuda):
    contender, batch = contender_of(cuda), tokens(cuda)
    plain = contender_of(cuda, method="additive")
    stream, graph = torch.cuda.Stream(cuda), torch.cuda.CUDAGraph()
    with no_packed_rows():
        # Allocations and handles of libraries come before the capture, without a step.
        stream.wait_stream(torch.cuda.current_stream(cuda))
        with torch.cuda.stream(stream):
            for _ in range(2):
                loss_of(contender.model, batch).backward()
        torch.cuda.current_stream(cuda).wait_stream(stream)
        contender.model.zero_grad()
        for layer in layers(contender.model):
            layer.residency.was_written = False  # of the unchanged columns, before the capture
        with torch.cuda.graph(graph):
            loss = loss_of(contender.model, batch)
            loss.backward()
    for _ in range(3):
        graph.replay()
        assert loss.item() == close(step(plain, batch))
        contender.optimizer.step()  # the gradients are the graph's own memory, and stay
    assert not any(layer.residency.was_written for layer in layers(contender.model))


# Sums of a split product are part of it; what comes and goes to the host is no kernel.
_NO_LAUNCHES = ("splitkreduce", "memset", "htod", "dtoh")


def profiled(contender):
    device = next(contender.model.parameters()).device
    batch = make_batch(1, 128, kernels.LAYER["vocab_size"], 0).to(device)
    for _ in range(2):
        loss_of(contender.model, batch).backward()
    counts = {}
    for phase, run in kernels.passes(contender, batch):
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            run()
            torch.cuda.synchronize(device)
        counts[phase] = sum(
            event.count
            for event in profiler.key_averages()
            if event.device_type == torch.autograd.DeviceType.CUDA
            and not any(word in event.key.lower() for word in _NO_LAUNCHES)
        )
    return counts


def test_kernels_of_a_layer_are_no_more_than_promised(cuda, record_property):
    """By the profiler; benchmarks.kernels counts them without a GPU."""
    rows = []
    for method in (*kernels.HELD, "lora"):
        launches = kernels.count_layer(method, device=cuda, count=profiled)
        rows += kernels.rows_of("eager", method, launches)
    record_property("rows", [row.to_dict() for row in rows])
    names = ("forward", "backward", "write of columns in all")
    assert not kernels.exceeded(rows, names)


@pytest.mark.parametrize("method", [OURS, "lora"])
def test_the_peak_is_that_of_the_estimate(cuda, method, record_property):
    setting = Setting(model="llama3-8b", method=method, seq_len=2048, lean="off")
    values = load_config(setting.model).to_dict()
    values.pop("_name_or_path")
    contender = make_contender(
        method, values, torch.bfloat16, 0, cuda, rank=setting.rank, adapter_dtype=torch.float32
    )
    batch = make_batch(setting.batch_size, setting.seq_len, values["vocab_size"], 0).to(cuda)
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats(cuda)
        with torch.autocast("cuda", torch.bfloat16):
            loss = loss_of(contender.model, batch)
        loss.backward()
        contender.optimizer.step()
        contender.optimizer.zero_grad()
    peak, expected = torch.cuda.max_memory_allocated(cuda), estimate_memory(setting).peak_bytes
    record_property("rows", [{"peak_bytes": peak, "estimated_bytes": expected}])
    assert peak == close(expected, 0.03)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_a_compiled_model_is_one_graph_with_the_losses_of_eager_mode(device, mode):
    """CUDA graphs (`reduce-overhead`) leave our operators out."""
    from torch._dynamo.testing import CompileCounterWithBackend

    graphs = CompileCounterWithBackend("inductor" if device.type == "cuda" else "eager")
    eager, compiled = (contender_of(device, num_hidden_layers=1) for _ in range(2))
    if mode is None:
        compiled.model.compile(dynamic=False, backend=graphs)
    elif device.type == "cuda":
        compiled.model.compile(dynamic=False, mode=mode)
    batch = tokens(device)
    assert losses(compiled, batch, loss_of_graph) == close(losses(eager, batch), 1e-3)
    assert graphs.frame_count == (mode is None)


def test_fsdp2_writes_no_shard(device):
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    plain, sharded = contender_of(device), contender_of(device)
    model, batch, before = sharded.model, tokens(device), frozen(plain.model)
    backend = "nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh(device.type, (1,))
        for block in (*model.get_base_model().model.layers, model):
            fully_shard(block, mesh=mesh)
        trained = [p for p in model.parameters() if p.requires_grad]
        sharded = replace(sharded, optimizer=torch.optim.AdamW(trained, lr=1e-4))
        assert losses(sharded, batch) == close(losses(plain, batch), 1e-5)
        shards = [p.full_tensor() for p in model.parameters() if not p.requires_grad]
        assert_same(shards, before)
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("scaling", [1.0, 2.0])
def test_the_gradient_of_delta_is_one_kernel(cuda, scaling):
    gy, x = (torch.randn(256, n, device=cuda).to(torch.bfloat16) for n in (512, 16))
    grad_delta(gy, x, scaling, torch.float32)  # finds out what torch has
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        gradient = grad_delta(gy, x, scaling, torch.float32)
    exact = scaling * gy.double().t().mm(x.double())
    assert (gradient.double() - exact).abs().max() < 1e-5 * exact.abs().max()
    # split-K adds up its parts
    assert sum(event.count for event in profiler.key_averages()) <= 2


def test_mixed_precision_is_not_forced_onto_fp16(cuda):
    from pacatune.training import TrainingConfig

    assert TrainingConfig(fp16=True).resolved().bf16 is False


@pytest.mark.parametrize("grid", [GRIDS["Q4_1"], GRIDS["F8_E4M3"]], ids=lambda grid: grid.name)
def test_codes_are_searched_where_the_weight_is(device, grid):
    generator = torch.Generator().manual_seed(0)
    before = torch.randint(grid.num_codes, (64, 8), generator=generator).to(torch.uint8)
    scale = torch.rand(64, 8, generator=generator)
    change = 3 * scale * torch.randn(64, 8, generator=generator)
    here = grid.moved(before, scale, change)
    there = grid.moved(*(part.to(device) for part in (before, scale, change)))
    assert there.after.device.type == device.type
    assert torch.equal(there.after.cpu(), here.after)
    assert there.num_clipped.item() == here.num_clipped.item()
