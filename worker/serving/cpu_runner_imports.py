"""Imported by the forkserver of a CPU's worker: what a GPU's leaves to its runners, since it initialises CUDA."""

import logging

from qbatch.worker.machine.imports import no_garbage_collection
from qbatch.worker.methods.bnb_weights import WEIGHTS

try:
    with no_garbage_collection():
        WEIGHTS.quiet_import()
except Exception:
    # It is each job's to meet this again, and to say so. Here it would end the forkserver, and with it the worker.
    logging.getLogger("qbatch.worker").exception("importing bitsandbytes")
