"""What the two files of an adapter hold, and the rules they keep; torch only."""
