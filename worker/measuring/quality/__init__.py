"""What quantization costs in quality."""
