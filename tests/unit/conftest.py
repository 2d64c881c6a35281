"""What holds for every test here."""

from __future__ import annotations

from hypothesis import settings

# By itself an example may take 200 ms, which a busy machine takes for anything now and then.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")
