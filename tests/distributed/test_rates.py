"""Steps normalised per column where updates are copied, sharded or split: those of one process."""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from tests.distributed import net
from tests.distributed.tensor_parallel import adapt, load
from tests.distributed.test_fsdp1 import wrap
from tests.distributed.test_fsdp2 import full_adapter_of, shard
from tests.releases import has

pytestmark = pytest.mark.slow

WEIGHT = {"normalize": "weight"}


def one_process(sizes=(), **options):
    found = net.one_process("float64", sizes, False, **WEIGHT, **options)
    without = net.one_process("float64", sizes, False, **options)
    # That there are rates is seen in the adapter.
    name = next(name for name in found[1] if name.endswith("paca_delta"))
    assert not torch.allclose(found[1][name], without[1][name], rtol=1e-2)
    return found


def train_copies():
    model = net.adapt(**WEIGHT)
    return net.train(DistributedDataParallel(model), part=net.half), net.adapter_of(model)


def test_copies(pair):
    net.assert_equal_to_one(pair.run(train_copies), one_process())


def train_copies_by_shards_of_an_optimiser():
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = net.adapt(**WEIGHT)
    optimizer = ZeroRedundancyOptimizer(net.trained(model), torch.optim.AdamW, lr=1e-2)
    wrapped = DistributedDataParallel(model)
    return net.train(wrapped, optimizer, part=net.half), net.adapter_of(model)


def test_an_optimiser_in_shards(pair):
    """It is one around another, of whose parameters each process has some."""
    net.assert_equal_to_one(pair.run(train_copies_by_shards_of_an_optimiser), one_process())


def train_shards(sizes, options):
    model = shard(net.adapt("float64", sizes, **WEIGHT, **options))
    return net.train(model, part=net.half), full_adapter_of(model)


@pytest.mark.parametrize(
    ("sizes", "options"),
    [((), {}), (tuple(net.UNEVEN.items()), {}), ((), {"groups": 4})],
    ids=["even", "uneven", "groups"],
)
def test_shards(pair, sizes, options):
    """With row groups the rates of a process's rows are those of its groups."""
    results = pair.run(train_shards, sizes, options)
    net.assert_equal_to_one(results, one_process(sizes, **options))


def train_parts(folder, options):
    model = adapt(load(folder), **options)
    return net.train(model), net.adapter_of(model)


@pytest.mark.skipif(not has("transformers", "5.17"), reason="needs transformers >= 5.17")
@pytest.mark.parametrize("groups", [1, 2])
def test_tensor_parallel_parts(pair, save_base, groups):
    """Rates are found on a whole model, as columns are by strategies."""
    one = net.adapt(**WEIGHT, groups=groups).peft_config["default"]
    options = {**WEIGHT, "groups": groups, "selection": one.columns}
    options["column_rates"] = one.column_rates
    results = pair.run(train_parts, save_base(), options)
    net.assert_equal_to_one(results, one_process(groups=groups), atol=1e-12)


def fail_on_flat_parameters(policy, use_orig_params):
    model = wrap(net.adapt(**WEIGHT), policy, use_orig_params)
    try:
        net.train(model, part=net.half)
    except ValueError as error:
        return str(error)
    return "trained"


@pytest.mark.parametrize(("policy", "use_orig_params"), [("peft", True), ("peft", False)])
def test_flat_parameters_are_refused(pair, policy, use_orig_params):
    for message in pair.run(fail_on_flat_parameters, policy, use_orig_params):
        assert "drop `normalize`, or shard the model by FSDP2" in message
