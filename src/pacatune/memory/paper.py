"""What the paper says about memory, and the settings it says it of.

Source: S. Woo et al., PaCA: Partial Connection Adaptation for Efficient Fine-Tuning, ICLR 2025.
Gigabytes are as printed there ("23G"), whole ones.
"""

from typing import Any

from pacatune.memory.setting import Setting

__all__ = ["GPU", "TABLE_1", "TABLE_3", "TABLE_4", "table_1", "table_3", "table_4"]

GPU = "a100-80g"

# Model, method, rank -> gigabytes. Fine-tuning on MMLU.
TABLE_1: dict[tuple[str, str, int], int] = {
    ("llama2-7b", "lora", 8): 23,
    ("llama2-7b", "dora", 8): 29,
    ("llama2-7b", "moslora", 8): 23,
    ("llama2-7b", "paca", 8): 20,
    ("llama2-7b", "paca", 16): 20,
    ("llama2-13b", "lora", 8): 40,
    ("llama2-13b", "dora", 8): 49,
    ("llama2-13b", "moslora", 8): 40,
    ("llama2-13b", "paca", 8): 35,
    ("llama2-13b", "paca", 16): 35,
    ("llama3-8b", "lora", 8): 27,
    ("llama3-8b", "dora", 8): 33,
    ("llama3-8b", "moslora", 8): 27,
    ("llama3-8b", "paca", 8): 23,
    ("llama3-8b", "paca", 16): 23,
}
# Model, method -> gigabytes. Instruction tuning on Oasst1, rank 64.
TABLE_3: dict[tuple[str, str], int] = {
    ("llama3-8b", "qlora"): 18,
    ("llama3-8b", "qpaca"): 16,
    ("llama3.1-70b", "qlora"): 80,
    ("llama3.1-70b", "qpaca"): 69,
}
# Method -> tokens until an A100 of 80 GB is full. LLaMA3-8B, rank 8, batch 1.
TABLE_4: dict[str, int] = {"lora": 8000, "dora": 4700, "moslora": 8000, "paca": 9800}

# Their weights and adapters were in 16 bits, by DeepSpeed (README of the authors' repository).
_COMMON: dict[str, Any] = {"lean": "off", "loss": "logits", "adapter_dtype": "bfloat16"}


def table_1(model: str, method: str, rank: int) -> Setting:
    """Return the setting of a cell of Table 1 (hyper-parameters in Table 9).

    Batch 8 in 4 micro-batches, 512 tokens, dropout 0.1 but for PaCA.
    """
    dropout = 0.0 if method == "paca" else 0.1
    sizes = {"batch_size": 2, "gradient_accumulation": 4, "seq_len": 512}
    return Setting(model=model, method=method, rank=rank, dropout=dropout, **sizes, **_COMMON)  # type: ignore[arg-type]


def table_3(model: str, method: str) -> Setting:
    """Return the setting of a cell of Table 3 (hyper-parameters in Table 11).

    Batch 16, in 4 micro-batches for the 8B model and 2 for the 70B, at most 768 tokens, no dropout.
    """
    num_micro = 4 if model == "llama3-8b" else 2
    sizes = {"batch_size": 16 // num_micro, "gradient_accumulation": num_micro, "seq_len": 768}
    return Setting(model=model, method=method, rank=64, **sizes, **_COMMON)  # type: ignore[arg-type]


def table_4(method: str) -> Setting:
    """Return the setting of a cell of Table 4 (hyper-parameters in Table 12).

    Rank 8, batch 1; nothing is said of dropout, so the methods are without.
    """
    return Setting(model="llama3-8b", method=method, rank=8, **_COMMON)  # type: ignore[arg-type]
