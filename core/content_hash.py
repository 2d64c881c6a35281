"""The hash of a value by its content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def content_hash(value: Mapping[str, Any]) -> str:
    """sha256 (hex) of a mapping's canonical JSON. The order of keys does not matter."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()
