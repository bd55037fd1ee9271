"""The training engine: loop, loss, optimiser, process group, checkpoints."""
