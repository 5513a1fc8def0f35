"""Columns that are not random: chosen, given, saved, loaded, copied."""

import copy
import json
import logging
import re
import sys
import types
from functools import partial

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

from pacatune import PacaConfig
from pacatune.selection import (
    ColumnStatistics,
    choose_columns,
    collect_statistics,
    load_columns,
    save_columns,
)
from pacatune.tuner import PacaLayer
from pacatune.tuner.columns import fit_ranks
from pacatune.tuner.defaults import log_once
from pacatune.tuner.quantized import weight_matrix
from tests.releases import needs
from tests.selection.nets import TARGETS, build, columns_of, loss_of, make_batches, weights_of
from tests.tuner.nets import evaluate, fill
from tests.tuner.quantizers import QUANTIZERS, quantise


def config_of(selection, targets=TARGETS, **options):
    return PacaConfig(r=2, target_modules=list(targets), selection=selection, **options)


def columns_in(model, adapter="default"):
    return {
        name.removeprefix("base_model.model."): layer.paca_indices[adapter].tolist()
        for name, layer in model.named_modules()
        if isinstance(layer, PacaLayer)
    }


@pytest.mark.parametrize(("strategy", "sign"), [("weight_norm", 1), ("weight_norm_smallest", -1)])
def test_norms_of_every_kind_of_layer(strategy, sign):
    model = build()
    expected = {}
    for name, weight in weights_of(model).items():
        norms = columns_of(name, weight.detach()).norm(dim=0)
        expected[name] = sorted((sign * norms).topk(2).indices.tolist())
    adapted = get_peft_model(model, config_of(strategy))
    assert columns_in(adapted) == expected
    # What was chosen is part of the configuration, which TRL copies for its reference.
    assert adapted.peft_config["default"].columns == expected
    assert adapted.peft_config["default"].selection == strategy


def test_statistics_lead_to_columns():
    model, config = build(), config_of("gradient")
    statistics = collect_statistics(model, make_batches(), config, loss_fn=loss_of)
    expected = {
        name: sorted(kinds["gradient"].topk(2).indices.tolist())
        for name, kinds in statistics.values.items()
    }
    chosen = choose_columns(model, config, statistics)
    assert config.columns is None
    assert chosen.columns == expected
    assert chosen.selection_options == {"num_batches": 4}
    adapted = get_peft_model(model, chosen)
    assert columns_in(adapted) == expected


@pytest.mark.parametrize("name", sorted(QUANTIZERS))
def test_norms_of_a_quantised_weight(name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 32))
    model[0].weight.data[:, [5, 40]] *= 3
    model[0] = quantise(model[0], name)
    adapted = get_peft_model(model, config_of("weight_norm", ["0"]))
    assert columns_in(adapted) == {"0": [5, 40]}


@pytest.fixture
def gptq_linear(monkeypatch):
    """Stands in for a layer of gptqmodel, which needs a GPU: it has buffers and no parameter."""

    class Quantised(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.in_features, self.out_features = linear.in_features, linear.out_features
            self.register_buffer("qweight", linear.weight.detach())

        def forward(self, x):
            return x @ self.qweight.T

    module = types.SimpleNamespace(BaseQuantLinear=Quantised)
    for name in ("gptqmodel", "gptqmodel.nn_modules", "gptqmodel.nn_modules.qlinear"):
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("other", "quantization_utils"):
        monkeypatch.setattr(f"peft.utils.{name}.is_gptqmodel_available", lambda: True)
    return Quantised


@needs("peft", "0.21")
def test_a_quantised_layer_without_parameters(gptq_linear):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), gptq_linear(nn.Linear(16, 4)))
    config, batch = config_of("gradient", ["0", "1"]), torch.randn(5, 8)
    batch[:, [1, 6]] *= 50
    statistics = collect_statistics(
        model, [batch], config, loss_fn=lambda model, x: model(x).square().sum()
    )
    adapted = get_peft_model(model, choose_columns(model, config, statistics))
    assert columns_in(adapted)["0"] == [1, 6]
    assert len(columns_in(adapted)["1"]) == 2
    with pytest.raises(ValueError, match=r"those of a Quantised \(gptq\) cannot be dequantised"):
        choose_columns(adapted.unload(), config_of("weight_norm", ["1"]))


def test_given_columns_by_name_and_by_pattern():
    model = build()
    given = {"up": [7, 1], "conv": (0, 3)}
    config = config_of(given, ["up", "conv"], random_seed=None)
    assert (config.selection, config.columns) == ("fixed", {"up": [1, 7], "conv": [0, 3]})
    adapted = get_peft_model(model, config)
    assert columns_in(adapted) == {"up": [1, 7], "conv": [0, 3]}
    assert adapted.peft_config["default"].random_seed is None  # drawn where one is needed alone
    both = config_of({r"up|down": torch.tensor([2, 4])}, TARGETS[2:])
    assert columns_in(get_peft_model(build(), both)) == {"up": [2, 4], "down": [2, 4]}


def test_given_columns_and_random_ones():
    """Where a configuration gives some columns, its strategy chooses the others."""
    random = columns_in(get_peft_model(build(), config_of("random", ["up", "down"])))
    some = config_of("random", ["up", "down"], columns={"up": [3, 5]})
    assert columns_in(get_peft_model(build(), some)) == {"up": [3, 5], "down": random["down"]}


SHORT = ColumnStatistics(values={"up": {"gradient": torch.ones(5)}}, num_batches=1)


@pytest.mark.parametrize(
    ("selection", "targets", "statistics", "message"),
    [
        ("gradient", ["conv", "up"], None, "'conv': `selection` .* needs statistics"),
        ("gradient", ["up"], SHORT, r"'up': `statistics` has 5 columns \(gradient\)"),
        ("gradient", ["down"], SHORT, "nothing was collected about 'down'"),
        ({"up": [1, 2, 3]}, ["up"], None, r"gives 3 columns for 'up', of which 2 are trained; set"),
        ({"up": [1, 12]}, ["up"], None, "column 12 for 'up', which has 12; the first one is 0"),
        ({"up": [1, 2], "no": [1, 2]}, ["up"], None, r"`columns`: \['no'\] match nothing that"),
        ({"up": [1, 2]}, ["up", "down"], None, "gives none for 1 adapted modules, first 'down'"),
    ],
)
def test_columns_that_do_not_fit(selection, targets, statistics, message):
    model, config = build(), config_of(selection, targets)
    before = [type(module) for module in model.modules()]
    choose = partial(choose_columns, statistics=statistics) if statistics else get_peft_model
    with pytest.raises(ValueError, match=message):
        choose(model, config)
    assert [type(module) for module in model.modules()] == before


def test_weights_that_are_not_there():
    with pytest.raises(ValueError, match=r"module 'up': .*'weight_norm'\) looks at the weights"):
        get_peft_model(build().to("meta"), config_of("weight_norm", ["up"]))
    linear = nn.Linear(2, 2)
    linear.weight.ds_id = 0
    with pytest.raises(ValueError, match="weights, and those of a Linear are sharded; choose"):
        weight_matrix(linear)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_save_and_load(tmp_path, low_cpu_mem_usage):
    base = build()
    model = get_peft_model(copy.deepcopy(base), config_of("weight_norm")).eval()
    fill(model)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["selection"] == "weight_norm"
    assert saved["columns"] == "paca_indices"  # the tensors have them
    chosen = columns_in(model)
    with torch.no_grad():  # other norms: what the file says counts
        base.up.weight.mul_(torch.rand(12, dtype=torch.float64))
        model.unload().up.weight.copy_(base.up.weight)
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert columns_in(loaded) == chosen
    # As TRL's trainers make the reference of a loaded adapter: from its configuration, and by
    # copying parameters, which columns are none of.
    loaded.add_adapter("ref", loaded.peft_config["default"])
    assert columns_in(loaded, "ref") == chosen
    for name, parameter in loaded.named_parameters():
        if ".default." in name:
            loaded.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter)
    x = make_batches(1)[0][0]
    before = evaluate(loaded, x)
    loaded.set_adapter("ref")
    assert torch.equal(evaluate(loaded, x), before)


def test_a_configuration_of_a_file_has_no_columns_of_its_own(tmp_path):
    """Whoever makes an adapter from it would train others without a word."""
    model = get_peft_model(build(), config_of("weight_norm"))
    model.save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"load the adapter with PeftModel\.from_p"):
        choose_columns(build(), config)
    fresh = get_peft_model(build(), config)
    x = make_batches(1)[0][0]
    with pytest.raises(ValueError, match="adapter 'default': the columns of this configuration"):
        fresh(x)
    fresh.add_adapter("other", config_of("random"))
    fresh.set_adapter("other")
    fresh(x)
    fresh.load_adapter(tmp_path, "default")
    fresh.set_adapter("default")
    assert torch.equal(fresh(x), model(x))
    assert columns_in(fresh) == columns_in(model)


def test_an_adapter_of_a_strategy_that_is_not_there(tmp_path):
    """Somebody's own, or one that left: the columns are in the file."""
    model = get_peft_model(build(), config_of("weight_norm", ["up"]))
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"weight_norm"', '"activation_qr"'))
    loaded = PeftModel.from_pretrained(build(), tmp_path)
    assert loaded.peft_config["default"].selection == "activation_qr"
    assert columns_in(loaded) == columns_in(model)


def test_a_second_adapter_chooses_from_the_pretrained_weights():
    base = build()
    expected = columns_in(get_peft_model(copy.deepcopy(base), config_of("weight_norm")))
    model = get_peft_model(base, config_of("random"))
    fill(model)
    model(make_batches(1)[0][0])  # the first adapter's columns may be in the weights
    model.add_adapter("second", config_of("weight_norm"))
    assert columns_in(model, "second") == expected
    model.merge_adapter()
    with pytest.raises(ValueError, match="are merged into the weights, from which columns are to"):
        model.add_adapter("third", config_of("weight_norm"))


def test_a_weighted_sum_and_a_swapped_adapter_keep_their_columns(tmp_path):
    from pacatune.adapters.loading import hotswap_adapter

    model = get_peft_model(build(), config_of("weight_norm", ["up"]))
    model.save_pretrained(tmp_path)
    model.add_adapter("other", config_of({"up": [0, 1]}, ["up"]))
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    union = sorted({0, 1, *columns_in(model)["up"]})
    assert model.peft_config["sum"].columns == {"up": union} == columns_in(model, "sum")
    assert model.peft_config["sum"].selection == "fixed"
    hotswap_adapter(model, tmp_path, "other")
    swapped = model.peft_config["other"]
    assert (swapped.selection, swapped.columns) == ("weight_norm", columns_in(model))


def test_columns_from_a_file(tmp_path):
    model = get_peft_model(build(), config_of("weight_norm"))
    model.save_pretrained(tmp_path / "adapter")
    columns = load_columns(tmp_path / "adapter")
    assert columns == columns_in(model)
    save_columns(columns, tmp_path / "columns.safetensors")
    assert load_columns(tmp_path / "columns.safetensors") == columns
    assert columns_in(get_peft_model(build(), config_of(columns))) == columns


def test_files_without_columns(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(FileNotFoundError, match="none does not exist"):
        load_columns(tmp_path / "none")
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="holds no `paca_indices`; give a PaCA adapter, or"):
        load_columns(tmp_path / "a.safetensors")


@pytest.mark.parametrize("pattern", [{"up": 3}, {"up": 3, "embed": 64, "conv": 9, "down": 16}])
def test_narrow_weights_train_all_of_their_columns(pattern, caplog):
    """Whether `r` asks for more or a pattern does."""
    config = PacaConfig(r=16, target_modules=list(TARGETS), rank_pattern=pattern)
    model = build()
    log_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        fit_ranks(model, config)
    assert re.search(
        r"2 weights have fewer columns than their rank .*first '\w+' \(\d+\)", caplog.text
    )
    adapted = get_peft_model(model, config)
    kept = {name: len(columns) for name, columns in columns_in(adapted).items()}
    assert kept == {"embed": 8, "conv": 8, "up": 3, "down": 16}
    assert adapted.get_submodule("base_model.model.conv").scaling == {"default": 1.0}  # 8 / 8
    used = {name: rank for name, rank in pattern.items() if name in ("up", "down")}
    assert config.rank_pattern == {"^embed": 8, "^conv": 8, **used}


def test_a_narrow_weight_says_nothing_of_one_whose_name_ends_alike():
    model = nn.ModuleDict({"up": nn.Linear(4, 4), "block": nn.ModuleDict({"up": nn.Linear(32, 4)})})
    config = PacaConfig(r=16, target_modules=["up"])
    fit_ranks(model, config)
    adapted = get_peft_model(model, config)
    assert {name: len(own) for name, own in columns_in(adapted).items()} == {
        "up": 4,
        "block.up": 16,
    }
