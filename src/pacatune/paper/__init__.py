"""What the paper says, as data: every table's numbers and settings, every ratio of its text.

S. Woo et al., PaCA: Partial Connection Adaptation for Efficient Fine-Tuning, ICLR 2025. Numbers are
as printed; nothing is read off bars or curves.
"""

from pacatune.paper import tables
from pacatune.paper.tables import METHOD_TITLES, Quantity, Row, Table

__all__ = ["CITATION", "METHOD_TITLES", "TABLES", "Quantity", "Row", "Table"]

CITATION = "S. Woo et al., PaCA: Partial Connection Adaptation for Efficient Fine-Tuning, ICLR 2025"
TABLES = {table.name: table for table in tables.ALL}
