"""MosLoRA on layers that bitsandbytes holds in 4 or 8 bits. Imports bitsandbytes."""

from peft.tuners.lora import bnb

from pacatune.tuner.moslora import MosLoraLayer


class Linear4bit(MosLoraLayer, bnb.Linear4bit):
    """A linear layer of 4 bits with MosLoRA adapters."""


class Linear8bitLt(MosLoraLayer, bnb.Linear8bitLt):
    """A linear layer of 8 bits with MosLoRA adapters."""
