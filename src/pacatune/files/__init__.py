"""Files that a stranger may have written, or that must not be lost."""
