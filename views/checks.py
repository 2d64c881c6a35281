"""The checks of ``qbatch doctor``, one line each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum

from qbatch.views.formats import Column, render


class State(StrEnum):
    OK = "ok"
    NOTE = "note"
    WRONG = "wrong"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One finding, in one line. The state ``note`` means worth knowing, but not a fault of the installation."""

    check: str
    state: State
    message: str


COLUMNS: tuple[Column, ...] = (
    Column(key="check", title="check"),
    Column(key="state", title="state"),
    Column(key="message", title="finding", wraps=True),
)


def render_checks(checks: Sequence[Check], format: str) -> str:  # noqa: A002
    """``checks`` as a table, JSON or CSV."""
    return render([asdict(check) for check in checks], COLUMNS, format)


def check(name: str, state: State, message: str) -> Check:
    return Check(check=name, state=state, message=message)
