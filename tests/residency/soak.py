"""Walk at random for a long time: python -m tests.residency.soak --minutes 30 (make soak)."""

import argparse
import multiprocessing
import sys
import time
import traceback

import torch
from hypothesis import HealthCheck, Phase, Verbosity, seed, settings
from hypothesis.stateful import run_state_machine_as_test


def walk(number: int, deadline: float) -> tuple[int, list[str]]:
    """Walk until the deadline, each time from another seed; report what was found."""
    from tests.residency.walk import CompiledWalk as Walk

    torch.set_num_threads(1)
    options = settings(
        max_examples=20,
        stateful_step_count=50,
        deadline=None,
        database=None,
        verbosity=Verbosity.quiet,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    start = 1_000_003 * number + int(time.time())
    findings = []
    for offset in range(10**9):
        if time.time() > deadline:
            break
        try:
            run_state_machine_as_test(seed(start + offset)(Walk), settings=options)
        except BaseException:
            findings.append(f"seed {start + offset}\n{traceback.format_exc()}")
            print(findings[-1], flush=True)
        said = f"process {number}: {Walk.num_operations} operations, {len(findings)} findings"
        print(said, flush=True)
    return Walk.num_operations, findings


def main() -> None:
    """Walk in several processes and say how it went; exit with 1 if something was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    deadline = time.time() + 60 * options.minutes
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        walks = [(number, deadline) for number in range(options.workers)]
        reports = pool.starmap(walk, walks, chunksize=1)
    findings = [finding for _, found in reports for finding in found]
    print(f"{sum(number for number, _ in reports):,} operations, {len(findings)} findings")
    sys.exit(1 if findings else 0)


if __name__ == "__main__":
    main()
