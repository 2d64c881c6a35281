"""``python -m qbatch``: the command line."""

from qbatch.cli import main

if __name__ == "__main__":
    main(prog_name="qbatch")
