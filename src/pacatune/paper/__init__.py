"""What the paper says, as data: every table's numbers and settings, every ratio of its text.

S. Woo et al., PaCA: Partial Connection Adaptation for Efficient Fine-Tuning, ICLR 2025. Numbers are
as printed; nothing is read off bars or curves.
"""

from pacatune.paper import table1, table2, table3, table4, table5, table6, table7
from pacatune.paper.table import METHOD_TITLES, Quantity, Row, Table

__all__ = ["CITATION", "METHOD_TITLES", "TABLES", "Quantity", "Row", "Table"]

CITATION = "S. Woo et al., PaCA: Partial Connection Adaptation for Efficient Fine-Tuning, ICLR 2025"
TABLES = {
    module.TABLE.name: module.TABLE
    for module in (table1, table2, table3, table4, table5, table6, table7)
}
