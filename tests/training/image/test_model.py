"""What a model says about itself, and what is refused, before any weight is read."""

import json
import shutil

import numpy as np
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import BitImageProcessor, ConvNextImageProcessor

from pacatune.training import LoraSection, PacaSection
from pacatune.training.image.model import ImageBase, find_batch_norms, size_of
from pacatune.training.image.task import ImageTask
from pacatune.training.task import find_heads, make_trainable
from tests.image_models import CLASSES, save_timm


def describe(path, image_size=None, classes=CLASSES):
    return ImageBase(str(path), None, classes, image_size)


def test_transformers_model(vit_dir):
    base = describe(vit_dir)
    assert base.path == str(vit_dir)
    assert base.size == 32
    assert dict(base.processor.size) == {"height": 32, "width": 32}
    assert base.config.num_labels == 3
    assert base.config.label2id == {"blue": 0, "green": 1, "red": 2}
    assert not base.has_own_head
    assert base.empty_model().classifier.out_features == 3


def test_timm_model_as_timm_writes_it(timm_dir):
    base = describe(timm_dir, image_size=64)
    assert base.size == 64
    assert base.processor.size["shortest_edge"] == 67  # 168 of 160: what timm crops away
    assert base.config.pretrained_cfg["input_size"] == (3, 64, 64)
    assert base.empty_model().timm_model.get_classifier().out_features == 3


@pytest.mark.parametrize(
    "values", [{"crop_pct": 0.75}, {"crop_pct": 1.0, "crop_mode": "squash"}, {"std": (0.2,) * 3}]
)
def test_images_are_prepared_as_timm_does(timm_dir, tmp_path, values):
    from timm.data import create_transform, resolve_data_config
    from transformers import AutoImageProcessor

    shutil.copytree(timm_dir, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    description = json.loads(path.read_text())
    description["pretrained_cfg"] |= values
    path.write_text(json.dumps(description))
    processor = describe(path.parent).processor
    rows, columns = np.mgrid[0:190, 0:240]
    pixels = np.stack([rows, columns, (rows // 40 + columns // 60) % 2 * 255], axis=2)
    image = Image.fromarray(pixels.astype(np.uint8))
    ours = processor(image, return_tensors="pt")["pixel_values"][0]
    settings = resolve_data_config(pretrained_cfg=description["pretrained_cfg"])
    error = (create_transform(**settings)(image) - ours).abs()
    # One step of 255, by the deviation: tensors are resized here, images there.
    assert error.max() < 3 / 255 / min(processor.image_std)
    assert error.quantile(0.99) < 1.5 / 255 / min(processor.image_std)
    processor.save_pretrained(tmp_path)
    again = AutoImageProcessor.from_pretrained(tmp_path)
    assert torch.equal(again(image, return_tensors="pt")["pixel_values"][0], ours)


@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize(
    "processor",
    [
        BitImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}),
        ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.8),
    ],
)
def test_another_size_crops_the_same_share_away(vit_dir, tmp_path, size, processor):
    shutil.copytree(vit_dir, tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    other = describe(tmp_path / "model", size).processor
    assert size_of(other) == size
    edge = other.size["shortest_edge"]
    assert edge == (size if other.to_dict().get("crop_pct") == 0.8 else size * 40 // 32)


def test_head_of_the_same_classes_is_kept(vit_dir, tmp_path):
    shutil.copytree(vit_dir, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    labels = {"id2label": {"0": "blue", "1": "green"}, "label2id": {"blue": 0, "green": 1}}
    path.write_text(json.dumps(json.loads(path.read_text()) | labels))
    assert describe(path.parent, classes=["blue", "green"]).has_own_head
    assert not describe(path.parent, classes=["green", "blue"]).has_own_head
    assert describe(path.parent, classes=None).config.id2label == {0: "blue", 1: "green"}


def test_other_sizes_of_a_timm_transformer(tmp_path):
    description = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 1000,
        "model_args": {"depth": 1, "num_classes": 1000},
    }
    (tmp_path / "config.json").write_text(
        json.dumps({**description, "pretrained_cfg": {"input_size": [3, 224, 224]}})
    )
    base = describe(tmp_path, image_size=64)
    assert base.config.model_args == {"depth": 1, "dynamic_img_size": True}
    assert describe(tmp_path).config.model_args == {"depth": 1}


@pytest.mark.parametrize(
    "path", ["owner/model", "timm/resnet18.a1_in1k", "resnet18.a1_in1k", "resnet18.no_such"]
)
def test_hub_model_without_a_network(path):
    with pytest.raises(
        FileNotFoundError, match=r"is neither a file or folder here nor a model of the hub"
    ):
        describe(path)


def test_bare_name_of_timm_is_its_hub_id():
    with pytest.raises(FileNotFoundError, match=r"'timm/resnet18\.a1_in1k'\) is neither"):
        describe("resnet18")


def plan(config):
    return ImageTask(config)._plan(CLASSES)


@pytest.mark.parametrize("method", ["paca", "lora"])
def test_transformer_has_the_linear_layers_of_its_blocks_adapted(make_config, method):
    planned, adapter_config, notes = plan(make_config(method))
    assert len(planned.targets) == 12
    assert all(".layer" in name for name in planned.targets)
    assert adapter_config.modules_to_save == ["classifier"]
    assert notes == []
    head = 32 * 3 + 3
    linear = 4 * (32 + 32) + (32 + 64) + (64 + 32) if method == "lora" else 4 * 32 + 64 + 32
    rank = {"paca": 16, "lora": 8}[method]
    assert planned.num_trainable_parameters == 2 * rank * linear + head


def test_kin_of_lora(make_config, cnn):
    lora, _, _ = plan(make_config("lora"))
    dora, adapter_config, _ = plan(make_config("dora"))
    assert adapter_config.use_dora
    magnitudes = 2 * (4 * 32 + 64 + 32)
    assert dora.num_trainable_parameters == lora.num_trainable_parameters + magnitudes
    moslora, adapter_config, _ = plan(make_config("moslora"))
    assert adapter_config.peft_type == "MOSLORA"
    assert adapter_config.modules_to_save == ["classifier"]
    assert moslora.num_trainable_parameters == lora.num_trainable_parameters + 12 * 8 * 8
    assert plan(make_config("dora", **cnn))[0].targets.keys() == (
        plan(make_config("lora", **cnn))[0].targets.keys()
    )
    with pytest.raises(
        TypeError, match=r"\(Conv2d\) is not supported. MosLoRA adapts torch.nn.Linear"
    ):
        plan(make_config("moslora", **cnn))


def test_methods_without_an_adapter(make_config):
    head, adapter_config, _ = plan(make_config("head"))
    assert adapter_config is None
    assert head.num_trainable_parameters == 32 * 3 + 3
    full, _, _ = plan(make_config("full"))
    assert full.num_trainable_parameters == full.num_parameters


def test_cnn_has_its_convolutions_adapted(make_config, cnn):
    planned, _, notes = plan(make_config("paca", **cnn))
    assert any("conv_dw" in name for name in planned.targets)
    assert not any("conv_stem" in name or "classifier" in name for name in planned.targets)
    assert notes == ["1 x conv_stem left as it is: fewer input channels than the rank 8."]


@pytest.mark.parametrize("method", ["paca", "lora", "dora"])
def test_rank_above_every_convolution_is_refused(make_config, cnn, method):
    name = "paca" if method == "paca" else "lora"
    section = {"paca": PacaSection, "lora": LoraSection}[name](r=5000)
    with pytest.raises(
        ValueError,
        match=r"every convolution of Timm.* has fewer input channels than the rank 5000.*lower `r`",
    ):
        plan(make_config(method, **{**cnn, name: section}))


def test_lora_leaves_grouped_convolutions_out_and_says_so(make_config, cnn):
    planned, _, notes = plan(make_config("lora", **cnn))
    assert planned.targets
    assert not any("conv_dw" in name for name in planned.targets)
    assert notes[0].startswith("2 x conv_dw, 1 x conv_stem left as it is: ")
    assert "or grouped (depthwise), which PaCA adapts" in notes[0]


def test_lora_on_a_grouped_convolution_is_refused(make_config, cnn):
    config = make_config("lora", **{**cnn, "lora": LoraSection(r=4, target_modules=["conv_dw"])})
    with (
        pytest.warns(UserWarning, match="Merging is not supported"),
        pytest.raises(ValueError, match=r"Targeting a Conv2d with groups=\d+ and rank 4"),
    ):
        plan(config)


@pytest.mark.parametrize("exclude", [None, ["fc1"], ".*k_proj|.*key"])
def test_heads_are_never_targets(make_config, exclude):
    section = PacaSection(r=4, target_modules="all-linear", exclude_modules=exclude)
    planned, adapter_config, _ = plan(make_config(paca=section))
    assert "classifier" not in planned.targets
    assert adapter_config.modules_to_save == ["classifier"]
    assert len(planned.targets) == (10 if exclude else 12)


def test_rank_out_of_range(make_config):
    with pytest.raises(ValueError, match=r"33.*32"):
        plan(make_config(paca=PacaSection(r=33)))


def test_batch_norm_that_the_model_lacks(make_config):
    for method in ("paca", "head"):
        config = make_config(method, training={"train_batch_norm": True})
        with pytest.raises(
            ValueError, match=r"train_batch_norm` is true, but ViT.* has no BatchNorm"
        ):
            plan(config)


def test_trained_batch_norm_is_saved_but_its_scale_is_not_trained(make_config, cnn):
    config = make_config(training={"train_batch_norm": True}, **cnn)
    planned, adapter_config, _ = plan(config)
    without, _, _ = plan(make_config(**cnn))
    assert planned.num_trainable_parameters == without.num_trainable_parameters
    names = [name for name in adapter_config.modules_to_save if "bn" in name]
    assert len(names) == len(find_batch_norms(load(config)))


def load(config):
    base = ImageBase(config.model.path, None, CLASSES, config.data.image_size)
    return base.load(torch.float32)


def test_weights_are_those_of_the_folder(make_config, vit_dir):
    model = load(make_config())
    stored = load_file(vit_dir / "model.safetensors")
    torch.manual_seed(0)
    for name, tensor in model.state_dict().items():
        if not name.startswith("classifier"):
            assert any(torch.equal(tensor, other) for other in stored.values()), name
    assert model.classifier.weight.shape == (3, 32)


def test_new_head_depends_on_the_seed_alone(make_config):
    heads = []
    for _ in range(2):
        torch.manual_seed(5)
        heads.append(load(make_config()).classifier.weight)
    assert torch.equal(*heads)


def test_head_of_other_classes_is_new_although_it_would_fit(make_config, tmp_path, vit_dir):
    base = ImageBase(str(vit_dir), None, ["cat", "dog"], None)
    stored = load_file(vit_dir / "model.safetensors")["classifier.weight"]
    assert not torch.equal(base.load(torch.float32).classifier.weight, stored)
    same = ImageBase(str(vit_dir), None, None, None)
    assert torch.equal(same.load(torch.float32).classifier.weight, stored)


def test_missing_weights_are_never_random(make_config, tmp_path, vit_dir):
    folder = tmp_path / "model"
    shutil.copytree(vit_dir, folder)
    tensors = load_file(folder / "model.safetensors")
    lost = next(name for name in tensors if "fc1.weight" in name or "intermediate" in name)
    del tensors[lost]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"lacks 1 weights of ViTForImageClassification, or has the"
    ):
        load(make_config(model={"path": str(folder)}))


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
    save_timm(tmp_path, architecture)
    config = make_config(model={"path": str(tmp_path)}, paca=PacaSection(r=4))
    base = ImageBase(str(tmp_path), None, CLASSES, None)
    assert find_heads(base.empty_model()) == heads
    _, adapter_config, _ = plan(config)
    model = make_trainable(base.load(torch.float32), adapter_config, "paca")
    assert any(isinstance(module, BaseTunerLayer) for module in model.modules())
    pixels = torch.randn(2, 3, base.size, base.size)
    model(pixel_values=pixels).logits.sum().backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained == {n for n, p in model.named_parameters() if p.requires_grad}


def test_two_heads_are_both_trained():
    from transformers import AutoModelForImageClassification, DeiTConfig

    config = DeiTConfig(architectures=["DeiTForImageClassificationWithTeacher"])
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(config)
    assert find_heads(model) == ["cls_classifier", "distillation_classifier"]


def test_adapter_names_its_base(make_config, vit_dir, tmp_path):
    config = make_config(model={"revision": "main"})
    base = ImageBase(config.model.path, None, CLASSES, None)
    _, adapter_config, _ = plan(config)
    make_trainable(base.load(torch.float32), adapter_config, "paca").save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(vit_dir)
    assert saved["revision"] == "main"
