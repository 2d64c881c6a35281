"""A model's architecture, its own code, and how it is loaded with transformers."""
