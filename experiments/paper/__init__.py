"""What the paper says, as data: its tables' numbers and settings, its text on Figures 2 and 3.

S. Woo et al., PaCA: Partial Connection Adaptation for Efficient Fine-Tuning, ICLR 2025. Numbers are
as printed; nothing is read off bars or curves.
"""

from experiments.paper import tables
from experiments.paper.tables import METHOD_TITLES, Line, Table

__all__ = ["METHOD_TITLES", "TABLES", "Line", "Table"]

TABLES = {table.name: table for table in tables.ALL}
"""Name, as on the command line -> table."""
