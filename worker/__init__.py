"""The worker: runs jobs on a device."""

import logging

from qbatch.core.methods.registry import every_silenced_logger

if __name__ != "qbatch.worker":
    raise ImportError("import this package as qbatch.worker, not under another name")

# Before transformers is imported, which imports a method's library that it finds.
for _name in every_silenced_logger():
    logging.getLogger(_name).setLevel(logging.ERROR)
