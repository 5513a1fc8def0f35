import pytest

from pacatune.data.config import ImageDataConfig
from pacatune.training import LoraSection, PacaSection, RunConfig
from pacatune.training.image import ImageModelConfig, ImageTrainingConfig
from tests.image_models import save_timm, save_vit, write_images


@pytest.fixture(scope="session")
def vit_dir(tmp_path_factory):
    """Folder of a tiny ViT with its transform and a head of two classes."""
    return save_vit(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="session")
def timm_dir(tmp_path_factory):
    """Folder of a tiny EfficientNet, as timm writes it."""
    return save_timm(tmp_path_factory.mktemp("timm"))


@pytest.fixture(scope="session")
def images_dir(tmp_path_factory):
    """Three colours: 12 training and 6 test images of each."""
    folder = tmp_path_factory.mktemp("images")
    write_images(folder / "train", 12)
    write_images(folder / "test", 6, seed=1)
    return folder


@pytest.fixture
def make_config(vit_dir, images_dir, tmp_path):
    """Build a run of 8 steps, a checkpoint every second; options override what it says."""

    def make(method="paca", *, model=None, data=None, training=None, **options):
        if method in ("full", "head"):
            options = {k: v for k, v in options.items() if k not in ("paca", "lora")}
        elif options.keys() >= {"paca", "lora"}:
            options.pop("lora" if method == "paca" else "paca")
        return RunConfig(
            task="image",
            method=method,
            model=ImageModelConfig(**{"path": str(vit_dir), **(model or {})}),
            data=ImageDataConfig(**{"path": str(images_dir), **(data or {})}),
            training=ImageTrainingConfig(
                **{
                    "output_dir": str(tmp_path / "out"),
                    "report_to": "none",
                    "learning_rate": 5e-3,
                    "bf16": False,
                    "max_steps": 8,
                    "per_device_train_batch_size": 6,
                    "save_steps": 2,
                    "eval_steps": 4,
                    "use_cpu": True,
                    **(training or {}),
                }
            ),
            **options,
        )

    return make


@pytest.fixture
def cnn(timm_dir):
    """Options of a run on the tiny EfficientNet."""
    return {
        "model": {"path": str(timm_dir)},
        "data": {"image_size": 32},
        "paca": PacaSection(r=8, paca_alpha=8),
        "lora": LoraSection(r=4),
    }
