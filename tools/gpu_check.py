"""Check and measure pacatune on a GPU: one process, minutes, one JSON written after each section.

    python tools/gpu_check.py --output OUT.json                    on the GPU that is there
    python tools/gpu_check.py --device cpu --output OUT.json       every section in small sizes

Runs from a checkout, with nothing installed but what tools/gpu_wheels.sh collects. A section that
fails is noted with its message, and the others go on; the exit status is then 1. On a CPU, clocks
stand in for CUDA events, and the result says what else stands in for what.
"""

import argparse
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

import torch  # noqa: E402

from benchmarks import gpu_promises as promises  # noqa: E402
from benchmarks import gpu_times as times  # noqa: E402
from benchmarks import kernels  # noqa: E402
from benchmarks.results import CODE, write_json  # noqa: E402
from pacatune.measure.device import device_name, has_events  # noqa: E402
from pacatune.names import choose  # noqa: E402
from pacatune.reports.provenance import commit, versions  # noqa: E402

Section = Callable[[], dict[str, Any]]
_PACKAGES = ("bitsandbytes", "triton", "accelerate", "trl")


def make_sections(device: torch.device) -> dict[str, Section]:
    """Return the sections in their order: what ends a run, other promises, what takes long."""
    is_gpu = device.type != "cpu"
    sizes = times.GPU if is_gpu else times.TINY
    real: dict[str, Any] = {"model": "llama3-8b", "seq_len": 2048} if is_gpu else {}
    counted = [name for name in kernels.COUNTED if is_gpu and name not in kernels.QUANTISED]
    on = {"device": device}
    return {
        "kernel": partial(promises.check_kernel, **on),
        "bad columns": partial(promises.check_bad_columns, **on),
        "default device": partial(promises.check_default_device, **on),
        "generation": partial(promises.check_generation, **on),
        "reduce overhead": partial(promises.check_reduce_overhead, **on),
        "ceilings": partial(times.measure_ceilings, **on, sizes=sizes),
        "gradients": partial(promises.check_gradients, **on),
        "columns": partial(promises.check_columns, **on),
        "synchronisation": partial(promises.check_synchronisation, **on),
        "capture": partial(promises.check_capture, **on),
        "kernels": partial(promises.check_kernels, **on, methods=counted or kernels.HELD),
        "steps": partial(times.measure_steps, **on, sizes=sizes),
        "memory": partial(promises.check_memory, **on, **real),
        "lean": partial(times.measure_lean, **on, sizes=sizes),
        "compiled": partial(promises.check_compiled, **on),
        "compiled steps": partial(times.measure_compiled, **on, sizes=sizes),
        "fsdp2": partial(promises.check_fsdp2, **on),
    }


def run(device: torch.device, names: list[str], output: Path) -> dict[str, Any]:
    """Run sections; write the result after each."""
    result: dict[str, Any] = {
        "command": "python tools/gpu_check.py",
        "finished": False,
        "device": device_name(device),
        "device_type": device.type,
        "times_by": "CUDA events" if has_events(device) else "the clock of the host",
        "sizes": "full" if device.type != "cpu" else "small: these times say nothing",
        "cuda": torch.version.cuda,
        "versions": versions(*_PACKAGES),
        **commit(ROOT, *CODE),
        "sections": {},
    }
    sections = make_sections(device)
    for name in names:
        start = time.monotonic()
        try:
            found = {"status": "passed", **sections[name]()}
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            found = {
                "status": "failed",
                "message": f"{type(error).__name__}: {error}",
                "at": f"{Path(where.filename).name}:{where.lineno}",
            }
        promises.free(device)
        found["seconds"] = round(time.monotonic() - start, 1)
        result["sections"][name] = found
        write_json(result, output)
        print(f"{name}: {found['status']}, {found['seconds']} s {found.get('message', '')}")
    result["finished"] = True
    write_json(result, output)
    return result


class _Parser(argparse.ArgumentParser):
    """Its errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"gpu_check: {message}\n")


def main(options: list[str] | None = None) -> int:
    """Run the command."""
    parser = _Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, metavar="OUT.json")
    parser.add_argument("--device", default="cuda", help="cuda or cpu (default: %(default)s)")
    parser.add_argument("--sections", nargs="+", metavar="NAME", help="by default all")
    args = parser.parse_args(options)
    known = make_sections(torch.device("cpu"))
    try:
        if args.device not in ("cuda", "cpu"):
            raise ValueError(f"`--device` ({args.device!r}) must be 'cuda' or 'cpu'.")
        if args.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("`--device` ('cuda'): there is no CUDA device; give `--device cpu`.")
        if args.output.is_dir():
            raise ValueError(f"`--output` ({args.output}) is a folder; name a file.")
        if not args.output.parent.is_dir():
            raise ValueError(f"`--output` ({args.output}): its folder does not exist; make it.")
        names = [choose(name, known, option="--sections") for name in args.sections or known]
    except ValueError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 2
    # PEFT asks transformers in an old way.
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
    result = run(torch.device(args.device), names, args.output)
    failed = [name for name, found in result["sections"].items() if found["status"] == "failed"]
    print(f"wrote {args.output}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    from pacatune.cli.options import quiet_libraries

    quiet_libraries()
    sys.exit(main())
