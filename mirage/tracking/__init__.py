"""Where a run's numbers go: wandb, a JSONL mirror on disk, and the terminal. Tracking only receives."""
