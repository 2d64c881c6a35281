"""Tensors during quantization: traced without data, read from files, and the buffers used to process them."""
