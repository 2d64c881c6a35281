"""Measure the quality of a model, and how much of it quantization costs."""
