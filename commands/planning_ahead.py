"""``plan``: what a batch would do, without storing anything."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import click

from qbatch.commands.context import current_settings, open_database
from qbatch.commands.request import read_request
from qbatch.commands.request_options import request_options
from qbatch.commands.shared_options import format_options
from qbatch.core.control_characters import escape_controls
from qbatch.core.domain import DeviceKind
from qbatch.core.errors import ModelsRefused
from qbatch.core.settings import Settings


@click.command()
@request_options
@format_options("table", "json")
def plan(format_: str, **options: Any) -> None:
    """Say what submitting each MODEL would write, need and take, and what is there already. Stores nothing.

    The options are those of submit. Models that would certainly fail are named with their lines (exit code 2).
    """
    show_plan(options, format_)


def show_plan(options: Mapping[str, Any], format_: str) -> None:
    """Print the plan, and exit with 2 if there are models that cannot be used, unless they may be left out."""
    from qbatch.scheduler.batch_plan import plan_batch
    from qbatch.views.plan_table import plan_rows, plan_totals, render_plan, short_of_disk

    settings = current_settings()
    screened = read_request(settings, options, quiet=format_ != "table")
    if screened.submission is None:
        raise ModelsRefused(list(map(str, screened.problems)), models=screened.models, is_plan=True)
    planned = plan_batch(open_database(settings), settings, screened.submission, here=_kind_here(settings))
    warnings = [line if models == 1 else f"{models} models: {line}" for line, models in planned.warnings.items()]
    warnings += [text] if (text := short_of_disk(planned)) is not None else []
    if format_ == "json":
        import json

        problems = list(map(str, screened.problems))
        whole = {"jobs": plan_rows(planned), "totals": plan_totals(planned), "warnings": warnings, "problems": problems}
        click.echo(json.dumps(whole, indent=2))
    else:
        click.echo(render_plan(planned))
    for text in warnings:
        click.echo(escape_controls(text), err=True)
    if screened.problems and not options["keep_going"]:
        raise ModelsRefused(list(map(str, screened.problems)), models=screened.models, is_plan=True)
    for problem in screened.problems:
        click.echo(escape_controls(f"left out: {problem}"), err=True)


def _kind_here(settings: Settings) -> DeviceKind | None:
    """On what the embedded stack would run jobs; None where services of other hosts may run them."""
    from qbatch.worker.machine.gpu import installed_gpus, visible_gpus

    if not settings.is_embedded:
        return None
    return DeviceKind.CUDA if visible_gpus(installed_gpus(), os.environ) else DeviceKind.CPU
