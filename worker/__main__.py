"""``python -P -m worker [--gpus LIST] [--cpu] [--drain]``: what ``qbatch worker`` runs."""

from __future__ import annotations

import argparse
import sys

from worker.launch import main

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="qbatch worker")
    parser.add_argument("--gpus")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--drain", action="store_true")
    options = parser.parse_args()
    sys.exit(main(options.gpus, options.cpu, options.drain))
