"""The machine: its GPUs, its memory, what its faults mean."""
