"""Runs of `pacatune train` by the paper's settings, and what scores them."""

import contextlib
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples.packaged import default_cache, prepare
from experiments.paper import Line, Printed
from pacatune.methods import METHODS
from pacatune.reports.rows import Job, Row, spread_of_mean
from pacatune.training import RunConfig
from pacatune.training.folder import REPORT_NAME
from pacatune.training.recipe import start_or_resume

if TYPE_CHECKING:
    from pacatune.adapters.loading import LoadedModel


def text_run(
    stated: Mapping[str, Any],
    method: str,
    *,
    model: str,
    data: Mapping[str, Any],
    rate: float,
    dtype: str,
    seed: int,
    **training: Any,
) -> RunConfig:
    """Return a run of `pacatune train` with stated settings; `training` has further options."""
    rank, micro_batches = stated["rank"], stated["micro_batches"]
    alpha = stated["alpha"]
    adapter: dict[str, Any] = {}
    if METHODS[method].is_paca:
        adapter["paca"] = {
            "r": rank,
            "paca_alpha": alpha,
            "random_seed": seed,
        }
    elif METHODS[method].has_adapter:
        dropout = stated.get("dropout", 0.0)
        adapter["lora"] = {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout}
    options = {
        "max_steps": stated["steps"],
        "learning_rate": rate,
        "lr_scheduler_type": stated["scheduler"],
        "warmup_steps": stated["warmup"],
        "per_device_train_batch_size": stated["batch_size"] // micro_batches,
        "gradient_accumulation_steps": micro_batches,
        "max_length": stated["seq_len"],
        "bf16": dtype == "bfloat16",
        "seed": seed,
        "report_to": "none",
    }
    return RunConfig(
        method=method,
        model={"path": model, "dtype": dtype},
        data=dict(data),
        training=options | training,
        # As the paper's code computes; its memory and times are without lean layers.
        lean="off",
        **adapter,
    )


@dataclass(frozen=True)
class Work:
    """What a job does one after the other in its folder; what an earlier call ended is skipped."""

    folder: Path

    def train(self, run: RunConfig, name: str) -> tuple[dict[str, Any], Path]:
        """Train a run, going on from its last checkpoint; return its report and its folder."""
        output = self.folder / name
        run.training.output_dir = str(output)
        with self.quiet(name) as console:
            start_or_resume(run, console=console)
        values: dict[str, Any] = json.loads((output / REPORT_NAME).read_text(encoding="utf-8"))
        return values, output

    @contextlib.contextmanager
    def quiet(self, name: str) -> Iterator[Any]:
        """Send what is printed meanwhile to NAME.log, and free memory afterwards."""
        from rich.console import Console

        from experiments.study.tasks import released

        self.folder.mkdir(parents=True, exist_ok=True)
        with (
            (self.folder / f"{name}.log").open("a", encoding="utf-8") as file,
            contextlib.redirect_stdout(file),
            contextlib.redirect_stderr(file),
            released(),
        ):
            yield Console(file=file, highlight=False, markup=False)


@contextlib.contextmanager
def loaded(model: str, adapter: Path | None, **options: Any) -> Iterator["LoadedModel"]:
    """Load a model to be scored, PaCA's columns kept in its weights."""
    from pacatune import resident
    from pacatune.adapters.loading import load_language_model

    found = load_language_model(model, adapter, **options)
    with resident(found.model):
        yield found


def row_of(table: Printed, line: Line, key: str, value: float, **more: Any) -> Row:
    """Return a number of ours under the names of the paper's column and line."""
    options = {"unit": table.units[key], "model": line.model, **more}
    return Row(what=key, method=line.title, value=value, **options)


def rate_note(line: Line, rate: float, rates: Sequence[float] | Mapping[float, Any]) -> str:
    """Say which learning rate was taken, if it lies at the edge of its grid."""
    if rate not in (min(rates), max(rates)):
        return ""
    return f"{line.title}: the best learning rate, {rate:g}, is at the edge of its grid."


def arm_row(
    table: Printed,
    line: Line,
    key: str,
    found: Any,
    rates: Sequence[float],
    **more: Any,
) -> Row:
    """Return what the arm of a study reached, with the 95 % interval of several seeds."""
    each = {str(seed): value for seed, value in found.values.items()}
    mean = statistics.mean(each.values())
    if len(each) > 1:
        spread = spread_of_mean([*each.values()])
        more |= {"low": mean - spread, "high": mean + spread}
    note = rate_note(line, found.learning_rate, rates)
    return row_of(table, line, key, mean, n=len(each), each=each, note=note, **more)


def study_job(
    line: Line,
    title: str,
    task: str,
    read: Callable[[Any], list[Row]],
    arm: Mapping[str, Any],
    **options: Any,
) -> Job:
    """Return the job of a study of one arm; `read` makes rows of what the arm reached."""
    from experiments.study.config import Arm, StudyConfig
    from experiments.study.runner import run_study

    config = StudyConfig(
        task=str(default_cache() / f"{task}.yaml"),
        arms={line.method: Arm(method=line.method, **arm)},
        forgetting_tokens=0,
        **options,
    )

    def run(folder: Path) -> list[Row]:
        folder.parent.mkdir(parents=True, exist_ok=True)
        prepare(task)
        (found,) = run_study(config, folder).values()
        if found.mean is None:
            raise RuntimeError(f"no run of {line.title} ended well: {' '.join(found.failures)}")
        return read(found)

    return Job(key=f"small-{line.key}", title=title, inputs=asdict(config), run=run)
