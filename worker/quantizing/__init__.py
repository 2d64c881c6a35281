"""Writes quantized checkpoints: in one streaming pass over the source, or by building the whole model."""

from qbatch.worker.quantizing.target import Progress, Refused, Target, Written
from qbatch.worker.quantizing.write import write_checkpoints

__all__ = ["Progress", "Refused", "Target", "Written", "write_checkpoints"]
