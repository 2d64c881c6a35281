"""Tensors on their way: traced without data, read from files, and the memory that they pass through."""
