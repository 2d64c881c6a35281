"""What a shell offers to complete a word with. An error cannot be shown there: then nothing is offered."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import click
from click.shell_completion import CompletionItem

from qbatch.commands.context import connect, current_settings
from qbatch.core.domain import LATEST, format_batch_id
from qbatch.core.errors import QbatchError

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

Words = TypeVar("Words")
_BATCHES_OFFERED = 50
_JOBS_LOOKED_AT = 1000


def complete_batch(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """``latest``, and the ids and names of the newest batches, each with what a shell may show beside it."""
    from qbatch.models_db.batch_names import newest_batches

    found = _ask(lambda session: newest_batches(session, _BATCHES_OFFERED)) or []
    ids = [CompletionItem(format_batch_id(batch_id), help=name) for batch_id, name in found]
    named = {name: format_batch_id(batch_id) for batch_id, name in reversed(found) if name is not None}
    names = [CompletionItem(name, help=batch) for name, batch in named.items()]
    newest = [CompletionItem(LATEST, help=ids[0].value)] if ids else []
    return [item for item in (*newest, *ids, *names) if item.value.startswith(incomplete)]


def complete_model(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The models of the newest jobs that contain what was typed, as ``--model`` finds them."""
    from qbatch.models_db.batch_names import newest_models

    models = _ask(lambda session: newest_models(session, _JOBS_LOOKED_AT)) or []
    return [CompletionItem(model) for model in models if incomplete in model]


def complete_column(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The columns that ``results`` sorts by."""
    from qbatch.models_db.results import SORT_COLUMNS

    return [CompletionItem(column) for column in SORT_COLUMNS if column.startswith(incomplete)]


def complete_columns(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The columns that ``results`` shows, after the ones that are there already."""
    from qbatch.views.result_columns import column_names

    before, comma, last = incomplete.rpartition(",")
    return [CompletionItem(f"{before}{comma}{name}") for name in column_names() if name.startswith(last)]


def _ask(question: Callable[[Session], Words]) -> Words | None:
    """The answer, if there is a database that can give one. To complete a word makes and upgrades none."""
    try:
        database = connect(current_settings())
        if database.file is not None and not database.file.exists():
            return None
        with database.read() as session:
            return question(session)
    except QbatchError:
        return None
