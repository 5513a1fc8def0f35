"""Table 7: EfficientNetV2-L, full fine-tuning and PaCA."""

from pacatune.experiments.paper.tables import TABLE_7
from pacatune.experiments.reproduce.image_spec import ImageTable
from pacatune.experiments.reproduce.image_steps import build_efficientnet
from pacatune.experiments.reproduce.images import make_experiment

__all__ = ["EXPERIMENT"]

EXPERIMENT = make_experiment(
    ImageTable(
        table=TABLE_7,
        about=(
            "LoRA's matrices are linear layers and do not merge into every kind of convolution; "
            "PaCA trains some input channels of any. The paper fine-tunes EfficientNetV2-L, a "
            "convolutional network, in full and by PaCA.",
        ),
        task="efficientnet-cifar10",
        small_model="EfficientNet-Lite0 (3.4 M parameters, ImageNet weights)",
        num_steps=40,
        build=build_efficientnet,
        model="EfficientNetV2-L",
        num_images=2,
        image_size=192,
        presets={
            "cifar10": "efficientnetv2-l-cifar10",
            "cifar100": "efficientnetv2-l-cifar100",
        },
        notes=(
            "CIFAR-100 cannot be had offline, so its column has no counterpart at the small scale.",
            "The paper trained BatchNorm in a way that it does not state; here it stays in "
            "evaluation mode.",
        ),
    )
)
