"""Measure speed, size, memory and energy of a model."""
