"""Table 6: ViT-B/16, LoRA and PaCA."""

from pacatune.experiments.paper.tables import TABLE_6
from pacatune.experiments.reproduce.image_spec import ImageTable
from pacatune.experiments.reproduce.image_steps import build_vit
from pacatune.experiments.reproduce.images import make_experiment

__all__ = ["EXPERIMENT"]

EXPERIMENT = make_experiment(
    ImageTable(
        table=TABLE_6,
        about=(
            "The paper fine-tunes ViT-B/16, a transformer for images, on four data sets, by LoRA "
            "and by PaCA, to show that PaCA is not for language alone.",
        ),
        task="dinov2-cifar10",
        small_model="DINOv2-S (22 M parameters, fine-tuned for saliency by others)",
        num_steps=30,
        build=build_vit,
        model="ViT-B/16",
        num_images=4,
        image_size=224,
        presets={
            "cifar10": "vit-b16-cifar10",
            "cifar100": "vit-b16-cifar100",
            "pets": "vit-b16-pets",
            "flowers102": "vit-b16-flowers102",
        },
        notes=(
            "CIFAR-100, Oxford-IIIT Pets and Oxford-Flowers 102 cannot be had offline, so their "
            "columns have no counterpart at the small scale.",
        ),
    )
)
