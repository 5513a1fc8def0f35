"""Methods on one task, each at its best learning rate, over several seeds."""
