"""Text templates (Jinja files)."""
