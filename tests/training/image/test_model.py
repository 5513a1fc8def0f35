"""What a model says about itself, and what is refused, before any weight is read; mixed images
and mistakes beside."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import (
    AutoImageProcessor,
    BitImageProcessor,
    ConvNextImageProcessor,
)

from pacatune.training import RunConfig
from pacatune.training.image.config import PRESETS, find_preset
from pacatune.training.image.model import ImageBase, find_batch_norms, size_of
from pacatune.training.image.report import compare
from pacatune.training.image.task import ImageTask, ImageTrainer
from pacatune.training.task import find_heads, make_trainable
from pacatune.training.trainer import RunTrainer
from tests.adapters.fixtures import edit_json
from tests.image_models import CLASSES, save_timm
from tests.training.runs import read_json


def describe(path, image_size=None, classes=CLASSES):
    return ImageBase(str(path), None, classes, image_size)


def plan(config):
    task = ImageTask(config)
    task.base = describe(config.model.path, config.data.image_size)
    return task._plan()


def test_timm_model_as_timm_writes_it(timm_dir, tmp_path):
    base = describe(timm_dir, image_size=64)
    assert base.size == 64
    assert base.processor.size["shortest_edge"] == 67  # 168 of 160: what timm crops away
    assert base.config.pretrained_cfg["input_size"] == (3, 64, 64)
    # A transformer interpolates its positions for other sizes.
    arguments = {"model_args": {"depth": 1, "num_classes": 9}, "num_classes": 9}
    values = {"architecture": "vit_tiny_patch16_224", **arguments}
    values["pretrained_cfg"] = {"input_size": [3, 224, 224]}
    (tmp_path / "config.json").write_text(json.dumps(values))
    base = describe(tmp_path, image_size=64)
    assert base.config.model_args == {"depth": 1, "dynamic_img_size": True}
    assert describe(tmp_path).config.model_args == {"depth": 1}


@pytest.mark.parametrize(
    "values", [{"crop_pct": 0.75}, {"crop_pct": 1.0, "crop_mode": "squash"}, {"std": (0.2,) * 3}]
)
def test_images_are_prepared_as_timm_does(timm_dir, tmp_path, values):
    from timm.data import create_transform, resolve_data_config

    path = shutil.copytree(timm_dir, tmp_path / "model") / "config.json"
    pretrained = read_json(path)["pretrained_cfg"] | values
    edit_json(path, pretrained_cfg=pretrained)
    processor = describe(path.parent).processor
    rows, columns = np.mgrid[0:190, 0:240]
    pixels = np.stack([rows, columns, (rows // 40 + columns // 60) % 2 * 255], axis=2)
    image = Image.fromarray(pixels.astype(np.uint8))
    ours = processor(image, return_tensors="pt")["pixel_values"][0]
    settings = resolve_data_config(pretrained_cfg=pretrained)
    error = (create_transform(**settings)(image) - ours).abs()
    # One step of 255, by the deviation: tensors are resized here, images there.
    assert error.max() < 3 / 255 / min(processor.image_std)
    assert error.quantile(0.99) < 1.5 / 255 / min(processor.image_std)
    processor.save_pretrained(tmp_path)
    again = AutoImageProcessor.from_pretrained(tmp_path)
    assert torch.equal(again(image, return_tensors="pt")["pixel_values"][0], ours)


def test_another_size_crops_the_same_share_away(vit_dir, tmp_path):
    shutil.copytree(vit_dir, tmp_path / "model")
    crop = {"height": 32, "width": 32}
    for processor, share in (
        (BitImageProcessor(size={"shortest_edge": 40}, crop_size=crop), 40 / 32),
        (ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.8), 1),
    ):
        processor.save_pretrained(tmp_path / "model")
        for size in (16, 64):
            other = describe(tmp_path / "model", size).processor
            assert size_of(other) == size
            assert other.size["shortest_edge"] == share * size


def test_a_head_is_kept_for_the_same_classes_alone(vit_dir, tmp_path):
    labels = {"id2label": {"0": "blue", "1": "green"}, "label2id": {"blue": 0, "green": 1}}
    path = edit_json(shutil.copytree(vit_dir, tmp_path / "model") / "config.json", **labels)
    assert describe(path.parent, classes=["blue", "green"]).has_own_head
    assert not describe(path.parent, classes=["green", "blue"]).has_own_head
    assert describe(path.parent, classes=None).config.id2label == {0: "blue", 1: "green"}
    assert describe(vit_dir).config.label2id == {"blue": 0, "green": 1, "red": 2}
    stored = load_file(vit_dir / "model.safetensors")["classifier.weight"]
    for classes in (["cat", "dog"], None):  # of which the first would fit
        head = describe(vit_dir, classes=classes).load(torch.float32).classifier.weight
        assert torch.equal(head, stored) == (classes is None)


def test_weights_are_those_of_the_folder(vit_dir, tmp_path):
    stored, models = load_file(vit_dir / "model.safetensors"), []
    for _ in range(2):
        torch.manual_seed(5)  # on which a new head depends, alone
        models.append(describe(vit_dir).load(torch.float32))
    for name, tensor in models[0].state_dict().items():
        if not name.startswith("classifier"):
            assert any(torch.equal(tensor, other) for other in stored.values()), name
    assert models[0].classifier.weight.shape == (3, 32)
    assert torch.equal(*(model.classifier.weight for model in models))
    # What is missing is never random.
    shutil.copytree(vit_dir, tmp_path / "model")
    del stored[next(name for name in stored if "fc1.weight" in name or "intermediate" in name)]
    save_file(stored, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    message = "lacks 1 weights of ViTForImageClassification, or has them in other shapes"
    with pytest.raises(ValueError, match=message):
        describe(tmp_path / "model").load(torch.float32)


def test_what_is_trained_of_a_transformer(make_config):
    """The linear layers of its blocks and a new head, or one of them, or all."""
    head, linear = 32 * 3 + 3, 2 * (4 * 32 + 64 + 32)
    both = 2 * (4 * (32 + 32) + (32 + 64) + (64 + 32))
    for method, number in {
        "paca": 16 * linear + head,
        "lora": 8 * both + head,
        "dora": 8 * both + linear + head,
        "head": head,
    }.items():
        planned, adapter_config, notes = plan(make_config(method))
        assert planned.num_trainable_parameters == number, method
        assert notes == []
        if method == "head":
            assert adapter_config is None
            continue
        assert len(planned.targets) == 12
        assert all(".layer" in name for name in planned.targets)
        assert adapter_config.modules_to_save == ["classifier"]
    full = plan(make_config("full"))[0]
    assert full.num_trainable_parameters == full.num_parameters
    # Heads are never targets.
    section = {"r": 4, "target_modules": "all-linear", "exclude_modules": ["fc1"]}
    planned, adapter_config, _ = plan(make_config(paca=section))
    assert "classifier" not in planned.targets
    assert adapter_config.modules_to_save == ["classifier"]
    assert len(planned.targets) == 10


def test_what_is_trained_of_a_cnn(make_cnn, timm_dir):
    planned, _, notes = plan(make_cnn())
    assert any("conv_dw" in name for name in planned.targets)
    assert not any("conv_stem" in name or "classifier" in name for name in planned.targets)
    assert notes == ["1 x conv_stem left as it is: fewer than 8 input channels."]
    lora, _, notes = plan(make_cnn("lora"))
    assert lora.targets
    assert not any("conv_dw" in name for name in lora.targets)
    assert "or grouped (depthwise), which PaCA adapts" in notes[0]
    # BatchNorm is saved for its statistics; its scale is not trained.
    trained, adapter_config, _ = plan(make_cnn(training={"train_batch_norm": True}))
    assert trained.num_trainable_parameters == planned.num_trainable_parameters
    names = [name for name in adapter_config.modules_to_save if "bn" in name]
    assert len(names) == len(find_batch_norms(describe(timm_dir).empty_model()))


NO_NORM = "train_batch_norm` is true, but ViTForImageClassification has no BatchNorm; leave it"
NOWHERE = r"'timm/resnet18\.a1_in1k'\) is neither a file or folder here nor a model of the hub"
FEW = r"every convolution of Timm.* has fewer than 5000 input channels.*lower `r`"
DEPTHWISE = {"r": 4, "target_modules": ["conv_dw"]}


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer")
@pytest.mark.parametrize(
    ("kind", "method", "options", "message"),
    [
        ("vit", "paca", {"training": {"train_batch_norm": True}}, NO_NORM),
        ("vit", "paca", {"model": {"path": "resnet18"}}, NOWHERE),
        ("cnn", "lora", {"lora": {"r": 5000}}, FEW),
        ("cnn", "lora", {"lora": DEPTHWISE}, r"Conv2d with groups=\d+ and rank 4"),
    ],
)
def test_refused(make_config, make_cnn, kind, method, options, message):
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        plan((make_cnn if kind == "cnn" else make_config)(method, **options))


@pytest.mark.parametrize(
    ("architecture", "heads"),
    [
        ("test_vit", ["timm_model.head"]),
        ("test_resnet", ["timm_model.fc"]),
        ("test_convnext", ["timm_model.head.fc"]),
        ("test_efficientnet", ["timm_model.classifier"]),
    ],
)
def test_adapters_on_timm_models(make_config, tmp_path, architecture, heads):
    save_timm(tmp_path / "model", architecture)
    _, adapter_config, _ = plan(make_config(model={"path": str(tmp_path / "model")}))
    base = describe(tmp_path / "model")
    assert find_heads(base.empty_model()) == heads
    model = make_trainable(base.load(torch.float32), adapter_config, "paca")
    assert any(isinstance(module, BaseTunerLayer) for module in model.modules())
    pixels = torch.randn(2, 3, base.size, base.size)
    model(pixel_values=pixels).logits.sum().backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained == {n for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_runs(name):
    given = {"model": {}, "data": {}, "training": {}}
    for option, value in find_preset(name).items():
        section, _, key = option.partition(".")
        given[section][key] = value
    assert RunConfig(task="image", **given).data.eval_split == "test"


def test_images_are_mixed_in_the_shares_of_their_classes(monkeypatch):
    pixels, labels = torch.randn(6, 3, 4, 4), torch.tensor([0, 1, 2, 2, 1, 0])
    trainer = object.__new__(ImageTrainer)
    trainer.args = SimpleNamespace(mixup_alpha=0.4, train_batch_norm=True)
    trainer.model = SimpleNamespace(training=True, config=SimpleNamespace(num_labels=3))
    monkeypatch.setattr(RunTrainer, "compute_loss", lambda self, model, inputs: inputs)
    mixed = trainer.compute_loss(trainer.model, {"labels": labels, "pixel_values": pixels})
    classes = F.one_hot(labels, 3).float()
    share = mixed["labels"][1, 1]  # its partner is of another class
    assert 0 < share < 1
    for values, name in ((pixels, "pixel_values"), (classes, "labels")):
        expected = share * values + (1 - share) * values.roll(1, 0)
        torch.testing.assert_close(mixed[name], expected)


def test_surest_mistakes_come_first():
    places = {"place": [f"{number}.png" for number in range(4)]}
    images = SimpleNamespace(classes=("cat", "dog"), table=places)
    logits = np.array([[2.0, 0.0], [0.0, 1.0], [0.0, 5.0], [3.0, 0.0]], np.float32)
    found = compare(logits, np.array([1, 0, 0, 0]), images)
    first, second, third = found["mistakes"]
    assert (first["place"], first["label"], first["predicted"]) == ("2.png", "cat", "dog")
    assert first["probability"] == pytest.approx(1 / (1 + np.exp(-5.0)))
    assert [second["position"], third["position"]] == [0, 1]
    assert found["confusion"] == [[1, 2], [1, 0]]
