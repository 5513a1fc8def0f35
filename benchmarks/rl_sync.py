"""Measure what keeps a sampler in step with its trainer: bytes, time, and whose bits it has then.

    python -m benchmarks.rl_sync                   writes benchmarks/results/rl_sync.json
    python -m benchmarks.rl_sync --quick           the same in minutes, less often

With a Python that has vLLM (`sh tools/test_vllm.sh -m benchmarks.rl_sync`) the sampler is a vLLM.
Without one it is a model of transformers; that, and what is measured quickly, goes to
rl_sync-part.json and leaves the other. Each method trains a copy of SmolLM2-135M-Instruct in
bfloat16 and brings it to a sampler.

    served      fixed tokens, scored by the sampler after 1 and 100 syncs, and by one that was
                started from the folder of the merged model
    drawn       what the sampler draws, and what the trainer says of it, by the names of verl and
                TRL: `rollout_probs_diff`, `sampling_logp_difference`, `k3_kl`
    sent, sync  bytes; making and writing them, beside any transport
    token       time per token of answers, against those of the plain base
"""

import importlib.util
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import rl_methods
from benchmarks.results import counted, mean_row, new_parser, record
from benchmarks.rl_methods import (
    ELEMENT_BYTES,
    METHODS,
    SENT,
    Sync,
    Trainer,
    Transformers,
    agreement,
    load,
    merged_folder,
    reset,
    same_weights,
    sampler_of,
    text_ids,
)
from pacatune.measure.models import load_config, make_skeleton
from pacatune.measure.timing import alternate, ratio_row, time_row
from pacatune.reports.rows import Row

RANKS = (8, 64)
DRAWN = [name for name in METHODS if name not in ("swap", "elements")]
COMPLETE, MODEL = "complete sync", "SmolLM2-135M"
COMPUTED = ("llama3-8b", "llama3.1-70b")


def measure_drawn(samplers: Mapping[str, Any], args: Any) -> Iterator[Row]:
    """Measure what each method's sampler draws, for several seeds of training and drawing."""
    for method in DRAWN:
        sampler, found = sampler_of(method, samplers), defaultdict[str, dict[str, float]](dict)
        for seed in range(args.seeds):
            trainer = Trainer(method, load(), seed)
            sync = Sync(trainer, sampler)
            for _ in range(args.rounds if method != "base" else 0):
                sync.step_and_sync()
            ids, drawn = sampler.draw(text_ids(seed, 16, 8), args.drawn, seed)
            values = agreement(trainer.logps(ids)[:, -args.drawn :], drawn)
            for what, value in values.items():
                found[what][f"seed {seed}"] = value
            reset(sampler, method)
        for what, each in found.items():
            names = {
                "method": method,
                "setting": sampler.name,
                "unit": "%" if "0.8" in what else "",
            }
            if what.endswith("max"):
                yield Row(what=what, value=max(each.values()), n=len(each), each=each, **names)
            else:
                yield mean_row(what, each=each, **names)


def measure_served(samplers: Mapping[str, Any], args: Any) -> list[Row]:
    """Compare what synced samplers say of fixed tokens with what new ones of a merged model say."""
    ids, rows, base = text_ids(10**6, 16, 64), list[Row](), dict(load().named_parameters())
    for rank in args.ranks:
        for method in ("paca", "lora", "lora-adapter"):
            sampler = sampler_of(method, samplers)
            if sampler.name == "vLLM" and method == "lora-adapter":
                continue  # vLLM 0.32 cannot score prompts with an adapter on a CPU
            trainer = Trainer(method, load(), 0, rank)
            sync, names = Sync(trainer, sampler), {"method": method, "setting": f"r = {rank}"}
            for number in range(1, args.syncs + 1):
                trainer.walk(number)
                sync()
                if number not in (1, args.syncs):
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    new = sampler.score_anew(merged_folder(trainer, folder), ids)
                distance = (sampler.score(ids) - new).abs().double()
                for kind, value in (("mean", distance.mean()), ("largest", distance.max())):
                    what = f"{kind} difference, {number} syncs"
                    rows.append(Row(what=what, value=float(value), n=distance.numel(), **names))
            with trainer.model.disable_adapter():
                own = dict(trainer.tensors(is_merged=False))
            changed = sum(int((own[n] != p).sum()) for n, p in base.items())
            share = 100 * changed / sum(p.numel() for p in base.values())
            what = f"changed elements of the base, {args.syncs} syncs"
            rows.append(Row(what=what, value=share, unit="%", **names))
            reset(sampler, method)
    return rows


def measure_syncs(args: Any) -> list[Row]:
    """Return bytes and times of every method with transformers' generation."""
    make = partial(Transformers, rl_methods.base_path(), rank=rl_methods.RANK)
    methods = [name for name in METHODS if name != "base"]
    syncs = {m: Sync(Trainer(m, load(), args.seed), make(method=m)) for m in methods}
    runs = {method: one.step_and_sync for method, one in syncs.items()}
    times = alternate(runs, seconds=0, min_rounds=args.rounds, num_warmup=1)
    rows = []
    for method, one in syncs.items():
        names: dict[str, Any] = {"method": method, "setting": "transformers"}
        rows.append(time_row(times[method], what="sync", **names))
        if method not in ("swap", "elements"):
            same = same_weights(one.trainer, one.sampler)
            rows.append(counted("the trainer's weights, bit for bit", value=int(same), **names))
    paca, elements = (statistics.median(syncs[m].num_bytes[1:]) for m in ("paca", "elements"))
    rows.append(time_row(syncs["paca"].packing[1:], what="compressing", method="paca"))
    model = load()
    shares = {
        "paca": paca / syncs["paca"].num_bytes[0],
        "elements": elements / ELEMENT_BYTES / model.num_parameters(),
    }
    rows += [Row(what="share sent", method=m, value=100 * v, unit="%") for m, v in shares.items()]
    rows += count(model, MODEL, rl_methods.RANK, shares)
    for name in COMPUTED:
        rows += count(
            make_skeleton(load_config(name), name, torch.bfloat16), name, rl_methods.RANK, shares
        )
    samplers = {"base": make(method="base"), "paca": syncs["paca"].sampler}
    samplers["lora-adapter"] = syncs["lora-adapter"].sampler
    return rows + token_rows(samplers, text_ids(0, 16, 8), args)


def token_rows(samplers: Mapping[str, Any], prompts: Tensor, args: Any) -> list[Row]:
    """Return the time of a token of an answer, the samplers taking turns."""

    def seconds(sampler: Any) -> float:
        start = time.perf_counter()
        sampler.draw(prompts, args.drawn, args.seed)
        return (time.perf_counter() - start) / args.drawn

    runs = {method: partial(seconds, sampler) for method, sampler in samplers.items()}
    times = alternate(runs, seconds=0, min_rounds=args.rounds, num_warmup=1)
    setting = samplers["base"].name
    rows = [time_row(t, what="token", method=m, setting=setting) for m, t in times.items()]
    for method in [name for name in times if name != "base"]:
        names = {"what": "token / base", "method": method, "setting": setting}
        rows.append(ratio_row(times[method], times["base"], seed=args.seed, **names))
    return rows


def count(model: Any, name: str, rank: int, shares: Mapping[str, float]) -> list[Row]:
    """Return the bytes of a model's syncs by its shapes, and by shares that were measured."""
    num_elements = model.num_parameters()
    layers = [one for one in model.base_model.modules() if isinstance(one, nn.Linear)]
    outputs = sum(layer.out_features for layer in layers)
    inputs = sum(layer.in_features for layer in layers)
    found = dict.fromkeys(("swap", "lora", "full"), 2 * num_elements)
    found["lora-adapter"] = found["lora-bf16"] = 2 * rank * (inputs + outputs)
    found["lora-adapter, r = 8"] = rank * (inputs + outputs)
    rows = [counted(SENT, method, size, "bytes", model=name) for method, size in found.items()]
    columns = 2 * rank * outputs
    rows.append(counted(COMPLETE, "paca", columns, "bytes", model=name))
    partial_ = {"paca": columns, "elements": ELEMENT_BYTES * num_elements}
    origin: Any = "measured" if name == MODEL else "simulated"
    return rows + [
        Row(what=SENT, method=m, value=shares[m] * size, unit="bytes", model=name, origin=origin)
        for m, size in partial_.items()
    ]


def measure(args: Any) -> list[Row]:
    """Return every row."""
    make: Callable[..., Any] = Transformers
    if args.has_vllm:
        from benchmarks.rl_vllm import Vllm as make
    rows = measure_syncs(args)
    kinds = ("base", "paca", "lora-adapter", "merged")
    samplers = {kind: make(rl_methods.base_path(), kind, rl_methods.RANK) for kind in kinds}
    try:
        rows += measure_served(samplers, args)
        rows += measure_drawn(samplers, args)
        if args.has_vllm:
            rows += token_rows(
                {kind: samplers[kind] for kind in kinds[:-1]}, text_ids(0, 16, 8), args
            )
    finally:
        for sampler in samplers.values():
            sampler.close()
    return rows


def main(options: list[str] | None = None) -> None:
    """Measure, write the result, print it."""
    parser = new_parser(__doc__, is_timed=True)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, tokens, seeds, syncs")
    args = parser.parse_args(options)
    args.ranks, args.has_vllm = RANKS, importlib.util.find_spec("vllm") is not None
    quick, whole = (3, 16, 2, 5), (10, 128, 5, 100)
    args.rounds, args.drawn, args.seeds, args.syncs = quick if args.quick else whole
    how = (
        "SmolLM2-135M-Instruct, bfloat16, all linear layers, "
        f"r = {rl_methods.RANK} where nothing else is said. Medians of {args.rounds} syncs, a "
        f"training step before each. Drawn: 16 answers of {args.drawn} tokens for each of "
        f"{args.seeds} seeds, after {args.rounds} steps. Served: the same 1,008 tokens, a random "
        f"step of each trained value before each of {args.syncs} syncs. Sizes of larger models by "
        "their shapes"
    )
    name = "rl_sync" if args.has_vllm and not args.quick else "rl_sync-part"
    record(name, how, lambda: measure(args), args, options, METHODS)
    if not args.has_vllm:
        print("vLLM is not installed here: transformers' generation alone was measured.")


if __name__ == "__main__":
    sys.exit(main())
