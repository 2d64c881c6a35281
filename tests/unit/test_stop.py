"""A stop flag that a signal handler may set."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

from qbatch.scheduler.stop import Stop

_STORM = """
import os, signal, threading
from qbatch.scheduler.stop import Stop

stop = Stop()
stop.set_on_signals()

def storm():
    while not done:
        os.kill(os.getpid(), signal.SIGTERM)

done = False
thread = threading.Thread(target=storm)
thread.start()
for _ in range(20_000):
    stop.set()
    assert stop.wait(1.0)
done = True
thread.join()
"""


def test_a_signal_during_set_or_wait_still_sets_it() -> None:
    done = subprocess.run([sys.executable, "-P", "-c", _STORM], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_all_waiting_threads_are_woken() -> None:
    stop, found = Stop(), []
    threads = [threading.Thread(target=lambda: found.append(stop.wait(60.0))) for _ in range(3)]
    for thread in threads:
        thread.start()
    stop.set()
    for thread in threads:
        thread.join(30.0)
    assert found == [True] * 3
    assert stop.wait(60.0)


def test_a_wait_that_times_out_returns_false() -> None:
    stop, before = Stop(), time.monotonic()
    assert not stop.wait(0.05)
    assert time.monotonic() - before >= 0.05
    assert not stop.is_set()
