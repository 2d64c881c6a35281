"""Write the model cards of checkpoints from the database."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from pathlib import Path

from qbatch.core.errors import DatabaseUnreachable
from qbatch.core.manifest import MANIFEST
from qbatch.core.methods.registry import describe_row
from qbatch.core.model_files import python_files
from qbatch.core.settings import Settings
from qbatch.core.storage import MODEL_CARD, base_path
from qbatch.models_db.measured_checkpoints import MeasuredCheckpoint, measured_checkpoints
from qbatch.models_db.session import Database, in_chunks
from qbatch.views.model_card import card_text
from qbatch.worker.checkpoints.card_file import is_own, quantized_metadata, read_metadata, write_card
from qbatch.worker.models.tokenizer import why_no_tokenizer

log = logging.getLogger("qbatch.worker")

# Each source is a condition of its own, and SQLite takes a thousand in one statement.
_AT_ONCE = 100


def write_cards(database: Database, settings: Settings, job_ids: Collection[int]) -> None:
    """Write the cards of these jobs' checkpoints. If that fails, `qbatch card` writes them later."""
    try:
        for line in rewrite_cards(database, settings, job_ids, overwrite=False):
            log.info("%s", line)
    except (DatabaseUnreachable, OSError) as error:
        log.warning("%s; `qbatch card` writes the model cards that are missing", error)


def rewrite_cards(
    database: Database, settings: Settings, job_ids: Collection[int], *, overwrite: bool
) -> Iterator[str]:
    """Write the cards, and yield a line for each. Raises DatabaseUnreachable, OSError.

    With ``overwrite``, also those that somebody has written by hand.
    """
    for checkpoint in _found(database, job_ids):
        folder = settings.storage / checkpoint.path
        if not (folder / MANIFEST).is_file():
            yield f"{folder} is not there"
        elif not overwrite and not is_own(folder):
            yield f"{folder / MODEL_CARD} is left as it is, because qbatch did not write it"
        else:
            _write(folder, checkpoint)
            yield f"{folder / MODEL_CARD} written"


def _found(database: Database, job_ids: Collection[int]) -> Iterator[MeasuredCheckpoint]:
    seen: set[str] = set()
    for chunk in in_chunks(sorted(job_ids), _AT_ONCE):
        with database.read() as session:
            database.require_own(session)
            found = measured_checkpoints(session, chunk)
        yield from (checkpoint for checkpoint in found if checkpoint.path not in seen)
        seen.update(checkpoint.path for checkpoint in found)


def _write(folder: Path, checkpoint: MeasuredCheckpoint) -> None:
    row = checkpoint.row
    # What an adapter carries over, and what it takes to load it, are the checkpoint's that it belongs to.
    name = base_path(folder.name)
    base = folder if name is None else folder.with_name(name)
    carried = read_metadata(base)
    metadata = quantized_metadata(
        carried,
        base_model=None if checkpoint.is_folder else row.model,
        scheme=row.scheme,
        libraries=describe_row(row.scheme).libraries,
        bits=row.bits,
        is_adapter=name is not None,
    )
    licence = carried.get("license")
    text = card_text(
        checkpoint,
        licence=licence if isinstance(licence, str) else None,
        runs_code=bool(python_files(base)),
        has_tokenizer=why_no_tokenizer(base) is None,
    )
    write_card(folder, metadata, text)
