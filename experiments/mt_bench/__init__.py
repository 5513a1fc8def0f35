"""MT-Bench: a model answers 80 questions of two turns, another model grades the answers."""
