"""``python -P -m qbatch.worker launch|serve``: the workers of a machine, or the one of a device.

Both start here because multiprocessing imports a program's main module again in every child, unless that is a
package's ``__main__``: a runner must not wait for Celery's imports.
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
    serve = commands.add_parser("serve", help="the worker of the device that the environment pins")
    serve.add_argument("--uuid", help="that GPU's UUID; the CPU without it")
    for command in (launch, serve):
        command.add_argument("--drain", action="store_true", help="finish the running bundle on SIGTERM")
    options = parser.parse_args()
    if options.command == "launch":
        from qbatch.worker.serving.launch import main as run_launch

        return run_launch(options.gpus, options.cpu, options.drain)
    from qbatch.worker.serving.celery_worker import main as run_serve

    return run_serve(options.uuid, drain=options.drain)


if __name__ == "__main__":
    sys.exit(main())
