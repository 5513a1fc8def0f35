"""Text data for fine-tuning: read, check, tokenize, and mask what is not learned."""

from pacatune.data.checks import row_digests
from pacatune.data.config import DataConfig
from pacatune.data.prepare import PreparedData, prepare_data, show_preview

__all__ = ["DataConfig", "PreparedData", "prepare_data", "row_digests", "show_preview"]
