"""Figure 3: throughput over the batch. Its curves are not readable; what the text says is here."""

from dataclasses import replace

from pacatune.reports.rows import Row

TITLE = "Throughput over the batch, until memory ends"
PLACE = "Figure 3, section 4.4; settings in Table 13"
METHODS = ("lora", "dora", "moslora", "paca")
BATCH, RATE = "largest batch of 512 tokens", "throughput at the largest batch"


def _of_device(suffix: str, rate: float, rate_ratio: float, batch_ratio: float) -> tuple[Row, ...]:
    one = Row(
        what=RATE + suffix,
        method="PaCA",
        value=rate,
        unit="sentences/s",
        model="llama3-8b",
        origin="paper",
    )
    share = replace(one, method="PaCA / LoRA", value=rate_ratio, unit="ratio")
    return one, share, replace(share, what=BATCH + suffix, value=batch_ratio)


# "10.36 sentences/s on A100 GPU and 15.5 sentences/s on Gaudi2 HPU, representing a 16% improvement
# for both"; "increase the batch size by 33% on the NVIDIA A100 GPU and 21% on the Intel Gaudi2".
CLAIMS = (*_of_device("", 10.36, 1.16, 1.33), *_of_device(", Gaudi2", 15.5, 1.16, 1.21))

AUTHORS = {"dora": 9, "moslora": 15, "paca": 19}
"""Method -> the largest batch that ran in the raw figures of the authors."""
AUTHORS_SOURCE = (
    "raw figures in the history of the authors' repository (github.com/WooSunghyeon/paca, a folder "
    "deleted before commit be9a806): LLaMA3.1-8B, rank 8, 512 tokens, bfloat16; the GPU is not said"
)
