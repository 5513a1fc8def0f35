"""Two processes that share the batches choose what one process chooses from all of them."""

import torch

from tests.distributed.net import batches, build_base, layers_of, loss_of


def options():
    from pacatune import PacaConfig

    return PacaConfig(r=4, target_modules="all-linear", selection="gradient")


def collect(shared):
    from pacatune.selection import collect_statistics

    model = build_base()
    mine = list(batches())[:5]
    if shared:  # an odd number: one process has a batch more
        mine = mine[torch.distributed.get_rank() :: torch.distributed.get_world_size()]
    return collect_statistics(model, mine, options(), loss_fn=loss_of)


def collect_and_adapt():
    from peft import get_peft_model

    from pacatune.selection import choose_columns

    statistics = collect(shared=True)
    base = build_base()
    model = get_peft_model(base, choose_columns(base, options(), statistics))
    columns = [layer.paca_indices["default"].tolist() for layer in layers_of(model)]
    return statistics.num_batches, statistics.values, columns


def test_two_processes_equal_one(pair):
    from pacatune.selection import choose_columns

    results = pair.run(collect_and_adapt)
    one = collect(shared=False)
    chosen = choose_columns(build_base(), options(), one)
    for num_batches, values, columns in results:
        assert num_batches == 5
        for name, kinds in one.values.items():
            for kind, expected in kinds.items():
                torch.testing.assert_close(values[name][kind], expected, rtol=1e-10, atol=0)
        assert columns == list(chosen.columns.values())
