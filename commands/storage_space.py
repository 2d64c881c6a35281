"""``du``, ``gc``, ``rm`` and ``keep``: see what the storage holds, and remove what is not needed."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qbatch.commands.completion import complete_target_or_folder
from qbatch.commands.context import current_settings, open_database
from qbatch.commands.parameter_types import Age
from qbatch.commands.result_options import preference_options
from qbatch.commands.shared_options import batch_arguments, format_options
from qbatch.commands.targets import find_batches, find_targets
from qbatch.core.control_characters import escape_controls
from qbatch.core.errors import StorageUnavailable, UsageError
from qbatch.core.settings import Settings

if TYPE_CHECKING:
    from qbatch.worker.housekeeping.stale_files import Pruned

_MOST_LISTED = 50
_GROUPS = ("kind", "batch", "model", "scheme", "path")
_yes = click.option("--yes", is_flag=True, help="Remove it. Without this option nothing is removed, only listed.")


@click.command()
@batch_arguments()
@click.option(
    "--by",
    type=click.Choice(_GROUPS),
    default="kind",
    show_default=True,
    help="One line for each kind of files, batch, model, scheme, or checkpoint. A checkpoint of several batches counts "
    "in each.",
)
@format_options("table", "json", "csv")
def du(batches: Sequence[str], by: str, format_: str) -> None:
    """Show what takes space on the storage: checkpoints by batch, model or scheme, and everything else by kind."""
    from qbatch.core.filesystem import disk_space
    from qbatch.views.formats import render
    from qbatch.views.listings import holding_columns
    from qbatch.views.units import show_bytes
    from qbatch.worker.housekeeping.holdings import find_holdings, grouped

    settings = current_settings()
    database = open_database(settings)
    chosen = set(find_batches(database, batches))
    _require_storage(settings)
    found = [one for one in find_holdings(database, settings) if not chosen or chosen.intersection(one.batch_ids)]
    click.echo(render(grouped(found, by), holding_columns(by), format_))
    space = disk_space(settings.storage)
    free = f", and {show_bytes(space.free)} are free" if space is not None else ""
    click.echo(f"{show_bytes(sum(one.size_bytes for one in found))} in {settings.storage}{free}", err=True)


@click.command()
@click.option(
    "--older-than",
    type=Age(),
    default="7d",
    show_default=True,
    help="Remove what may still be of use only if it is older than this: damaged and unreferenced checkpoints, "
    "baseline outputs, and the logs of jobs that ended.",
)
@_yes
@format_options("table", "json", "csv")
def gc(older_than: float, yes: bool, format_: str) -> None:
    """Remove what nobody needs: what dead workers staged, checkpoints that nobody knows of or that are damaged, unused
    baseline outputs, and old logs.

    Results and recorded checkpoints are kept, and so is what other databases on the storage have made. Workers may run
    meanwhile.
    """
    from qbatch.worker.housekeeping.garbage import collect_garbage

    settings = current_settings()
    database = open_database(settings)
    _require_storage(settings)
    _report(collect_garbage(database, settings, older_than, dry_run=not yes), format_, done=yes)


@click.command()
@click.argument(
    "targets",
    nargs=-1,
    required=True,
    metavar="BATCH|JOB|CHECKPOINT...",
    shell_complete=complete_target_or_folder,
)
@_yes
@format_options("table", "json", "csv")
def rm(targets: Sequence[str], yes: bool, format_: str) -> None:
    """Remove batches or jobs with their results, logs and checkpoints; or a checkpoint alone.

    CHECKPOINT is its folder. Its results stay, without a path. Jobs must have ended. Checkpoints that other jobs refer
    to are kept, and so are jobs whose results answer others.
    """
    from qbatch.worker.housekeeping.removed_targets import carry_out, plan_removal

    settings = current_settings()
    database = open_database(settings)
    words = [word for word in targets if not _is_path(word)]
    paths = [_stored_path(settings, word) for word in targets if _is_path(word)]
    chosen = find_targets(database, words)
    removal = plan_removal(
        database, settings, batch_ids=chosen.batch_ids, job_ids=chosen.job_ids, paths=frozenset(paths)
    )
    if removal.checkpoints:
        _require_storage(settings)
    for remark in removal.remarks:
        click.echo(remark, err=True)
    _report(carry_out(database, settings, removal, dry_run=not yes), format_, done=yes)


@click.command()
@batch_arguments()
@click.option("--recommended", is_flag=True, required=True, help="Keep the checkpoints that compare recommends.")
@preference_options
@_yes
@format_options("table", "json", "csv")
def keep(batches: Sequence[str], recommended: bool, yes: bool, format_: str, **preference: Any) -> None:  # noqa: ARG001
    """Remove the checkpoints that compare does not recommend. Their results stay, without a path.

    All checkpoints of a model are kept if nothing is recommended for it, or its baseline is. Checkpoints that were not
    measured are kept, and so are those that batches which are not named have too.
    """
    from qbatch.models_db.checkpoints import checkpoints_at
    from qbatch.models_db.model_pages import results_by_model
    from qbatch.models_db.question_answers import with_answers
    from qbatch.views.comparison import Preference
    from qbatch.views.unrecommended import unrecommended
    from qbatch.worker.housekeeping.removed_targets import carry_out, plan_removal

    settings = current_settings()
    database = open_database(settings)
    ids = find_batches(database, batches)
    _require_storage(settings)
    with database.read() as session:
        parts = (with_answers(session, rows) for rows in results_by_model(session, batch_ids=ids))
        found = unrecommended(parts, Preference(**preference))
        paths = frozenset(one.path for one in checkpoints_at(session, found.paths))
    for remark in found.remarks:
        click.echo(escape_controls(remark), err=True)
    removal = plan_removal(database, settings, paths=paths, within=ids)
    checkpoints = [one for one in carry_out(database, settings, removal, dry_run=not yes) if one.what == "checkpoints"]
    _report(checkpoints, format_, done=yes)


def _require_storage(settings: Settings) -> None:
    """Raises StorageUnavailable where this machine does not see the storage."""
    if not settings.storage.is_dir():
        raise StorageUnavailable(f"{settings.storage} is not there: nothing was stored yet, or it is not mounted here")


def _report(removed: Sequence[Pruned], format_: str, *, done: bool) -> None:
    """Print what was or would be removed, and end with 1 if something could not be."""
    from qbatch.views.formats import render
    from qbatch.views.listings import removal_columns
    from qbatch.views.units import show_bytes

    is_table = format_ == "table"
    # What there is none of is for programs.
    rows = [kind.to_json_with_paths() for kind in removed if kind.number or not is_table]
    problems = [problem for kind in removed for problem in kind.problems]
    nothing = is_table and not rows
    click.echo("nothing to remove" if nothing else render(rows, removal_columns(done=done), format_))
    if is_table:
        _list_paths([path for kind in removed if kind.what != "logs" for path in kind.paths])
    _tell([*problems, *(line for kind in removed for line in kind.kept_lines)])
    if not nothing:
        size = show_bytes(sum(kind.size_bytes or 0 for kind in removed))
        _tell([f"{size} freed" if done else f"nothing was removed: with --yes, {size} would be freed"])
    sys.exit(1 if problems else 0)


def _list_paths(paths: Sequence[str]) -> None:
    """What the table counts, but for logs. All of it is in the JSON."""
    for path in paths[:_MOST_LISTED]:
        click.echo(f"  {escape_controls(path)}")
    if len(paths) > _MOST_LISTED:
        click.echo(f"  and {len(paths) - _MOST_LISTED} more (--json lists all)")


def _tell(lines: Iterable[str]) -> None:
    for line in lines:
        click.echo(escape_controls(line), err=True)


def _is_path(word: str) -> bool:
    return "/" in word


def _stored_path(settings: Settings, word: str) -> str:
    """A checkpoint's folder, relative to the storage. Raises UsageError."""
    from qbatch.core.storage import CHECKPOINTS

    storage = settings.storage.resolve()
    given = Path(word)
    for path in (given.absolute(), storage / given):
        # The folder itself may be a link, which stays: only the folders above it are resolved.
        whole = path.parent.resolve() / path.name
        if whole.is_relative_to(storage / CHECKPOINTS) and len(whole.relative_to(storage).parts) == 3:
            return str(whole.relative_to(storage))
    raise UsageError(f"{word} is not a checkpoint in {settings.checkpoints}")
