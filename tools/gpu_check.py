"""Run the tests marked `gpu` and write what they said and measured: one process, one JSON.

    python tools/gpu_check.py --output OUT.json                    on the GPU that is there
    python tools/gpu_check.py --device cpu --output OUT.json       rehearses, in small sizes

Runs from a checkout, with nothing installed but what tools/gpu_wheels.sh collects. The JSON is
written after each test; what follows the output goes to pytest. The exit status is pytest's.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

import pytest  # noqa: E402
import torch  # noqa: E402

from benchmarks.results import CODE, write_json  # noqa: E402
from pacatune.reports.provenance import commit, cpu_name, versions  # noqa: E402

_PACKAGES = ("bitsandbytes", "triton", "accelerate", "trl")


class Recorder:
    """Writes each test's outcome, time, message and rows as it ends."""

    def __init__(self, device: torch.device, output: Path) -> None:
        self.output, self.tests = output, dict[str, dict[str, Any]]()
        self.result = {
            "command": "python tools/gpu_check.py",
            "device": torch.cuda.get_device_name() if device.type == "cuda" else cpu_name(),
            "cuda": torch.version.cuda,
            "versions": versions(*_PACKAGES),
            **commit(ROOT, *CODE),
            "tests": self.tests,
        }

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Note a test, and its fixtures where they fail or skip it; pytest calls it."""
        if report.when == "call" or not report.passed:
            test = {"outcome": report.outcome, "seconds": round(report.duration, 1)}
            if not report.passed:
                test["message"] = str(getattr(report.longrepr, "reprcrash", report.longrepr))
            self.tests[report.nodeid.partition("::")[2]] = test | dict(report.user_properties)
            write_json(self.result, self.output)


def main(options: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, metavar="OUT.json")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args, more = parser.parse_known_args(options)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu rehearses")
    if not args.output.parent.is_dir():
        parser.error(f"`--output` ({args.output}): its folder does not exist; make it")
    words = [str(ROOT / "tests" / "gpu"), "--device", args.device, "-W", "default"]
    recorder = Recorder(torch.device(args.device), args.output)
    status = pytest.main([*words, "-p", "no:cacheprovider", *more], plugins=[recorder])
    print(f"wrote {args.output}")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
