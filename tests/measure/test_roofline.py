"""Step times from kernels and rates: by hand for a few kernels, and for a small model's step."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from pacatune.measure.kernels import Kernel, KernelCounter, Operand, branches_of_gpu
from pacatune.measure.roofline import GPU_RATES, estimate_time, rates_of, time_of
from pacatune.measure.simulate import FakeTraining
from tests.measure.real_step import loss_of, real_model, tiny

H100 = GPU_RATES["h100"]
# 2.55 GB in the first micro-batch, which a step makes once.
MOVED = (Operand(10**9, 2),), (Operand(275 * 10**6, 2),)
ADD = Kernel("add", "elementwise", "first micro-batch", 1, 0, *MOVED, 0)
PRODUCT = replace(ADD, name="mm", kind="gemm", flops=69 * 10**12, smallest_side=4096)


def test_a_kernel_is_bound_by_memory_operations_or_its_launch():
    step = time_of([ADD], H100)
    assert step.ms == pytest.approx(1.0)  # 2.55 GB at 2.55 TB/s
    assert step.gigabytes == pytest.approx(2.55)
    assert (step.low_ms, step.high_ms) == (step.ms, step.ms)
    step = time_of([PRODUCT], H100)
    assert (step.ms, step.tflop) == (pytest.approx(100.0), 69.0)
    assert step.low_ms == pytest.approx(69 / 0.73)
    assert step.high_ms == pytest.approx(69 / 0.65)
    assert step.by_kind_ms["large products"] == step.ms
    float32 = replace(PRODUCT, reads=(Operand(10**6, 4),))
    assert time_of([float32], H100).ms == pytest.approx(69 / 0.05)
    thin = time_of([replace(PRODUCT, flops=10**9, smallest_side=8)], H100)
    assert thin.by_kind_ms["thin products"] == pytest.approx(2.55 / 1.8)
    small = replace(ADD, reads=(Operand(8, 2),), writes=(Operand(8, 2),), launches=2)
    step = time_of([small] * 10, H100)
    assert (step.ms, step.num_launches) == (pytest.approx(0.060), 20)
    assert step.launch_ms == pytest.approx(0.060, rel=1e-4)


def test_accumulation_repeats_the_later_micro_batch():
    kernels = [ADD, replace(ADD, phase="micro-batch"), replace(ADD, phase="optimizer")]
    assert time_of(kernels, H100).ms == pytest.approx(2.0)
    assert time_of(kernels, H100, num_micro_batches=4).ms == pytest.approx(5.0)


def test_unknown_rates_and_several_devices_are_refused(tmp_path):
    assert rates_of("A100-80G") is GPU_RATES["a100-80g"]
    message = r"rates of GPU 'h10' are not known; did you mean 'h100'\? Step times can be .* h100,"
    with pytest.raises(ValueError, match=message):
        rates_of("h10")
    setting = tiny(tmp_path, sharding="fsdp2", num_gpus=2)
    with pytest.raises(ValueError, match=r"`sharding` \('fsdp2'\): communication is not modelled"):
        estimate_time(setting, "h100")


def test_operations_are_those_that_bench_counts_and_columns_are_written_once(tmp_path):
    """All but attention's, of which the GPU's kernel leaves out what is masked."""
    setting = tiny(tmp_path)
    training = FakeTraining(setting)
    size = setting.batch_size, setting.seq_len
    kernels = training.count_kernels(*size)
    flops = Counter()
    for kernel in kernels:
        flops[kernel.kind] += kernel.flops * (kernel.phase == "micro-batch")
    counted = sum(training.count_operations(*size).values())
    assert flops["gemm"] + 2 * flops["attention"] == pytest.approx(counted, rel=0.02)
    phases = [k.phase for k in kernels if k.name == "index_copy_"]
    assert phases == ["first micro-batch"] * 14


@pytest.mark.parametrize("method", ["paca", "lora", "dora", "full"])
def test_a_real_model_runs_the_same_kernels(tmp_path, method):
    """Once it has its columns written and its gradients made."""
    setting = tiny(tmp_path, method=method, lean="off", loss="logits")
    simulated = FakeTraining(setting).count_kernels(setting.batch_size, setting.seq_len)
    model, counter = real_model(setting), KernelCounter()
    ids = torch.zeros(setting.batch_size, setting.seq_len, dtype=torch.int64)
    with branches_of_gpu(counter), counter:
        for counter.phase in ("first micro-batch", "micro-batch"):
            loss_of(model, setting, ids).backward()
    real, fake = (
        Counter(kernel.name for kernel in kernels if kernel.phase == "micro-batch")
        for kernels in (counter.kernels, simulated)
    )
    assert real == fake
