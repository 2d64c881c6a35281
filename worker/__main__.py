"""``python -P -m qbatch.worker launch|serve``: run the workers of a machine, or the worker of one device.

Both start here because multiprocessing imports the main module of a program again in every child process, unless it is
the ``__main__`` of a package. A runner must not wait for the import of Celery.
"""

from __future__ import annotations

import argparse
import sys

from qbatch.scheduler.child_process import hide_from_equals


def main() -> int:
    hide_from_equals()
    parser = argparse.ArgumentParser(prog="python -P -m qbatch.worker")
    commands = parser.add_subparsers(dest="command", required=True)
    launch = commands.add_parser("launch", help="one worker for each device")
    launch.add_argument("--gpus")
    launch.add_argument("--cpu", action="store_true")
    serve = commands.add_parser("serve", help="the worker of the device that the environment selects")
    serve.add_argument("--uuid", help="the UUID of that GPU; without it, the CPU")
    for command in (launch, serve):
        command.add_argument("--drain", action="store_true", help="finish the running bundle on SIGTERM")
    options = parser.parse_args()
    if options.command == "launch":
        from qbatch.worker.serving.launch import main as run_launch

        return run_launch(options.gpus, options.cpu, options.drain)
    from qbatch.worker.serving.serve import main as run_serve

    return run_serve(options.uuid, drain=options.drain)


if __name__ == "__main__":
    sys.exit(main())
