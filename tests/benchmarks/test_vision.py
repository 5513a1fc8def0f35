"""The benchmark of image models: small runs give complete results, and what they count is right."""

import dataclasses
import json

import pytest
import torch
from torch import nn

from benchmarks import image_models, tables, vision
from benchmarks.image_models import MODELS, adapted_layers, make_model, positions_of
from benchmarks.methods import RANK, adapt
from pacatune.experiments.reproduce.image_steps import NUM_CLASSES, make_batch

QUICK = ["--seconds", "0", "--min-rounds", "2", "--warmup", "1", "--threads", "1"]
QUICK += ["--dtypes", "float32"]
NUM_PATCHES, HIDDEN = 16, 32


def tiny_vit():
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        num_labels=NUM_CLASSES,
    )
    model = ViTForImageClassification._from_config(config, attn_implementation="sdpa")
    model.vit.embeddings.register_forward_hook(image_models._ask_for_gradient)
    return model


def tiny_cnn():
    from transformers import AutoModelForImageClassification, TimmWrapperConfig

    config = TimmWrapperConfig.from_dict(
        {
            "architecture": "test_efficientnet",
            "num_classes": NUM_CLASSES,
            "model_args": {"pad_type": "same"},  # as the TensorFlow-born ones are
        }
    )
    return AutoModelForImageClassification.from_config(config)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Both results by the model's name, and their folder."""
    folder = tmp_path_factory.mktemp("vision")
    sizes = {"image_size": 32, "counted_size": 32}
    tiny = {
        "vit-b16": dataclasses.replace(MODELS["vit-b16"], build=tiny_vit, **sizes),
        "efficientnetv2-l": dataclasses.replace(
            MODELS["efficientnetv2-l"], build=tiny_cnn, **sizes
        ),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vision, "MODELS", tiny)
        vision.main(["--output", str(folder), *QUICK])
    found = {name: json.loads((folder / f"vision-{name}.json").read_text()) for name in tiny}
    return found, folder


def by_method(result):
    return {row["method"]: row for row in result["rows"]}


def test_every_method_is_measured(results):
    for name, result in results[0].items():
        assert list(by_method(result)) == list(MODELS[name].methods) == list(result["methods"])
        assert "timm" in result["versions"]
        for row in result["rows"]:
            assert row["num_rounds"] == 2
            assert 0 < row["step_ms_min"] <= row["step_ms"]
            assert row["counted"] == "1 image of 32 px"


def test_targets_are_in_the_result(results):
    vit, cnn = results[0].values()
    for result, reference, step, kept in ((vit, "lora", 0.75, 0.65), (cnn, "full", 0.88, 0.80)):
        times = [r for r in result["ratios"] if r["target"] is not None]
        assert [(r["reference"], r["target"]) for r in times] == [(reference, step)]
        shares = [r for r in result["byte_ratios"] if r["target"] is not None]
        assert [(r["method"], r["reference"], r["target"]) for r in shares] == [
            ("paca", reference, kept)
        ]
        rows = by_method(result)
        expected = rows["paca"]["saved_bytes"] / rows[reference]["saved_bytes"]
        assert shares[0]["ratio"] == pytest.approx(expected)
        assert shares[0]["is_reached"] is (expected <= kept)


def test_vit_keeps_the_formula_beyond_the_frozen_model(results):
    rows = by_method(results[0]["vit-b16"])
    per_layer = (NUM_PATCHES + 1) * RANK * 4
    kept = rows["paca"]["saved_bytes_by_layer"]
    assert set(kept.values()) == {2 * per_layer}
    assert len(kept) == 6
    assert rows["paca"]["saved_bytes_beyond_frozen"] == 6 * 2 * per_layer
    assert rows["lora"]["saved_bytes_beyond_frozen"] > 6 * 2 * per_layer


def test_cnn_keeps_the_formula_and_lean_batch_norm_keeps_less(results):
    rows = by_method(results[0]["efficientnetv2-l"])
    assert rows["paca"]["saved_bytes_by_layer"] == rows["paca"]["formula_bytes_by_layer"]
    assert rows["paca_lean"]["saved_bytes_by_layer"] == rows["paca"]["saved_bytes_by_layer"]
    norms = make_model(dataclasses.replace(MODELS["efficientnetv2-l"], build=tiny_cnn), 0).eval()
    sizes = []
    for layer in norms.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_hook(lambda m, args, y: sizes.append(args[0].numel()))
    norms(pixel_values=make_batch(1, 32, torch.float32, 0)[0])
    saved = rows["paca"]["saved_bytes"] - rows["paca_lean"]["saved_bytes"]
    assert saved == 4 * sum(sizes[1:])  # all but that before the first adapted layer


def test_tables_are_made_of_the_results(results):
    _, folder = results
    lines = tables.table("vision-vit-b16", folder).splitlines()
    assert lines[2].startswith("| 4 images of 32 px, float32 | ")
    lines = tables.byte_table("vision-efficientnetv2-l", folder).splitlines()
    assert lines[0] == (
        "| kept for backward, MB (PaCA's share) | paca | paca_lean | lora | lora_lean | full "
        "| head |"
    )
    assert lines[2].startswith("| 1 image of 32 px, float32 | ")
    assert "vision-efficientnetv2-l.json" in lines[-1]


def test_statistics_are_those_of_random_images():
    model = make_model(dataclasses.replace(MODELS["efficientnetv2-l"], build=tiny_cnn), seed=0)
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    spreads = []
    for layer in norms:
        assert layer.momentum is not None
        layer.act.register_forward_pre_hook(lambda m, args: spreads.append(float(args[0].std())))
    with torch.no_grad():
        model.eval()(pixel_values=make_batch(4, 96, torch.float32, 1)[0])
    assert len(spreads) == len(norms)
    assert all(0.5 < spread < 2 for spread in spreads)


def test_positions_are_those_of_padded_images():
    base = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), nn.Flatten())
    base.append(nn.Linear(8 * 4 * 5, 3))
    model = adapt(base, "paca", targets=["0", "2"], seed=0).model
    layers = adapted_layers(model)
    found = positions_of(layers, lambda: model(torch.randn(2, 8, 4, 5)))
    assert [found[layer] for layer in layers] == [2 * 6 * 7, 2]
    assert not any(layer._forward_pre_hooks for layer in layers)


def test_other_sizes_have_no_targets(tmp_path, monkeypatch):
    tiny = dataclasses.replace(MODELS["vit-b16"], build=tiny_vit, counted_size=32)
    monkeypatch.setattr(vision, "MODELS", {"vit-b16": tiny})
    options = ["--models", "vit-b16", "--methods", "paca", "lora", "--image-size", "32"]
    vision.main([*options, "--batch-size", "1", "--output", str(tmp_path), *QUICK])
    result = json.loads((tmp_path / "vision-vit-b16.json").read_text())
    assert [row["setting"] for row in result["rows"]] == ["1 image of 32 px, float32"] * 2
    assert [ratio["target"] for ratio in result["ratios"]] == [None]


def test_wrong_options_are_explained(capsys):
    for options, message in (
        (["--models", "resnet"], "invalid choice: 'resnet'"),
        (["--methods", "dora2"], "invalid choice: 'dora2'"),
        (["--batch-size", "0"], "must be an integer of at least 1, got 0"),
    ):
        with pytest.raises(SystemExit):
            vision.parse(options)
        assert message in capsys.readouterr().err


def test_head_needs_a_name():
    with pytest.raises(ValueError, match=r"`method` \('head'\) must be one of"):
        adapt(nn.Linear(2, 2), "head", targets="x", seed=0)
