"""MIRage: multi-image safety fine-tuning of vision-language models, from data to dashboard."""

__version__ = "0.1.0"
