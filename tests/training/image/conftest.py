import pytest

from tests.image_models import save_timm


@pytest.fixture(scope="session")
def timm_dir(tmp_path_factory):
    """Folder of a tiny EfficientNet, as timm writes it."""
    return save_timm(tmp_path_factory.mktemp("timm"))


@pytest.fixture
def make_config(make_config, vit_dir, images_dir):
    """Build a run of 8 steps, a checkpoint every second; options override what it says."""

    def make(method="paca", *, model=None, data=None, training=None, **options):
        return make_config(
            method,
            task="image",
            model={"path": str(vit_dir), **(model or {})},
            data={"path": str(images_dir), **(data or {})},
            training={"max_steps": 8, "per_device_train_batch_size": 6, **(training or {})},
            **options,
        )

    return make


@pytest.fixture
def make_cnn(make_config, timm_dir):
    """Build a run on the tiny EfficientNet."""

    def make(method="paca", **options):
        model, data = {"path": str(timm_dir)}, {"image_size": 32}
        sections = {"paca": {"paca": {"r": 8, "paca_alpha": 8}}, "full": {}, "head": {}}
        section = sections.get(method, {"lora": {"r": 4}})
        return make_config(method, **{"model": model, "data": data, **section, **options})

    return make
