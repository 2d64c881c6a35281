"""Imported by the forkserver before all else: it and its runners do not heed SIGTERM.

A service manager sends it to every process of a service at once. Only the worker knows what it means: it stops its
runner with SIGKILL, or with ``--drain`` lets it finish, and the forkserver ends with the worker.
"""

import signal

signal.signal(signal.SIGTERM, signal.SIG_IGN)
