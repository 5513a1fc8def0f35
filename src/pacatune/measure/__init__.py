"""A training step, measured on the machine at hand (bench) or simulated without it (estimate)."""
