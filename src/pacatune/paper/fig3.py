"""Figure 3: throughput over the batch. Its curves are not readable; what the text says is here."""

from dataclasses import dataclass

__all__ = ["DEVICES", "METHODS", "PLACE", "TITLE", "Throughput"]

TITLE = "Throughput over the batch, until memory ends"
PLACE = "Figure 3, section 4.4; settings in Table 13"
METHODS = ("lora", "dora", "moslora", "paca")


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """PaCA at its largest batch on one device, and as a multiple of LoRA at its own."""

    sentences_per_second: float
    rate_ratio: float
    batch_ratio: float


# "10.36 sentences/s on A100 GPU and 15.5 sentences/s on Gaudi2 HPU, representing a 16% improvement
# for both"; "increase the batch size by 33% on the NVIDIA A100 GPU and 21% on the Intel Gaudi2".
DEVICES = {
    "A100": Throughput(sentences_per_second=10.36, rate_ratio=1.16, batch_ratio=1.33),
    "Gaudi2": Throughput(sentences_per_second=15.5, rate_ratio=1.16, batch_ratio=1.21),
}
