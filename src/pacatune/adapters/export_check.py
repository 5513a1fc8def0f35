"""Load an exported LoRA adapter as a stranger would: in a new process, with PEFT alone."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pacatune.adapters.attach import attach
from pacatune.adapters.base import load_base, load_tokenizer
from pacatune.adapters.folder import Adapter, LoraAdapter
from pacatune.adapters.probe import OutputError, output_error, probe_inputs, run_probe
from pacatune.adapters.quantized import quantization_config
from pacatune.tuner.quantized_base import Quantization

# Two processes, perhaps on two devices, sum in another order.
_ARITHMETIC = 1e-4
_FACTOR = 4
_SCRIPT = Path(__file__).with_name("plain_peft.py")


def compare_with_plain_peft(
    base: str,
    adapter: Adapter | LoraAdapter,
    lora_folder: Path,
    dtype: str,
    device: str = "cpu",
    allow_other_base: bool = False,
) -> tuple[OutputError, float]:
    """Compare the outputs of a LoRA adapter in plain PEFT with those of its original.

    Both run in float32, on the inputs of `probe_inputs` and on the base that the adapter was
    trained on: quantised, where that can be repeated.

    Args:
        base: Folder or hub id of the base.
        adapter: The PaCA or MosLoRA adapter.
        lora_folder: The LoRA adapter's folder.
        dtype: Of the exported tensors; decides how much rounding is expected.
        device: Where that one runs; the new process uses the CPU.
        allow_other_base: As for `check_base`.

    Returns:
        The difference, and the largest absolute one that was allowed: float32's own of the outputs,
        and the rounding of the factors of what the adapter changes, but no more than half of that.

    Raises:
        ValueError: If plain PEFT cannot load the folder, or its outputs differ by more.
    """
    quantization = _repeatable(adapter)
    model = load_base(
        base,
        task_type=adapter.config.task_type,
        dtype="float32",
        device=device,
        quantization=quantization,
    )
    model_class = type(model).__name__
    inputs = probe_inputs(model, load_tokenizer(base))
    plain = run_probe(model, inputs)
    peft_model, _ = attach(model, adapter, allow_other_base=allow_other_base)
    reference = run_probe(peft_model, inputs)
    del model, peft_model  # the other process needs the memory for its own copy
    outputs = _run_plain_peft(base, model_class, lora_folder, inputs, quantization)
    error = output_error(reference, outputs)
    limit = export_limit(reference, output_error(plain, reference).max_absolute, dtype)
    # Written so that NaN fails.
    if not error.max_absolute <= limit:
        fix = (
            "Another package may have changed PEFT."
            if dtype == "float32"
            else "Export in more bits: `dtype`=float32 (--dtype float32)."
        )
        raise ValueError(
            f"in plain PEFT the outputs differ from the adapter's by {error.max_absolute:.1e} "
            f"({error.max_relative:.1e} of their size), and rounding to {dtype} explains "
            f"{limit:.1e} at most; nothing was written. {fix}"
        )
    return error, limit


def export_limit(reference: list[Tensor], effect: float, dtype: str) -> float:
    """Return the largest absolute difference that rounding explains.

    Args:
        reference: Outputs of the adapter.
        effect: Largest absolute change of the outputs by the adapter.
        dtype: The exported tensors' dtype.
    """
    size = max(float(outputs.abs().max()) for outputs in reference)
    limit = _ARITHMETIC * size + _FACTOR * torch.finfo(getattr(torch, dtype)).eps * effect
    return min(limit, effect / 2) if effect else limit


def _repeatable(adapter: Adapter | LoraAdapter) -> Quantization | None:
    """Return how to quantise the base; None where the adapter is as right on a plain one."""
    if isinstance(adapter, LoraAdapter) or adapter.config.base_quantization is None:
        return None
    quantization = adapter.config.base_quantization
    try:
        quantization_config(quantization, torch.float32)
    except ValueError:
        if adapter.config.columns_from == "original":
            raise
        return None
    return quantization


def _run_plain_peft(
    base: str,
    model_class: str,
    lora_folder: Path,
    inputs: list[dict[str, Tensor]],
    quantization: Quantization | None = None,
) -> list[Tensor]:
    with tempfile.TemporaryDirectory() as scratch:
        for number, batch in enumerate(inputs):
            save_file(batch, Path(scratch) / f"input-{number}.safetensors")
        job = {
            "base": base,
            "model_class": model_class,
            "adapter": str(lora_folder.absolute()),
            "scratch": scratch,
            "num_batches": len(inputs),
            "quantization": quantization
            and quantization_config(quantization, torch.float32).to_dict(),
        }
        # -P: otherwise the script's own folder comes first, and its inspect.py hides Python's.
        command = [sys.executable, "-P", str(_SCRIPT), json.dumps(job)]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        if finished.returncode != 0:
            last_line = (finished.stderr.strip().splitlines() or ["no message"])[-1]
            raise ValueError(
                f"plain PEFT cannot load the exported adapter ({last_line}); nothing was written. "
                "If memory ran out, go without: `verify=False`."
            )
        outputs = load_file(Path(scratch) / "outputs.safetensors")
    return [outputs[str(number)] for number in range(len(inputs))]
