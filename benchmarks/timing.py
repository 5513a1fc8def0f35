"""Taking turns and comparing: as in `pacatune bench`."""

from pacatune.bench.timing import alternate, compare, order_of_round, summarize

__all__ = ["alternate", "compare", "order_of_round", "summarize"]
