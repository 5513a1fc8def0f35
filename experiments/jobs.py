"""Work whose rows are kept: a job that was done is not done again."""

import datetime
import hashlib
import json
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pacatune.files.owned_folder import OwnedFolder
from pacatune.reports.provenance import commit, machine, versions
from pacatune.reports.rows import Row

_JOBS = "jobs"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One piece of work, whose rows are kept."""

    key: str
    """Unique in its folder; the name of its file."""
    inputs: dict[str, Any]
    """Everything that decides the rows, as JSON values: rows of other inputs are not used."""
    run: Callable[[Path], list[Row]]
    """Called with a folder of its own, which is made by it if needed and survives a kill."""
    title: str = ""
    """What it does, for a line on the screen; the key where empty."""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What became of a job."""

    rows: list[Row]
    provenance: dict[str, Any]
    """`date`, `seconds`, `machine`, `versions`, `commit` and `is_modified`."""
    error: str | None = None
    """Why it failed, if it did; it is done again by the next call."""


def done(
    jobs: Iterable[Job],
    folder: OwnedFolder,
    *,
    tell: Callable[[str], None] = lambda line: None,
    packages: Sequence[str] = (),
    code: Callable[[], dict[str, Any]] = commit,
) -> dict[str, Finished]:
    """Run the jobs that have no file in an open folder yet; return what became of all.

    Each file is written whole or not at all, so that a killed run goes on where it was. A job that
    fails does not stop the others.

    Args:
        jobs: The work, in its order.
        folder: Gets `jobs/KEY.json` for each.
        tell: Shows a line.
        packages: Whose versions are recorded, beside those of every result.
        code: Returns the `commit` and `is_modified` that are recorded; by default the package's.
    """
    finished: dict[str, Finished] = {}
    jobs = list(jobs)
    for number, job in enumerate(jobs, 1):
        kept = _read(job, folder)
        if kept is None or kept.error is not None:
            tell(f"{number}/{len(jobs)}: {job.title or job.key} ...")
            kept = _run(job, folder, packages, code)
            if kept.error is not None:
                tell(f"  failed: {kept.error}")
        finished[job.key] = kept
    return finished


def _run(
    job: Job, folder: OwnedFolder, packages: Sequence[str], code: Callable[[], dict[str, Any]]
) -> Finished:
    inputs = json.dumps(job.inputs, sort_keys=True)
    digest = hashlib.sha256(inputs.encode()).hexdigest()[:8]
    start = time.monotonic()
    rows, error, trace = list[Row](), None, None
    try:
        rows = job.run(folder.path / "work" / f"{job.key}-{digest}")
    except Exception as failure:  # whatever it is, what the other jobs cost is not lost
        error = f"{type(failure).__name__}: {' '.join(str(failure).split())}"
        trace = traceback.format_exc()
    provenance = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - start, 1),
        "machine": machine(),
        "versions": versions(*packages),
        **code(),
    }
    values = {
        "key": job.key,
        "inputs": job.inputs,
        "rows": [row.to_dict() for row in rows],
        **({"error": error, "traceback": trace} if error else {}),
        "provenance": provenance,
    }
    folder.write_json(f"{_JOBS}/{job.key}.json", values, edited=False)
    return Finished(rows=rows, provenance=provenance, error=error)


def _read(job: Job, folder: OwnedFolder) -> Finished | None:
    """Return what a job's file holds, None if there is none of the same inputs."""
    path = folder.path / _JOBS / f"{job.key}.json"
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["inputs"] != json.loads(json.dumps(job.inputs)):
            return None
        rows = [Row(**row) for row in values["rows"]]
        return Finished(rows=rows, provenance=values["provenance"], error=values.get("error"))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no result of a job ({type(error).__name__}: {error}); delete it, and the "
            "job is done again."
        ) from error
