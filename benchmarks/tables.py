"""Write the tables of measurements into docs from the committed results.

    python -m benchmarks.tables

A block `<!-- table: NAME -->` is the view of a result of that name below: some of its rows, laid
out by `pacatune.reports.rows.table`.
"""

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import verdict
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
    where: Callable[[Row], bool] = lambda row: True
    """Which rows."""
    index: tuple[str, ...] = ("setting",)
    columns: tuple[str, ...] = ("method",)
    floor: str = ""
    """Method beyond whose numbers the others are shown."""
    remark: str = ""
    is_first: bool = True
    """Whether no table before it on its page says what its words mean, and where it comes from."""

    def markdown(self, results: Path) -> str:
        """Return the table, what its words mean, and where it comes from."""
        result = read(self.file, results)
        rows, made = list(filter(self.where, result.rows)), result.provenance
        floors = {(r.what, r.setting): r.value for r in rows if r.method == self.floor}
        for place, row in enumerate(rows):
            if self.floor not in ("", row.method):
                rows[place] = replace(row, value=row.value - floors[row.what, row.setting])
        shown = table(rows, self.index, self.columns)
        if not self.is_first:
            return "\n".join(shown.markdown())
        known = [f"`{n}`: {text}" for n, text in made["methods"].items() if n in _words(rows)]
        remarks = ["; ".join(known) + "." if known else "", self.remark, " ".join(shown.notes)]
        where = f", on {made['device']}" if "device" in made else ""
        source = (
            f"{made['how']}{where} ({versions_text(made['versions'])}). `{made['command']}`"
            f"{commit_text(made)} wrote `benchmarks/results/{self.file}.json`."
        )
        return "\n\n".join(filter(None, ["\n".join(shown.markdown()), *remarks, source]))


def _words(rows: Iterable[Row]) -> set[str]:
    """Return what may be a name in rows: `paca / lora` has two, `lora, float32` begins with one."""
    texts = {half for r in rows for text in (r.method, r.what) for half in text.split(" / ")}
    texts |= {row.setting for row in rows}
    return texts | {text.partition(", ")[0] for text in texts}


def _what(*names: str) -> Callable[[Row], bool]:
    return lambda row: row.what in names


def _is_share(row: Row) -> bool:
    """Whether it is PaCA's step, or its share of another method's."""
    return row.what == "step" and (row.method == "paca" or row.unit == "ratio")


_DRAWN = (
    "rollout_probs_diff, mean",
    "sampling_logp_difference, mean",
    "sampling_logp_difference, max",
    "k3_kl",
    "ratios beyond 0.8 to 1.25",
)
VIEWS = {
    **{name: View(file=name, where=_is_share) for name in ("step", "step-compiled")},
    "kernels": View(
        file="kernels",
        where=_what("forward", "backward", "with accumulation"),
        index=("method",),
        columns=("setting", "what"),
        floor="frozen",
        remark="Lines below `frozen` say how many are beyond it.",
    ),
    "lean-units": View(file="lean", where=_what("kept per token and layer")),
    "lean-times": View(
        file="lean",
        where=lambda row: row.what.endswith(" / level 1"),
        index=("what",),
        columns=("method", "setting"),
        is_first=False,
    ),
    "lengths": View(
        file="lengths",
        where=lambda row: row.model == "llama3-8b",
        index=("method", "setting"),
        columns=("what",),
    ),
    "small-lengths": View(
        file="lengths",
        where=lambda row: row.model != "llama3-8b",
        index=("model",),
        columns=("setting",),
        is_first=False,
    ),
    "rl-served": View(
        file="rl_sync",
        where=lambda row: row.what.startswith(("largest diff", "changed elements")),
        index=("method", "setting"),
        columns=("what",),
        is_first=False,
    ),
    "rl-drawn": View(file="rl_sync", where=_what(*_DRAWN), index=("method",), columns=("what",)),
    "rl-run": View(
        file="rl_run",
        where=lambda row: row.what.startswith(("reward", "sent", _DRAWN[1], "k3")),
        index=("method",),
        columns=("what",),
    ),
    "rl-codes": View(
        file="rl_codes",
        where=lambda row: row.what.startswith(("loss", "largest", "sent", _DRAWN[1], "k3")),
        index=("method",),
        columns=("what",),
    ),
    "rl-sync": View(
        file="rl_sync",
        where=lambda row: (
            row.what in ("sent per sync", "complete sync", "sync", "token / base")
            and row.method != "lora-bf16"
        ),
        index=("method",),
        columns=("what", "model", "setting"),
        is_first=False,
    ),
    "packed": View(
        file="packed",
        where=lambda row: (
            row.setting.endswith(("reversed", "sorted"))
            and row.method != "base"
            and (row.method != "lora, beside" or row.setting.startswith("Q4_1"))
            and not row.what.startswith("first")
        ),
        index=("setting", "method"),
        columns=("what",),
    ),
    "packed-rates": View(
        file="packed",
        where=lambda row: (
            row.what.startswith("first seed")
            and "reversed" in row.setting
            and row.method in ("paca", "paca, on the grid", "lora")
        ),
        index=("method", "setting"),
        columns=("what",),
        is_first=False,
    ),
    "packed-costs": View(
        file="packed",
        where=_what("file", "speed", "time per token", "patch applied or taken out"),
        columns=("what", "method"),
        is_first=False,
    ),
    "packed-after": View(
        file="packed",
        where=lambda row: row.setting.endswith("after"),
        index=("setting", "method"),
        columns=("what",),
        is_first=False,
    ),
    "patch": View(
        file="patch", where=_what("written", "time"), index=("method",), columns=("what",)
    ),
    "demo-rl": View(
        file="demo-rl",
        where=lambda row: "gap" not in row.what,
        columns=("what", "method"),
    ),
}
"""Name of a block -> what it shows."""


def block(name: str, results: Path = RESULTS) -> str:
    """Return the text of a block."""
    kind, _, rest = name.partition("-")
    if kind == "reproduce":
        return doc_table(rest)
    if kind in ("cost", "selection"):
        return verdict.block(name.removeprefix("cost-"), results)
    if name in (own := {"first": _first, "demo": _demo, "rl": _rl}):
        return own[name](results)
    if name == "compat":
        return compat(json.loads((results / "compat.json").read_text(encoding="utf-8")))
    if name not in VIEWS:
        raise ValueError(f"no table {name!r}; there are {', '.join(VIEWS)}.")
    return VIEWS[name].markdown(results)


def _first(results: Path) -> str:
    """Return costs, scores and forgetting of PaCA and three LoRAs, for the first screen."""
    steps = read("step", results)
    kept = {(row.setting, row.method): row.value for row in read("lean", results).rows}
    eager = [row for row in read("kernels", results).rows if row.setting == "eager"]
    kernels = {(row.what, row.method): row.value for row in eager}

    def share(name: str) -> str:
        shares = [row.value for row in steps.rows if row.method == f"paca / {name}"]
        return f"{min(shares):.2f} to {max(shares):.2f}" if shares else "-"

    def beyond(name: str) -> str:
        ways = ("forward", "backward")
        return " + ".join(f"{kernels[w, name] - kernels[w, 'frozen']:.0f}" for w in ways)

    def beside(lora: str) -> str:
        times = [verdict.steps_of(task, results) for task in ("minilm", "dinov2", "smollm2-words")]
        shares = [one["paca16"] / one[lora] for one in times]
        return f"{min(shares):.2f} to {max(shares):.2f}"

    model, device = steps.rows[0].model.partition(", ")[2], steps.provenance["device"]
    loras = ("paca", "lora", "lora_bf16")
    cells = [
        [
            f"PaCA's step time as a share of theirs, r = 16: small Llama ({model}), 16 to 2,048 "
            f"tokens, {device}",
            *map(share, loras),
        ],
        [
            "the same on three small models",
            "-",
            beside("lora16"),
            "-",
            beside("rslora16"),
        ],
        [
            "kept for backward, r = 16, bytes per token, layer and channel of LLaMA3-8B; with "
            "lean activations, level 1; counted",
            *(f"{kept['plain', name]:.0f}; {kept['level 1', name]:.0f}" for name in loras),
        ],
        ["kernels beyond a frozen decoder layer, forward + backward; counted", *map(beyond, loras)],
    ]
    for title, paca, lora, rslora in verdict.first_rows(results):
        cells.append([title, paca, lora, "-", rslora])
    title = (
        "tuned in a 4-bit GGUF and written into it (LoRA: quantised again), SmolLM2-135M, words "
        "reversed; sorted: exact answers served, % (as trained)"
    )
    cells.append([title, *("; ".join(_served(results, arm)) for arm in ("paca", "lora"))])
    trainer = "LoRA as Trainer runs it (autocast, float32 adapters)"
    header = ["", "PaCA", trainer, "LoRA, adapters in bfloat16", "rsLoRA"]
    return "\n".join(Table(header=header, cells=[[*c, "-", "-"][:5] for c in cells]).markdown())


def _served(results: Path, arm: str) -> list[str]:
    """Return the scores of an arm in the first format of files of few bits, by task."""
    rows = {(r.setting, r.what): r for r in read("packed", results).rows if r.method == arm}
    settings = [f"Q4_1, words {task}" for task in ("reversed", "sorted")]
    return [
        f"{rows[setting, 'score'].value:.1f} ({rows[setting, 'score as trained'].value:.1f})"
        for setting in settings
    ]


def _rl(results: Path) -> str:
    """Return what three ways to sync a sampler come to, for the README."""
    result = read("rl_sync", results)
    rows = {(r.what, r.method, r.model or r.setting): r for r in result.rows}
    ways = ("paca", "lora", "lora-adapter")

    def of(what: str, where: str, *names: str) -> list[str]:
        found = [rows.get((what, name, where)) for name in names or ways]
        return ["not measured" if row is None else row.text() for row in found]

    beside = rows["the trainer's weights, bit for bit", "lora-bf16", "transformers"].value
    same = [rows["the trainer's weights, bit for bit", name, "transformers"].value for name in ways]
    said = [("no", "yes")[int(value)] for value in same]
    said[2] += f" (adapters in bfloat16: {('no', 'yes')[int(beside)]})"
    lines = {"the sampler multiplies with the trainer's weights, bit for bit": said}
    syncs = sorted({int(what.split()[2]) for what, *_ in rows if what.startswith("largest diff")})
    served = [of(f"largest difference, {n} syncs", "r = 64") for n in syncs]
    lines[
        "1,008 tokens scored by vLLM, and by a vLLM started from the merged folder: largest "
        f"difference of log-probabilities after {' and '.join(map(str, syncs))} syncs, r = 64"
    ] = ["; ".join(pair) for pair in zip(*served, strict=True)]
    gap = "sampling_logp_difference, mean"
    base = of(gap, "vLLM", "base")[0]
    lines[f"mean gap of log-probabilities of what vLLM draws (untrained base: {base})"] = of(
        gap, "vLLM"
    )
    lines["`k3_kl` of the same"] = of("k3_kl", "vLLM")
    half = of("sent per sync", "SmolLM2-135M", "lora-adapter, r = 8")[0]
    sent = of("sent per sync", "SmolLM2-135M")
    sent[0] = of("complete sync", "SmolLM2-135M")[0]
    sent[2] += f"; {half} at r = 8, as many parameters as the columns"
    lines["a complete sync"] = sent
    run = {(row.what, row.method): row.text() for row in read("rl_run", results).rows}
    for what, title in (
        ("sent per sync", "sent per sync in 200 steps of GRPO; columns and matrices compressed"),
        ("k3_kl", "`k3_kl` in these steps"),
        ("reward, steps 151 to 200", "mean reward of the last 50 of them"),
    ):
        lines[title] = [run[what, way] for way in ways]
    times = [of("token / base", where) for where in ("transformers", "vLLM")]
    lines[
        "time per token of answers, the base's = 1: transformers; vLLM on a CPU, which packs the "
        "base's weights"
    ] = ["; ".join(pair) for pair in zip(*times, strict=True)]
    changed = of(f"changed elements of the base, {syncs[-1]} syncs", "r = 64")
    lines[f"elements of the trainer's base that {syncs[-1]} syncs change, %"] = changed
    header = ["SmolLM2-135M in bfloat16, r = 16 where nothing else is said"]
    header += ["PaCA's columns", "LoRA, merged", "LoRA, beside the weights"]
    cells = [[title, *values] for title, values in lines.items()]
    return "\n".join(Table(header=header, cells=cells).markdown())


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


def compat(result: dict[str, dict[str, Any]]) -> str:
    """Return the Markdown table of what passed beside which releases."""
    shown = ("torch", "transformers", "peft", "accelerate")
    cells = [
        [
            title,
            *(result[name]["versions"][package].partition("+")[0] for package in shown),
            *(_passed(result[name].get(half)) for half in ("core", "conformance")),
        ]
        for name, title in _COMBINATIONS.items()
        if name in result
    ]
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
