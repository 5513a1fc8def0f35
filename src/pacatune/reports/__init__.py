"""What every report is made of: rows, tables, figures, and where its numbers come from."""
