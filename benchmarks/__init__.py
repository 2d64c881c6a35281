"""Measurements, side by side with what one would do without qbatch."""
