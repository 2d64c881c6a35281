"""Schemes with other options."""

from __future__ import annotations

from dataclasses import replace

from qbatch.core.domain import Scheme
from qbatch.core.methods.description import OptionValue


def with_options(scheme: Scheme, **own: OptionValue) -> Scheme:
    """The same scheme with other values of its method's own options."""
    return replace(scheme, own=tuple((scheme.options | own).items()))
