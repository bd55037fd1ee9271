"""Model families behind one protocol: `load_model` gives (model, adapter) and nothing else names a family."""

from mirage.models.adapter import GenerationAdapter, ModelAdapter, PreprocessingSpec
from mirage.models.registry import load_model

__all__ = ["GenerationAdapter", "ModelAdapter", "PreprocessingSpec", "load_model"]
