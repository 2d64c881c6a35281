"""The machine: its GPUs, its memory, its device faults, and logging."""
