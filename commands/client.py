"""``import qbatch``: the same words as on the command line, for Python."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import click

from qbatch.commands.context import current_settings, open_database
from qbatch.commands.measurements import results as results_command
from qbatch.commands.measurements import with_absolute_paths
from qbatch.commands.parameter_types import Duration
from qbatch.commands.request import read_submission
from qbatch.commands.result_options import read_filter
from qbatch.commands.sending import send
from qbatch.commands.submission import submit as submit_command
from qbatch.commands.targets import find_batches
from qbatch.core.control_characters import escape_controls
from qbatch.core.domain import format_batch_id
from qbatch.core.errors import StackNotRunning, UsageError
from qbatch.core.measured.result_row import ResultRow

if TYPE_CHECKING:
    import pandas

# Options of the command only: where the models come from, how it prints, and what it does besides storing.
_OF_THE_COMMAND_LINE = frozenset({"models", "format", "json", "q", "wait", "dry_run", "on_end"})
_ROWS_SHOWN = 20
_NO_FILTERS = frozenset({"batch", "sort", "limit", "columns", "wide", "legend", "format", "json", "q"})


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmittedBatch:
    """A stored batch. ``answered`` of its ``jobs`` were answered by earlier results."""

    id: str
    jobs: int
    answered: int

    def wait(self, *, timeout: float | str | None = None, progress: bool = False) -> bool:
        """See ``qbatch.wait``."""
        return wait(self, timeout=timeout, progress=progress)

    def results(self) -> ResultRows:
        """See ``qbatch.results``."""
        return results(self)


class ResultRows(Sequence[ResultRow]):
    """Rows of results, in the order of ``qbatch results``."""

    def __init__(self, rows: Iterable[ResultRow]) -> None:
        self._rows = tuple(rows)

    @overload
    def __getitem__(self, index: int) -> ResultRow: ...

    @overload
    def __getitem__(self, index: slice) -> ResultRows: ...

    def __getitem__(self, index: int | slice) -> ResultRow | ResultRows:
        return ResultRows(self._rows[index]) if isinstance(index, slice) else self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[ResultRow]:
        return iter(self._rows)

    def __repr__(self) -> str:
        shown = [f"  {row!r}" for row in self._rows[:_ROWS_SHOWN]]
        if len(self._rows) > _ROWS_SHOWN:
            shown.append(f"  and {len(self._rows) - _ROWS_SHOWN} more")
        return "\n".join([f"<ResultRows of {len(self._rows)} jobs>", *shown])

    def frame(self) -> pandas.DataFrame:
        """A pandas frame with the columns of ``qbatch results --json``. Raises ImportError without pandas."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError("a frame needs pandas, which is not installed: pip install pandas") from error
        return pandas.DataFrame([row.to_json() for row in self._rows], columns=list(ResultRow.written_order()))


Batch = SubmittedBatch | str
"""A batch, or its id, its name, or ``latest``."""


def submit(models: Iterable[str | Path], **options: Any) -> SubmittedBatch:
    """Store a batch of ``models``, each a hub id, perhaps with ``@revision``, or a folder, and send it to the workers.

    ``options`` are those of ``qbatch submit``, with underscores: ``bits=[4, 8]``, ``skip_modules=["lm_head"]``,
    ``baseline=False``, ``name="first"``, ``time_limit="2h"``. An option that may be repeated or takes a comma list
    takes a list. The environment variables are those of the command line. Warns of what the command line warns of, as
    when nothing runs that could work on the batch. Raises UsageError for what ``qbatch submit`` would refuse,
    TypeError for an option that does not exist, and ServiceUnreachable.
    """
    from qbatch.scheduler.submit import submit as store

    if isinstance(models, str | Path):
        raise TypeError("models is a list of models: put a single one into brackets")
    settings = current_settings()
    lines = [_line(model) for model in models]
    submission = read_submission(settings, _values(submit_command, options, _OF_THE_COMMAND_LINE) | {"models": lines})
    database = open_database(settings)
    receipt = store(database, settings, submission)
    for warning, count in receipt.warnings.items():
        warnings.warn(escape_controls(warning if count == 1 else f"{count} models: {warning}"), stacklevel=2)
    hint = send(database, settings) if receipt.answered < receipt.jobs else None
    if hint is not None:
        warnings.warn(hint, stacklevel=2)
    return SubmittedBatch(id=format_batch_id(receipt.batch_id), jobs=receipt.jobs, answered=receipt.answered)


def wait(*batches: Batch, timeout: float | str | None = None, progress: bool = False) -> bool:
    """Wait until every job of the batches has ended. Returns whether all succeeded.

    ``timeout`` is in seconds, or as on the command line: ``"2h"``. ``progress`` shows it on standard error. Raises
    WaitTimeout, StackNotRunning if jobs are open and the embedded stack does not run, and ServiceUnreachable.
    """
    from qbatch.commands.wait_and_watch import wait_for_batches

    settings = current_settings()
    if not batches:
        raise UsageError("wait needs a batch")
    timeout_s = None if timeout is None else _converted(Duration(), timeout, "timeout")
    database = open_database(settings)
    ids = find_batches(database, _words(batches))
    if settings.is_embedded and _is_open(database, ids):
        from qbatch.scheduler.stack_lock import stack_is_running

        if not stack_is_running(settings):
            raise StackNotRunning("no stack is running here that could work on it: start one with `qbatch up`")
    return wait_for_batches(database, settings, ids, timeout_s=timeout_s, quiet=not progress)


def results(
    *batches: Batch,
    sort: str | None = None,
    limit: int | None = None,
    **filters: Any,
) -> ResultRows:
    """A row for each job, ended or not, of these batches, or of all.

    ``sort`` names a column, ``-column`` sorts downwards. ``filters`` are those of ``qbatch results``, with underscores:
    ``model=["*-8B*", "gemma"]``, ``scheme="none"``, ``bits=[4]``, ``device="H200"``, ``state="succeeded"``,
    ``since="7d"``, ``max_weights_bytes="6GB"``, ``max_kl=0.05``, ``min_tokens_per_s=40``. Figures that were not
    measured are None. Paths of checkpoints are whole. Raises UsageError, TypeError for a filter that does not exist,
    and ServiceUnreachable.
    """
    from qbatch.models_db.results import find_results

    settings = current_settings()
    only = read_filter(_values(results_command, filters, _NO_FILTERS))
    database = open_database(settings)
    ids = find_batches(database, _words(batches))
    with database.read() as session:
        rows = find_results(session, batch_ids=ids, only=only, sort=sort, limit=limit)
    return ResultRows(with_absolute_paths(settings, rows))


def _words(batches: Iterable[Batch]) -> list[str]:
    return [batch if isinstance(batch, str) else batch.id for batch in batches]


def _line(model: str | Path) -> str:
    text = str(model)
    if "\n" in text:
        raise UsageError(f"{text[:60]!r} is not one model: it has several lines")
    # A relative path with a single part would be taken for something of the hub.
    return str(model.absolute()) if isinstance(model, Path) else text


def _is_open(database: Any, ids: Sequence[int]) -> bool:
    from qbatch.core.domain import OPEN_STATES
    from qbatch.models_db.listing import count_states

    with database.read() as session:
        return not set(OPEN_STATES).isdisjoint(count_states(session, ids))


def _values(command: click.Command, options: dict[str, Any], unknown: frozenset[str]) -> dict[str, Any]:
    """The parameters of the command: what was given, checked as on the command line, and the defaults. ``unknown`` are
    options that it has for the command line alone."""
    # A command keeps the help option of the first context that asks for it, so this one is as the command line's.
    context = command.make_context(command.name, [], help_option_names=["-h", "--help"])
    known = {name: option for name, option in _options(command).items() if name not in unknown}
    if wrong := options.keys() - known.keys():
        raise TypeError(f"{command.name} has no option {min(wrong)!r}; its options are {', '.join(sorted(known))}")
    values = dict(context.params)
    for name, given in options.items():
        option = known[name]
        assert option.name is not None  # noqa: S101  (every option has one)
        values[option.name] = _checked(option, context, name, given)
    return values


def _options(command: click.Command) -> dict[str, click.Option]:
    """The options of the command, by their names without the dashes."""
    found = {}
    for option in command.params:
        if isinstance(option, click.Option):
            name = max(option.opts, key=len).lstrip("-").replace("-", "_")
            found[name] = option
    return found


def _checked(option: click.Option, context: click.Context, name: str, given: Any) -> Any:
    if given is None:
        return context.params[option.name or ""]
    if option.is_flag:
        if not isinstance(given, bool):
            raise UsageError(f"{name} must be True or False, not {given!r}")
        return given
    several = isinstance(given, list | tuple | set | frozenset | range)
    words = [str(item) for item in given] if several else [str(given)]
    if option.multiple:
        return tuple(_converted(option.type, word, name, option, context) for word in words)
    return _converted(option.type, ",".join(words), name, option, context)


def _converted(
    kind: click.ParamType[Any],
    value: Any,
    name: str,
    option: click.Option | None = None,
    context: click.Context | None = None,
) -> Any:
    try:
        return kind.convert(value, option, context)
    except click.UsageError as error:
        raise UsageError(f"{name}: {error.message}") from error
