"""The worker's part of each quantization method: how its weights are quantized, stored and counted."""
