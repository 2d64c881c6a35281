"""The program ``qbatch``, which is also ``python -m qbatch``."""

from __future__ import annotations

import signal


def main() -> None:
    """Run the command line. Ctrl-C while its commands are imported, which takes half a second, ends the process as
    the terminal asked, without a traceback of whatever was being imported."""
    # In the background of a shell it is ignored, and stays so.
    is_ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_ours:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from qbatch.cli import main as run

    if is_ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run(prog_name="qbatch")


if __name__ == "__main__":
    main()
