"""A long GRPO run beside a vLLM server, killed twice; the server dies once.

    make soak-rl                        300 steps with SmolLM2-135M
    make soak-rl ARGS="--steps 12"      fewer

Fails if memory, threads or open files grow from the middle third of each process's samples to the
last, if a step is lost, if the served weights are not the trained ones, or if after taking the
columns back they are not the base's.
"""

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from tests.vllm.conftest import find_free_port, grpo_words, serve, weights_of

REWARD = """
def is_reversed(completions, words, **kwargs):
    def share(text, wanted):
        return sum(a == b for a, b in zip(text.replace(",", " ").split(), wanted)) / len(wanted)
    return [share(text, row[::-1]) for text, row in zip(completions, words)]
"""
WORDS = ("apple", "river", "stone", "cloud", "green", "seven", "paper", "light", "music", "bread")
GROWTH = {"memory": 1.1, "threads": 1.0, "files": 1.0}
"""Of which factor more in the last third than in the middle one is a leak."""
_NUM_WARM = 6  # steps of a process before it is watched


class Watch:
    def __init__(self, pid: int) -> None:
        self.process = psutil.Process(pid)
        self.samples: dict[str, list[int]] = {name: [] for name in GROWTH}

    def look(self) -> None:
        with contextlib.suppress(psutil.Error):
            family = [self.process, *self.process.children(recursive=True)]
            self.samples["memory"].append(sum(one.memory_info().rss for one in family))
            self.samples["threads"].append(sum(one.num_threads() for one in family))
            self.samples["files"].append(sum(one.num_fds() for one in family))

    def leaks(self) -> dict[str, float]:
        """Return by what factor something has grown, where that is too much."""
        found, median = {}, statistics.median
        for name, values in self.samples.items():
            third = len(values) // 3
            if third >= 10:  # a life that is too short says nothing
                found[name] = median(values[-third:]) / median(values[third : 2 * third])
        return {name: growth for name, growth in found.items() if growth > GROWTH[name]}


def prepare(folder: Path, model: str, steps: int, address: str) -> list[str]:
    """Write what a run reads; return its command."""
    rows = [[WORDS[(i * k) % len(WORDS)] for k in (1, 3, 7)] for i in range(1, 200)]
    lines = [json.dumps({"prompt": f"{', '.join(row)} ->", "words": row}) for row in rows]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    (folder / "soak_rewards.py").write_text(REWARD)
    server = {"vllm_mode": "server", "vllm_server_base_url": address}
    saving = {"save_steps": 2, "save_total_limit": 2, "report_to": "none", "eval_strategy": "no"}
    words = grpo_words(
        folder, model, "soak_rewards:is_reversed", max_steps=steps, **server, **saving
    )
    words += ["--training.per_device_train_batch_size", "8", "--model.dtype", "bfloat16"]
    return [sys.executable, "-m", "pacatune", *words]


def step_of(folder: Path) -> int:
    found = (folder / "run").glob("checkpoint-*/trainer_state.json")
    return max((int(path.parent.name.partition("-")[2]) for path in found), default=0)


def run_until(command: list[str], folder: Path, step: int, watches: list[Watch]) -> int | None:
    """Train until a checkpoint of a step is there; return the exit status, or None and kill it."""
    resume = ["--resume"] if step_of(folder) else []
    with (folder / "train.log").open("ab") as log:
        process = subprocess.Popen([*command, *resume], stdout=log, stderr=log, cwd=folder)
    watches.append(Watch(process.pid))
    warm = step_of(folder) + _NUM_WARM
    while (status := process.poll()) is None and step_of(folder) < step:
        time.sleep(2)
        for watch in watches if step_of(folder) >= warm else ():
            watch.look()
    if status is None:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return status


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--model", help="a folder; SmolLM2-135M-Instruct if not given")
    args = parser.parse_args()
    if args.model is None:
        from examples.packaged import prepare as prepare_model

        args.model = str(prepare_model("smollm2"))
    folder = Path(tempfile.mkdtemp(prefix="soak-rl-"))
    paths = [str(folder), os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    port, steps, watches = find_free_port(), args.steps, []
    address = f"http://127.0.0.1:{port}"
    command = prepare(folder, args.model, steps, address)
    print(f"the run is in {folder}", flush=True)

    def server():
        return serve(args.model, port, folder / "server.log")

    def reach(step: int, what: str) -> None:
        status = run_until(command, folder, step, watches)
        print(f"step {step_of(folder)}: {what} (status {status})", flush=True)
        assert status in (None, 0), (folder / "train.log").read_text()[-3000:]

    with server() as process:
        base = weights_of(address)
        watches.append(Watch(process.pid))
        reach(steps // 4, "killed")
        reach(steps // 2, "killed; and the server with it")
    with server() as process:
        watches.append(Watch(process.pid))
        assert weights_of(address) == base
        reach(3 * steps // 4, "killed")
        reach(steps + 1, "ended")
        assert step_of(folder) == steps
        check_served(args.model, folder, address, base)
    leaks = [found for watch in watches if (found := watch.leaks())]
    assert not leaks, f"grew from the middle third to the last: {leaks}"
    print(f"{steps} steps, 3 kills, 2 servers: nothing drifted, nothing leaked")


def check_served(model: str, folder: Path, address: str, base: dict[str, str]) -> None:
    """Compare what is served with the adapter of the last step, then with the base."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from pacatune.integrations.vllm import VllmTransport
    from pacatune.sync import ColumnSource
    from tests.vllm.conftest import trained_digests

    plain = AutoModelForCausalLM.from_pretrained(model, dtype="bfloat16")
    adapted = PeftModel.from_pretrained(plain, folder / "run" / f"checkpoint-{step_of(folder)}")
    transport = VllmTransport(address)
    ColumnSource(adapted).send(transport)
    assert weights_of(address) == trained_digests(adapted)
    transport.revert()
    assert weights_of(address) == base, "the base was changed"


if __name__ == "__main__":
    main()
