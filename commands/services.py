"""``up``, ``worker``, ``scheduler`` and ``flower``: run the services; ``healthcheck``: see whether one works."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

import click

from qbatch.commands.context import current_settings
from qbatch.core.domain import DeviceKind
from qbatch.core.errors import UsageError
from qbatch.core.settings import Settings

if TYPE_CHECKING:
    from qbatch.scheduler.local_stack import LocalStack


def _joined(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> str | None:
    return ",".join(values) or None


_gpus = click.option(
    "--gpus",
    multiple=True,
    callback=_joined,
    help="all, or GPU indices or UUIDs separated by commas; may be repeated.  [default: all, or the CPU]",
)


@click.command()
@_gpus
@click.option("--cpu", is_flag=True, help="Start one CPU worker.")
def up(gpus: str | None, cpu: bool) -> None:
    """Run the embedded stack in the foreground until Ctrl-C."""
    import time

    settings = current_settings()
    interrupt_on_signals()
    with _stack(settings, gpus, cpu) as stack:
        click.echo(f"qbatch is running with its home in {settings.home}; press Ctrl-C to stop it", err=True)
        try:
            while True:
                stack.supervise()
                time.sleep(0.5)
        except KeyboardInterrupt:
            click.echo("stopping: running jobs return to the queue", err=True)


@click.command()
@_gpus
@click.option("--cpu", is_flag=True, help="Start one CPU worker.")
@click.option("--drain", is_flag=True, help="On SIGTERM, finish running jobs instead of returning them to the queue.")
def worker(gpus: str | None, cpu: bool, drain: bool) -> None:
    """Run one worker for each GPU of this machine, or one CPU worker."""
    from qbatch.worker.serving.launch import main as launch

    current_settings()
    sys.exit(launch(gpus, cpu, drain))


@click.command()
def scheduler() -> None:
    """Run the scheduler. Several may run at once; only one is active."""
    from qbatch.scheduler.__main__ import main as run_scheduler

    sys.exit(run_scheduler())


@click.command()
@click.option("--address", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=5555, show_default=True, help="The port to listen on.")
def flower(address: str, port: int) -> None:
    """Serve Flower, a web page that shows the queue. Requires QBATCH_FLOWER_AUTH=user:password."""
    from qbatch.scheduler.flower import serve

    serve(current_settings(), address=address, port=port)


@click.command()
@click.argument("service", type=click.Choice(["scheduler", "worker", "flower"]))
def healthcheck(service: str) -> None:
    """Check one service of this host, as a container's health check does. Exits with 3 if it does not work.

    One of the schedulers must lead; one of this host's workers must be live; Flower must answer on port 5555.
    """
    from qbatch.scheduler.service_health import SERVICES

    click.echo(SERVICES[service](current_settings()))


def local_stack(settings: Settings, *, device: DeviceKind) -> LocalStack:
    """The embedded stack for ``run``, which says where its logs are when it starts."""

    def announce() -> None:
        logs = settings.home / "logs"
        click.echo(f"starting Redis, the scheduler and the workers; their logs are in {logs}", err=True)

    return _stack(settings, "all" if device is DeviceKind.CUDA else None, device is DeviceKind.CPU, on_start=announce)


def _stack(settings: Settings, gpus: str | None, cpu: bool, on_start: Callable[[], None] = lambda: None) -> LocalStack:
    from qbatch.models_db.network_share import share_of
    from qbatch.models_db.session import Database
    from qbatch.scheduler.local_stack import LocalStack
    from qbatch.worker.serving.launch import devices_for

    if not settings.is_embedded:
        raise UsageError("QBATCH_BROKER_URL is set: start `qbatch scheduler` and `qbatch worker` instead")
    devices_for(gpus, cpu, os.environ)  # raises now what the workers would raise later
    share = share_of(Database(settings.sqlalchemy_url).file)
    if share is not None:
        click.echo(share.warning, err=True)
        share.hold(settings.lease_s)
    worker_args = [*(["--gpus", gpus] if gpus is not None else []), *(["--cpu"] if cpu else [])]
    return LocalStack(settings, worker_args=worker_args, environ=os.environ, on_start=on_start)


def interrupt_on_signals() -> None:
    """Handle SIGTERM like Ctrl-C, and enable Ctrl-C even in a process that a shell started with ``&``."""
    import signal

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, interrupt)
