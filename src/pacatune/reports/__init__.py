"""What every report is made of: tables, figures, pages, and where its numbers come from."""
