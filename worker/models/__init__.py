"""A model's architecture, its own code, and loading it through transformers."""
