"""Find the longest sequence of LLaMA3-8B that trains on one GPU, simulated.

    python -m benchmarks.lengths               writes benchmarks/results/lengths.json

One sequence per step, at each lean level, as `pacatune estimate --max seq-len`. Deterministic, and
needs no GPU: half an hour of one core.
"""

import sys
from collections.abc import Iterator
from typing import Any

from benchmarks.methods import RANK
from benchmarks.results import new_parser, record
from pacatune.measure.device import gpu_bytes
from pacatune.measure.estimate import find_max
from pacatune.measure.setting import Setting
from pacatune.reports.rows import Row

MODEL, GPU = "llama3-8b", "a100-80g"
COMPARED: dict[str, dict[str, Any]] = {
    "paca": {"method": "paca", "rank": RANK},
    "lora": {"method": "lora", "rank": RANK},
    "lora_bf16": {"method": "lora", "rank": RANK, "adapter_dtype": "bfloat16"},
}
"""Name of a method in the result -> its options."""
SETTINGS: dict[str, dict[str, Any]] = {
    "level 1": {"lean_level": 1},
    "level 2": {"lean_level": 2},
    "level 3": {"lean_level": 3},
    "level 1, checkpointed": {"lean_level": 1, "gradient_checkpointing": True},
    "level 2, checkpointed": {"lean_level": 2, "gradient_checkpointing": True},
    "level 2, offloaded": {"lean_level": 2, "activation_offloading": True},
}


def found() -> Iterator[Row]:
    """Yield the longest sequence of each method in each setting, and what it keeps per token."""
    for name, values in SETTINGS.items():
        for method, options in COMPARED.items():
            setting = Setting(model=MODEL, **options, **values)
            number, estimate = find_max(setting, "seq_len", gpu_bytes(GPU))
            names: dict[str, Any] = {"method": method, "setting": name, "origin": "simulated"}
            yield Row(what="longest sequence", value=number, unit="tokens", **names)
            if estimate is not None:
                kept = estimate.saved_bytes // number
                yield Row(what="kept per token", value=kept, unit="bytes", **names)


def main(options: list[str] | None = None) -> None:
    """Simulate and write the result."""
    args = new_parser(__doc__).parse_args(options)
    size = ", ".join(f"{name} {n}" for name, n in COMPARED["paca"].items() if name != "method")
    how = f"LLaMA3-8B on one GPU with 80 GB ({GPU}), {size}, one sequence per step, simulated"
    record("lengths", how, lambda: list(found()), args, options, list(COMPARED))


if __name__ == "__main__":
    sys.exit(main())
