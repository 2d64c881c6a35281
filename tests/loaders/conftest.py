"""Which tests there are: those of an engine only where its interpreter is named."""

from __future__ import annotations

import os

collect_ignore = [] if os.environ.get("ENGINE_PYTHON") else ["test_tried_engines.py"]
