"""Text data for fine-tuning: read, check, tokenize, and mask what is not learned."""

from pacatune.data.checks import row_digests
from pacatune.data.config import REASONING_GYM, DataConfig, PreferenceDataConfig, PromptDataConfig
from pacatune.data.prepare import PreparedData, prepare_data, show_preview

__all__ = [
    "REASONING_GYM",
    "DataConfig",
    "PreferenceDataConfig",
    "PreparedData",
    "PromptDataConfig",
    "prepare_data",
    "row_digests",
    "show_preview",
]
