"""Figure 3: throughput over the batch. Its curves are not readable; what the text says is here."""

from dataclasses import dataclass

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

# Method -> batch -> milliseconds of forward and backward; the last batch is the largest that ran.
AUTHORS_MS = {
    "dora": {1: 441.3, 2: 638.1, 4: 1001.4, 8: 1725.9, 9: 1939.8},
    "moslora": {1: 197.0, 2: 298.5, 4: 509.0, 8: 931.7, 9: 1052.8, 15: 1661.0},
    "paca": {1: 141.9, 2: 237.2, 4: 421.6, 8: 791.9, 9: 900.9, 15: 1458.7, 19: 1833.7},
}
AUTHORS_SOURCE = (
    "raw figures in the history of the authors' repository (github.com/WooSunghyeon/paca, a folder "
    "deleted before commit be9a806): LLaMA3.1-8B, rank 8, 512 tokens, bfloat16; the GPU is not said"
)
