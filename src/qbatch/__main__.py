"""The program ``qbatch``, which is also ``python -m qbatch``."""

from __future__ import annotations

import gc
import signal
from typing import Any

# So many are made before garbage is looked for among them: a command's imports make nearly as many, and all of them
# stay. The usual way is to look through them a hundred times.
_YOUNG_OBJECTS = 100_000


def main() -> None:
    """Run the command line. Ctrl-C while its commands are imported, which takes half a second, ends the process as
    the terminal asked, without a traceback of whatever was being imported."""
    # In the background of a shell it is ignored, and stays so.
    is_ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_ours:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    gc.set_threshold(_YOUNG_OBJECTS)
    gc.callbacks.append(_leave_imports)
    from qbatch.cli import main as run

    if is_ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run(prog_name="qbatch")


def _leave_imports(phase: str, info: dict[str, Any]) -> None:  # noqa: ARG001
    """Before garbage is looked for the first time, take out what is there: the imports, which stay."""
    gc.callbacks.remove(_leave_imports)
    gc.freeze()


if __name__ == "__main__":
    main()
