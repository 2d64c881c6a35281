"""The streaming bitsandbytes writer."""

from worker.quantize.target import Progress, Refused, Target, Written
from worker.quantize.write import write_checkpoints

__all__ = ["Progress", "Refused", "Target", "Written", "write_checkpoints"]
