"""The worker: runs jobs on a device."""

import logging

from qbatch.core.methods.registry import every_silenced_logger

if __name__ != "qbatch.worker":
    raise ImportError("this is qbatch.worker, and has no other name")

# Before transformers is imported, which imports a method's library that it finds.
for _name in every_silenced_logger():
    logging.getLogger(_name).setLevel(logging.ERROR)
