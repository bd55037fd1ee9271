"""Model families behind one protocol: `load_model` gives (model, adapter) and nothing else names a family."""

from mirage.models.adapter import ModelAdapter, PreprocessingSpec
from mirage.models.registry import load_model

__all__ = ["ModelAdapter", "PreprocessingSpec", "load_model"]
