"""Data generation: a curated taxonomy becomes rows, pictures and a manifest. Knows nothing of models."""
