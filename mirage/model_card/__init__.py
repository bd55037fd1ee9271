"""The model card of an export: what the weights were made from and how, what was measured, what they are not for."""
