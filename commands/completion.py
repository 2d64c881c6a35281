"""What a shell offers to complete a word with. An error cannot be shown there: then nothing is offered."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeVar

import click
from click.shell_completion import CompletionItem

from qbatch.commands.context import connect, current_settings
from qbatch.core.domain import LATEST, format_batch_id, format_job_id
from qbatch.core.errors import QbatchError

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

Words = TypeVar("Words")
_BATCHES_OFFERED = 50
_JOBS_OFFERED = 50
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


def complete_job(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The ids of the newest jobs, each with its model and method."""
    from qbatch.core.domain import Method
    from qbatch.models_db.batch_names import newest_jobs

    found = _ask(lambda session: newest_jobs(session, _JOBS_OFFERED)) or []
    named = [
        (format_job_id(job_id), f"{model} {'baseline' if method == Method.NONE else method}")
        for job_id, model, method in found
    ]
    return [CompletionItem(job, help=what) for job, what in named if job.startswith(incomplete)]


def complete_target(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Batches; and jobs, of which there are many, once their letter was typed."""
    jobs = complete_job(context, parameter, incomplete) if incomplete.startswith("j") else []
    return [*jobs, *complete_batch(context, parameter, incomplete)]


def complete_target_or_folder(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """A batch, a job, or the folder of a checkpoint."""
    found = [] if "/" in incomplete else complete_target(context, parameter, incomplete)
    return found or [CompletionItem(incomplete, type="dir")]


def complete_path(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Whatever files and folders the shell finds."""
    return [CompletionItem(incomplete, type="file")]


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

    return complete_list(column_names(), incomplete)


def complete_loaders(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The loaders that ``verify --for`` knows, after the ones that are there already."""
    from qbatch.core.loaders.known_loaders import LOADERS

    return complete_list(LOADERS, incomplete)


def complete_list(words: Iterable[str], incomplete: str) -> list[CompletionItem]:
    """What may stand last in a comma list of ``words``, with what stands before it."""
    before, comma, last = incomplete.rpartition(",")
    return [CompletionItem(f"{before}{comma}{word}") for word in words if word.startswith(last)]


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
