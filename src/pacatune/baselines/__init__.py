"""Methods to compare with that no release of PEFT has. Importing this package registers them."""

from pacatune.baselines.moslora import MosLoraConfig, MosLoraModel

__all__ = ["MosLoraConfig", "MosLoraModel"]
