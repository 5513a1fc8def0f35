"""Several adapters on one model, side by side, added up and swapped."""

import pytest
import torch
from peft import PeftModel

from pacatune import PacaConfig
from pacatune.adapters.loading import hotswap_adapter
from tests.tuner.small_llama import adapt, logits, paca_layers, randomise


class TestSeveralAdapters:
    def test_weighted_sum_is_exact(self, base, ids, tmp_path):
        model = adapt(base)
        model.add_adapter("b", PacaConfig(r=6, paca_alpha=3, target_modules=["q_proj", "up_proj"]))
        randomise(model, 3, "b")
        model.add_weighted_adapter(["default", "b"], [0.5, -2.0], "sum")
        for layer in paca_layers(model):
            want = sum(
                weight * layer.get_delta_weight(name)
                for name, weight in (("default", 0.5), ("b", -2.0))
                if name in layer.r
            )
            torch.testing.assert_close(layer.get_delta_weight("sum"), want)
        model.set_adapter("sum")
        want = logits(model, ids)
        model.save_pretrained(tmp_path, selected_adapters=["sum"])
        loaded = PeftModel.from_pretrained(base, tmp_path / "sum")
        torch.testing.assert_close(logits(loaded, ids), want)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((["default"], [1.0, 2.0], "sum"), r"`adapters` \(1\) and `weights` \(2\)"),
            ((["nobody"], [1.0], "sum"), r"\['nobody'\] do not exist"),
            ((["default"], [1.0], "default"), r"'default'\) is taken"),
            ((["default"], [1.0], "sum", "svd"), r"'svd'\) must be 'linear'"),
        ],
    )
    def test_wrong_sums(self, base, arguments, message):
        with pytest.raises(ValueError, match=message):
            adapt(base).add_weighted_adapter(*arguments)

    def test_mixed_batch_equals_separate_passes(self, base, ids):
        model = adapt(base)
        model.add_adapter("b", PacaConfig(r=6, target_modules=["q_proj", "up_proj"]))
        randomise(model, 3, "b")
        model.eval()
        mixed = logits(model, ids, adapter_names=["b", "__base__", "default"])
        for row, name in ((0, "b"), (2, "default")):
            model.set_adapter(name)
            torch.testing.assert_close(mixed[row], logits(model, ids)[row], atol=1e-5, rtol=1e-5)
        with model.disable_adapter():
            torch.testing.assert_close(mixed[1], logits(model, ids)[1], atol=1e-5, rtol=1e-5)

    def test_mixed_batch_errors(self, base, ids):
        model = adapt(base).eval()
        with pytest.raises(ValueError, match=r"non-existing adapter\(s\): nobody"):
            model(input_ids=ids, adapter_names=["nobody", "default", "default"])
        with pytest.raises(ValueError, match="got 2 and 3 respectively"):
            model(input_ids=ids, adapter_names=["default", "default"])
        with pytest.raises(ValueError, match="training mode"):
            model.train()(input_ids=ids, adapter_names=["default"] * 3)
        model.eval().merge_adapter()
        with pytest.raises(ValueError, match="unmerge_adapter"):
            model(input_ids=ids, adapter_names=["default"] * 3)


class TestHotswap:
    @pytest.mark.parametrize("rank", [4, 7])
    def test_takes_over_values_columns_and_scaling(self, base, ids, tmp_path, rank):
        other = adapt(base, seed=1, r=rank, paca_alpha=3, random_seed=8)
        other.save_pretrained(tmp_path)
        model = adapt(base)
        held = paca_layers(model)[0].delta_of("default")
        logits(model, ids)
        hotswap_adapter(model, tmp_path)
        assert torch.equal(logits(model, ids), logits(other, ids))
        assert (paca_layers(model)[0].delta_of("default") is held) == (rank == 4)
        with model.disable_adapter():
            assert torch.equal(logits(model, ids), logits(base, ids))

    def test_refuses_what_does_not_fit(self, base, tmp_path):
        adapt(base, target_modules=["q_proj"]).save_pretrained(tmp_path)
        model = adapt(base)
        with pytest.raises(ValueError, match=r"do not adapt the same modules.*down_proj"):
            hotswap_adapter(model, tmp_path)
        with pytest.raises(ValueError, match=r"'nobody'\) is no adapter"):
            hotswap_adapter(model, tmp_path, "nobody")
        adapt(base).save_pretrained(tmp_path)
        model.merge_adapter()
        with pytest.raises(ValueError, match="is merged"):
            hotswap_adapter(model, tmp_path)
