"""Write the tables of measurements into docs from the committed results.

    python -m benchmarks.tables

A block `<!-- table: NAME -->` is the view of a result of that name below: some of its rows, laid
out by `pacatune.reports.rows.table`.
"""

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from benchmarks import findings, first, verdict
from benchmarks.results import RESULTS, ROOT, read
from examples import finetune_llm
from experiments.reproduce.catalogue import doc_table
from pacatune.reports.provenance import commit_text, versions_text
from pacatune.reports.rows import Row, Table, table
from tools.doc_block import rewrite

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@dataclass(frozen=True, kw_only=True)
class View:
    """Some rows of a result as a table."""

    file: str
    shown: tuple[str, ...] = ("*",)
    """Patterns of rows, each written WHAT; METHOD; SETTING; MODEL."""
    index: tuple[str, ...] = ("setting",)
    columns: tuple[str, ...] = ("what",)
    floor: str = ""
    """Method beyond whose numbers the others are shown."""
    is_by_seed: bool = False
    """Whether the values of seeds stand beside a mean, in place of its interval, and no notes."""
    is_first: bool = True
    """Whether no table before it on its page says what its words mean, and where it comes from."""

    def rows(self, rows: Iterable[Row]) -> list[Row]:
        """Return the rows that the patterns name."""
        return [row for row in rows if any(self._is_like(row, each) for each in self.shown)]

    @staticmethod
    def _is_like(row: Row, pattern: str) -> bool:
        return fnmatchcase("; ".join((row.what, row.method, row.setting, row.model)), pattern)

    def markdown(self, results: Path) -> str:
        """Return the table, what its words mean, and where it comes from."""
        result = read(self.file, results)
        rows, made = self.rows(result.rows), result.provenance
        floors = {(r.what, r.setting): r.value for r in rows if r.method == self.floor}
        for place, row in enumerate(rows):
            if self.floor not in ("", row.method):
                rows[place] = replace(row, value=row.value - floors[row.what, row.setting])
        if self.is_by_seed:
            rows = [_BySeed(**vars(row) | {"note": ""}) for row in rows]
        shown = table(rows, self.index, self.columns)
        if not self.is_first:
            return "\n".join(shown.markdown())
        known = [f"`{n}`: {text}" for n, text in made["methods"].items() if n in _words(rows)]
        remark = f"Lines below `{self.floor}` say how many are beyond it." if self.floor else ""
        remarks = ["; ".join(known) + "." if known else "", remark, " ".join(shown.notes)]
        where = f", on {made['device']}" if "device" in made else ""
        source = (
            f"{made['how']}{where} ({versions_text(made['versions'])}). `{made['command']}`"
            f"{commit_text(made)} wrote `benchmarks/results/{self.file}.json`."
        )
        return "\n\n".join(filter(None, ["\n".join(shown.markdown()), *remarks, source]))


class _BySeed(Row):
    """A mean that is shown with what it is the mean of."""

    def text(self) -> str:
        """Return the mean, and the value of each seed."""
        values = f" ({', '.join(f'{v:.3g}' for v in self.each.values())})" if self.each else ""
        return f"{self.value:.3g}{values}"


def _words(rows: Iterable[Row]) -> set[str]:
    """Return what may be a name in rows: `paca / lora` has two, `lora, float32` begins with one."""
    texts = {half for r in rows for text in (r.method, r.what) for half in text.split(" / ")}
    texts |= {row.setting for row in rows}
    return texts | {text.partition(", ")[0] for text in texts}


VIEWS = {
    "step": View(file="step", shown=("step; paca; *", "step; paca / *"), columns=("method",)),
    "kernels": View(
        file="kernels",
        shown=("forward; *", "backward; *", "with accumulation; *"),
        index=("method",),
        columns=("setting", "what"),
        floor="frozen",
    ),
    "lean-units": View(file="lean", shown=("kept per token and layer; *",), columns=("method",)),
    "lengths": View(file="lengths", columns=("method", "what")),
    "rl-run": View(
        file="rl_run",
        shown=("reward*", "sent*", "sampling_logp_difference, mean; *", "k3*"),
        index=("method",),
    ),
    "packed": View(
        file="packed",
        shown=tuple(
            f"{what}; {name}; Q4_1, words {task}; *"
            for what in ("score*", "bytes changed")
            for name in ("paca", "lora", "lora, beside", "full")
            for task in ("reversed", "sorted")
        ),
        index=("setting", "method"),
        is_by_seed=True,
    ),
    "packed-memory": View(
        file="packed_memory",
        shown=("weights; *; SmolLM2*", "peak; *; SmolLM2*"),
        index=("method",),
        columns=("what", "setting"),
    ),
    "packed-times": View(
        file="packed_memory", shown=("step; packed / *",), columns=("method",), is_first=False
    ),
    "packed-large": View(
        file="packed_memory", shown=("peak; *; Llama*",), columns=("method",), is_first=False
    ),
    "packed-devices": View(
        file="packed_memory", shown=("longest; paca*", "longest; q*"), columns=("method",)
    ),
}
"""Name of a block -> what it shows."""


def block(name: str, results: Path = RESULTS) -> str:
    """Return the text of a block."""
    kind, _, rest = name.partition("-")
    if kind == "reproduce":
        return doc_table(rest)
    if kind in (studies := {"dial": verdict, "found": findings}):
        return studies[kind].block(rest, results)
    if name in (own := {"first": first.block, "demo": _demo, "compat": _compat}):
        return own[name](results)
    if name not in VIEWS:
        raise ValueError(f"no table {name!r}; there are {', '.join(VIEWS)}.")
    return VIEWS[name].markdown(results)


def _demo(results: Path) -> str:
    """Return what `make demo` printed, with the first of its questions."""
    made = json.loads((results / "demo.json").read_text(encoding="utf-8"))
    return (
        f"```text\n{finetune_llm.summary(made, num_answers=1)}\n```\n\n"
        f"That took {made['minutes']} minutes once everything was installed, on {made['device']}"
        f"{commit_text(made)} ({versions_text(made['reports']['paca']['versions'])})."
    )


_COMBINATIONS = {
    "floors": "the floors",
    "llama-factory": "as LLaMA-Factory pins them",
    "axolotl": "as Axolotl pins them",
    "ms-swift": "as ms-swift pins them",
}


def _compat(results: Path) -> str:
    """Return the table of what passed beside which releases."""
    result = json.loads((results / "compat.json").read_text(encoding="utf-8"))
    shown, cells = ("torch", "transformers", "peft", "accelerate"), []
    for name in filter(result.get, _COMBINATIONS):
        versions = [result[name]["versions"][package].partition("+")[0] for package in shown]
        passed = [_passed(result[name].get(half)) for half in ("core", "conformance")]
        cells.append([_COMBINATIONS[name], *versions, *passed])
    header = ["", "torch", "transformers", "PEFT", "accelerate", "core's tests", "PEFT's own tests"]
    remark = "`python tools/compat.py --json benchmarks/results/compat.json` counted them."
    return "\n".join([*Table(header=header, cells=cells).markdown(), "", remark])


def _passed(counts: dict[str, int] | None) -> str:
    if not counts:
        return "not run"
    failed = f", {counts['failed']} failed" if counts["failed"] else ""
    return f"{counts['passed']:,} passed{failed}, {counts['skipped']:,} skipped"


def main() -> None:
    """Rewrite the documents."""
    for path in rewrite(DOCUMENTS, "table", block):
        print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
