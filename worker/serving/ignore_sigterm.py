"""Imported first by the forkserver, so that it and its runners ignore SIGTERM.

A service manager sends SIGTERM to all processes of a service at once, but only the worker can decide what to do: it
stops its runner with SIGKILL, or, with ``--drain``, lets it finish. The forkserver ends with the worker.
"""

import signal

signal.signal(signal.SIGTERM, signal.SIG_IGN)
