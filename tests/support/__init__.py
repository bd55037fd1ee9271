"""What several tests share: a small dataset folder, tiny models, packed batches."""
