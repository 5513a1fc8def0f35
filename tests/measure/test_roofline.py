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
ADD = Kernel(
    "add", "elementwise", "micro-batch", 1, 0, (Operand(10**9, 2),), (Operand(275 * 10**6, 2),), 0
)
PRODUCT = replace(ADD, name="mm", kind="gemm", flops=69 * 10**12, smallest_side=4096)


def first(kernel):
    return replace(kernel, phase="first micro-batch")


def test_elementwise_kernels_are_bound_by_memory():
    step = time_of([first(ADD)], H100)
    assert step.ms == pytest.approx(1.0)  # 2.55 GB at 2.55 TB/s
    assert step.gigabytes == pytest.approx(2.55)
    assert (step.low_ms, step.high_ms) == (step.ms, step.ms)


def test_large_products_are_bound_by_operations():
    step = time_of([first(PRODUCT)], H100)
    assert step.ms == pytest.approx(100.0)
    assert step.low_ms == pytest.approx(69 / 0.73)
    assert step.high_ms == pytest.approx(69 / 0.65)
    assert step.by_kind_ms["large products"] == step.ms
    assert step.tflop == 69.0


def test_products_of_float32_are_slower():
    wide = replace(PRODUCT, reads=(Operand(10**6, 4),))
    assert time_of([first(wide)], H100).ms == pytest.approx(69 / 0.05)


def test_thin_products_are_bound_by_memory():
    thin = replace(first(PRODUCT), flops=10**9, smallest_side=8)
    step = time_of([thin], H100)
    assert step.by_kind_ms["thin products"] == pytest.approx(2.55 / 1.8)


def test_small_kernels_take_the_time_of_a_launch():
    small = replace(first(ADD), reads=(Operand(8, 2),), writes=(Operand(8, 2),), launches=2)
    step = time_of([small] * 10, H100)
    assert step.ms == pytest.approx(0.060)
    assert step.launch_ms == pytest.approx(0.060, rel=1e-4)
    assert step.num_launches == 20


def test_accumulation_repeats_the_later_micro_batch():
    kernels = [first(ADD), ADD, replace(ADD, phase="optimizer")]
    assert time_of(kernels, H100).ms == pytest.approx(2.0)
    assert time_of(kernels, H100, num_micro_batches=4).ms == pytest.approx(5.0)


def test_unknown_rates_are_refused():
    assert rates_of("A100-80G") is GPU_RATES["a100-80g"]
    message = r"rates of GPU 'h10' are not known; did you mean 'h100'\? Step times can be .* h100,"
    with pytest.raises(ValueError, match=message):
        rates_of("h10")


def test_several_devices_are_refused(tmp_path):
    setting = tiny(tmp_path, sharding="fsdp2", num_gpus=2)
    with pytest.raises(ValueError, match=r"`sharding` \('fsdp2'\): communication is not modelled"):
        estimate_time(setting, "h100")


def test_a_step_of_a_small_model(tmp_path):
    """LoRA launches more than PaCA; the rates of another GPU change times, not counts."""
    steps = {
        method: estimate_time(tiny(tmp_path, method=method), "h100") for method in ("paca", "lora")
    }
    assert steps["paca"].num_launches < steps["lora"].num_launches
    assert steps["paca"].ms < steps["lora"].ms
    assert "eager PyTorch cannot keep" in steps["paca"].notes[0]
    slower = estimate_time(tiny(tmp_path), "a100-80g")
    assert slower.num_launches == steps["paca"].num_launches
    values = slower.to_values()
    assert values["origin"] == "roofline"
    assert "not a measurement" in values["model"]


def test_operations_are_those_that_bench_counts(tmp_path):
    """All but attention's, of which the GPU's kernel leaves out what is masked."""
    setting = tiny(tmp_path)
    training = FakeTraining(setting)
    size = setting.batch_size, setting.seq_len
    kernels = training.count_kernels(*size)
    products = sum(k.flops for k in kernels if k.phase == "micro-batch" and k.kind == "gemm")
    counted = sum(training.count_operations(*size).values())
    attention = 2 * sum(
        k.flops for k in kernels if k.phase == "micro-batch" and k.kind == "attention"
    )
    assert products + attention == pytest.approx(counted, rel=0.02)


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


def test_columns_are_written_in_the_first_micro_batch_only(tmp_path):
    kernels = FakeTraining(tiny(tmp_path)).count_kernels(1, 8)
    phases = [k.phase for k in kernels if k.name == "index_copy_"]
    assert phases == ["first micro-batch"] * 14
