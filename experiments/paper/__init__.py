"""What the paper says, as data: every table's numbers and settings, every ratio of its text.

S. Woo et al., PaCA: Partial Connection Adaptation for Efficient Fine-Tuning, ICLR 2025. Numbers are
as printed; nothing is read off bars or curves.
"""

from experiments.paper import tables
from experiments.paper.tables import METHOD_TITLES, Line, Quantity, Table

__all__ = ["METHOD_TITLES", "TABLES", "Line", "Quantity", "Table"]

TABLES = {table.name: table for table in tables.ALL}
"""Name, as on the command line -> table."""
