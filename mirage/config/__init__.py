"""The recipe: its schema (schema.py) and how it is read from files and overrides (loader.py)."""

from mirage.config.loader import load_recipe
from mirage.config.schema import Recipe

__all__ = ["Recipe", "load_recipe"]
