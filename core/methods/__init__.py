"""Descriptions of the quantization methods, for planning, storing and showing. Imports no library that computes."""
