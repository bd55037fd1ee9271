"""From dataset folders to packed batches: row -> rendered sample -> length index -> pack plan -> batch."""
