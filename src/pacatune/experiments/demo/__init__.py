"""Fine-tune a real model on real data and show what changed."""
