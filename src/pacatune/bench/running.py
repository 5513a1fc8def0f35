"""Make all measurements of one run and write them as they come."""

import datetime
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from pacatune.bench.comparison import compare_methods
from pacatune.bench.config import BenchConfig
from pacatune.bench.device import available_bytes, device_name
from pacatune.bench.methods import METHODS
from pacatune.bench.record import commit, cpu, versions
from pacatune.bench.sweep import sweep_method
from pacatune.files.result_folder import ResultFolder

__all__ = ["run"]

# Of what is free on a CPU before a sweep: more, and the system would swap instead of failing.
_SHARE_OF_MEMORY = 0.8
Result = dict[str, Any]


def run(
    config: BenchConfig, folder: ResultFolder, command: str, tell: Callable[[str], None]
) -> Result:
    """Measure everything and return the result, which is written after each measurement.

    Args:
        config: What to measure.
        folder: Of the result, opened.
        command: The user's, for the record.
        tell: Shows a line about what goes on.
    """
    config = _with_limit(config)
    result = _provenance(config, command)
    if config.sweep is None:
        result |= {"rows": [], "ratios": []}
        for setting in config.settings:
            rows, ratios = compare_methods(config, setting, tell)
            result["rows"] += rows
            result["ratios"] += ratios
            folder.write(result)
    else:
        result |= {"limits": [], "points": []}
        for method in config.methods:
            limit, points = sweep_method(config, method, tell)
            result["limits"].append(limit)
            result["points"] += points
            folder.write(result)
    result["finished"] = True
    folder.write(result)
    return result


def _with_limit(config: BenchConfig) -> BenchConfig:
    """Give a sweep on a CPU an end before the system starts to swap."""
    is_cpu = config.torch_device.type == "cpu"
    if config.sweep is None or config.memory_limit is not None or not is_cpu:
        return config
    free = available_bytes(config.torch_device)
    if free is None:
        raise ValueError(
            "a sweep on a CPU needs to know how much memory is free, and only Linux says; choose "
            "another device, or give a memory limit there."
        )
    return replace(config, memory_limit=int(_SHARE_OF_MEMORY * free))


def _provenance(config: BenchConfig, command: str) -> Result:
    device = config.torch_device
    threads = f", {config.threads} threads" if device.type == "cpu" else ""
    return {
        "finished": False,
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device_name(device) + threads,
        "device_type": device.type,
        "cpu": cpu(),
        "versions": versions("bitsandbytes"),
        **commit(),
        "seed": config.seed,
        "model": f"{config.title}, random weights, {config.dtype}"
        + (", compiled" if config.compiled else ""),
        "methods": {method: METHODS[method] for method in config.methods},
        "config": asdict(config),
    }
