"""Finds out what will certainly fail, from the files that are here, before anything is stored."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from qbatch.core.domain import SourceRef
from qbatch.core.errors import JobError, ModelsRefused, UsageError
from qbatch.core.file_stat import Mounts
from qbatch.core.methods.registry import is_installed
from qbatch.scheduler.lm_eval_files import TaskFiles
from qbatch.scheduler.model_list import ListProblem, ModelList
from qbatch.scheduler.shared_passages import SharedPassages
from qbatch.scheduler.submission_lookup import InspectedFolder, inspect
from qbatch.scheduler.submit import Submission
from qbatch.scheduler.task_names import unknown_tasks


@dataclass(frozen=True, slots=True, kw_only=True)
class Screened:
    """A request and what was found out about it.

    ``submission`` has the models that can be used; None if there are none. ``problems`` are the others, each with
    its line; ``doubts`` are those that look unusable from here, while the workers are elsewhere.
    """

    submission: Submission | None
    problems: tuple[ListProblem, ...]
    doubts: tuple[ListProblem, ...]
    models: int

    def accepted(self, *, keep_going: bool) -> Submission:
        """What to submit. Raises ModelsRefused if there are problems, unless ``keep_going`` and a model is left."""
        if self.submission is None or (self.problems and not keep_going):
            raise ModelsRefused(list(map(str, self.problems)), models=self.models)
        return self.submission


def screen(
    listed: ModelList,
    asked: Callable[[tuple[SourceRef, ...]], Submission],
    *,
    is_one_machine: bool,
    on_progress: Callable[[int], object] = lambda _: None,
) -> Screened:
    """Look at the folder of every model. ``asked`` makes the request for some models of the list. Without
    ``is_one_machine`` the workers may see other files than this process, so nothing is refused."""
    folders: dict[SourceRef, InspectedFolder | None] = {}
    found: dict[SourceRef, ListProblem] = {}
    submission = asked(listed.sources) if listed.sources else None
    specs = submission.specs() if submission is not None else ()
    passages = SharedPassages(
        trained_on=submission.trained_texts if submission is not None else (),
        judged_by=submission.eval_texts if submission is not None else (),
    )
    mounts = Mounts()
    for source in listed.sources:
        if not source.is_folder:
            continue
        try:
            folders[source] = inspect(source, [replace(spec, source=source) for spec in specs], mounts)
            passages.refuse(Path(source.location))
        except (JobError, OSError) as error:
            found[source] = ListProblem(line=listed.lines[source], text=_said(source, error))
        on_progress(1)
    refused = found if is_one_machine else {}
    sources = tuple(source for source in listed.sources if source not in refused)
    return Screened(
        submission=replace(asked(sources), screened=folders) if sources else None,
        problems=tuple(sorted((*listed.problems, *refused.values()), key=lambda problem: problem.line)),
        doubts=() if is_one_machine else tuple(found.values()),
        models=len(listed.sources) + len(listed.problems),
    )


def _said(source: SourceRef, error: JobError | OSError) -> str:
    text = str(error) if isinstance(error, JobError) else error.strerror or type(error).__name__
    return f"{source.name}: {text.removeprefix(source.location).lstrip(' :/')}"


def refuse_unknown_tasks(tasks: TaskFiles, *, is_one_machine: bool) -> None:
    """Raise UsageError for a task that the installed lm-evaluation-harness does not have."""
    named: Collection[str] = [ref.name for ref in tasks.refs if ref.sha256 is None]
    if not tasks.refs or not is_one_machine:
        return
    if not is_installed("lm-eval"):
        raise UsageError("--tasks needs lm-evaluation-harness, which is not installed here: pip install 'qbatch[eval]'")
    unknown = unknown_tasks(named)
    if unknown:
        raise UsageError(f"lm-evaluation-harness {version('lm_eval')} has no task {', '.join(map(repr, unknown))}")
