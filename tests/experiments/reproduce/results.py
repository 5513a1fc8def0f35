"""Results as cells compute them, with numbers to be found again in reports."""

from pacatune.experiments.reproduce import EXPERIMENTS
from pacatune.paper import TABLES

METHODS_OF_BENCH = ("paca", "lora", "lora_dropout", "dora", "moslora", "full", "qpaca", "qlora")
STEP_MS = {"paca": 80.0, "lora": 100.0, "lora_dropout": 110.0, "dora": 200.0, "moslora": 105.0}
STEP_MS |= {"full": 100.0, "qpaca": 90.0, "qlora": 100.0}


def bench_rows():
    rows = []
    for method in METHODS_OF_BENCH:
        row = {"method": method, "status": "measured", "setting": "1 x 8 tokens"}
        row |= {"saved_bytes": int(1e6 * STEP_MS[method]), "peak_bytes": int(2e6 * STEP_MS[method])}
        shares = {"step": 1.0, "forward": 0.4, "backward": 0.5, "optimizer": 0.1}
        for phase, share in shares.items():
            for part, factor in (("", 1.0), ("_quartile_1", 0.99), ("_quartile_3", 1.01)):
                row[f"{phase}_ms{part}"] = STEP_MS[method] * share * factor
        row["noise"] = [{"num_cores_of_others": 0.25}]
        rows.append(row)
    return rows


def bench_ratios():
    ratios = []
    for ours, other in [
        *(("paca", m) for m in METHODS_OF_BENCH[1:6]),
        ("qpaca", "qlora"),
    ]:
        ratio = STEP_MS[ours] / STEP_MS[other]
        values = {"ratio": ratio, "low": ratio * 0.98, "high": ratio * 1.02}
        ratios.append(
            {"method": ours, "reference": other, **values, "forward": values, "backward": values}
        )
    return ratios


def bench_result():
    return {
        "model": "Llama 512x8, random weights, bfloat16",
        "device": "a CPU, 2 threads",
        "rows": bench_rows(),
        "ratios": bench_ratios(),
    }


def sweep_result(kind):
    limits = {"paca": 13, "lora": 10, "dora": 7, "moslora": 9}
    points = [
        {
            "method": method,
            "num_rows": rows,
            "step_ms": 1000 / rate,
            "step_ms_quartile_1": 990 / rate,
            "step_ms_quartile_3": 1010 / rate,
            "sentences_per_second": rows * rate,
            "noise": [{"num_cores_of_others": 0.0}],
        }
        for method, limit in limits.items()
        for rate in ((2.0 if method == "paca" else 1.5),)
        for rows in (1, limit)
    ]
    unit = 100 if kind == "seq-len" else 1
    return {
        "model": "Llama 256x4, random weights, bfloat16",
        "device": "a CPU, 2 threads",
        "points": points,
        "limits": [{"method": m, "limit": unit * n} for m, n in limits.items()],
    }


def study_result(mean, std=0.01, rate=4e-3):
    return {
        "metric": "loss",
        "values": {"0": mean - 0.01, "1": mean + 0.01},
        "mean": mean,
        "std": std,
        "learning_rate": rate,
        "rates": {},
        "num_trainable_parameters": 1000,
        "warnings": [],
    }


def full_result(name, row):
    scores = {
        "table1": {
            "categories": {g: {"value": 0.5, "stderr": 0.01} for g in ("Hums.", "STEM", "Social.")},
            "average": {"value": 0.625, "stderr": 0.005},
        }
    }.get(name, {"average": {"value": 5.5, "low": 5.0, "high": 6.0}})
    result = {"scores": scores}
    if row.method not in ("none", "quantized"):
        result |= {"peak_memory_bytes": 25 * 10**9, "training_ms": 3.6e6 * 4}
    return result


def made_up(name, mode):
    """A result for every cell of an experiment."""
    found = {}
    for cell in EXPERIMENTS[name].cells(mode):
        key = cell.key
        if key == "bench":
            kind = {"fig3": "batch", "table4": "seq-len"}.get(name)
            found[key] = sweep_result(kind) if kind else bench_result()
        elif key == "steps":
            others = [m for m in cell.methods if m != "paca"]
            found[key] = {
                "saved_bytes": {m: int(STEP_MS[m] * 1e6) for m in cell.methods},
                "ratios": [r for r in bench_ratios() if r["reference"] in others],
                "num_rounds": 9,
                "device": "a CPU, 2 threads",
                "noise": {"num_cores_of_others": 0.0},
            }
        elif key.startswith("operations-"):
            forward = {"full": 100, "lora": 101, "paca": 100}[cell.methods[0]]
            backward = {"full": 200, "lora": 102, "paca": 101}[cell.methods[0]]
            found[key] = {"forward_flops": forward, "backward_flops": backward}
        elif key.startswith("simulate-"):
            found[key] = {"peak_bytes": 20 * 10**9, "max_seq_len": 9000, "max_batch": 20}
        elif key.startswith("small-"):
            found[key] = study_result(0.5 if name in ("table1", "table6", "table7") else 2.5)
        elif name in ("table6", "table7"):
            found[key] = {"accuracy_after": 0.9, "peak_memory_bytes": 10**10, "step_ms": 100.0}
            found[key]["num_steps"] = 600
        else:
            table = key.removeprefix("full-")
            row = next(r for r in TABLES[name].rows if r.key == table)
            found[key] = full_result(name, row)
    return found
