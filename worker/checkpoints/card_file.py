"""The model card of a checkpoint: README.md with the hub's metadata. It is not part of the manifest."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from qbatch.core.control_characters import escape_controls
from qbatch.core.domain import Scheme
from qbatch.core.filesystem import add_default_permissions
from qbatch.core.kinds import DType
from qbatch.core.recovery import with_adapter_mark
from qbatch.core.storage import MODEL_CARD

_MARK = "<!-- Written by qbatch, which writes it again after a measurement. Without this line it is left alone. -->"
_FENCE = "---\n"
_LONGEST_CARD = 2**20
_LONGEST_TEXT = 300
_MOST_ITEMS = 50
# What still holds of the model after it was quantized.
_CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag", "tags", "base_model", "library_name")
_LIBRARIES = ("transformers", "sentence-transformers")
_ADAPTER_LIBRARY = "peft"


def read_metadata(folder: Path) -> dict[str, Any]:
    """What the card in ``folder`` says of its model, as far as a quantized one may say the same.

    A card comes from anywhere: only texts and lists of texts are taken, of limited length. Raises OSError.
    """
    text = _read(folder / MODEL_CARD)
    if text is None or not text.startswith(_FENCE):
        return {}
    try:
        value = yaml.safe_load(text[len(_FENCE) :].partition(f"\n{_FENCE}")[0])
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    found = {name: _plain(value[name]) for name in _CARRIED if name in value} if isinstance(value, dict) else {}
    return {name: plain for name, plain in found.items() if plain}


def is_own(folder: Path) -> bool:
    """Whether qbatch wrote the card in ``folder``, or there is none. Raises OSError."""
    text = _read(folder / MODEL_CARD)
    return text is None or _MARK in text


def quantized_metadata(
    carried: Mapping[str, Any],
    *,
    base_model: str | None,
    scheme: str,
    libraries: tuple[str, ...],
    bits: int | None,
    is_adapter: bool = False,
) -> dict[str, Any]:
    """The metadata of a quantized model, or of an adapter for one. ``base_model`` is a model of the hub.

    None for a folder, whose own base model is carried over: that this one was quantized from it would be untrue.
    """
    own = {name: value for name, value in carried.items() if name not in ("tags", "base_model", "library_name")}
    library = carried.get("library_name")
    own["library_name"] = _ADAPTER_LIBRARY if is_adapter else library if library in _LIBRARIES else _LIBRARIES[0]
    if base_model is not None:
        own |= {"base_model": base_model, "base_model_relation": "adapter" if is_adapter else "quantized"}
    elif "base_model" in carried:
        own["base_model"] = carried["base_model"]
    tags = carried.get("tags", [])
    own_tags = ("quantized", "qbatch", str(scheme), *libraries, *((f"{bits}-bit",) if bits is not None else ()))
    own["tags"] = list(dict.fromkeys([*(tags if isinstance(tags, list) else [tags]), *own_tags]))
    return own


def write_card(folder: Path, metadata: Mapping[str, Any], body: str) -> None:
    """Write the card at once, so that nobody reads half of one. Raises OSError."""
    head = yaml.safe_dump(dict(metadata), sort_keys=False, allow_unicode=True)
    text = f"{_FENCE}{head}{_FENCE}\n{_MARK}\n\n{escape_controls(body, in_lines=True).strip()}\n"
    # A hidden file is not taken for a part of the checkpoint.
    partial = folder / f".{MODEL_CARD}.{os.getpid()}"
    try:
        partial.write_text(text, encoding="utf-8")
        add_default_permissions(partial)
        partial.replace(folder / MODEL_CARD)
    finally:
        partial.unlink(missing_ok=True)


def write_first_card(folder: Path, *, model: str, is_of_hub: bool, scheme: Scheme, dtype: DType) -> None:
    """The card of a checkpoint that is not measured yet, in place of the source's. Raises OSError."""
    metadata = quantized_metadata(
        read_metadata(folder),
        base_model=model if is_of_hub else None,
        scheme=scheme.method,
        libraries=scheme.description.libraries,
        bits=scheme.bits(dtype),
        is_adapter=scheme.recovery is not None,
    )
    name = model.rstrip("/").rsplit("/", 1)[-1]
    if scheme.recovery is not None:
        title = with_adapter_mark(scheme.method, scheme.recovery.slug)
        write_card(folder, metadata, f"# {name}, {title}\n\nAn adapter made by qbatch and not measured yet.")
        return
    write_card(folder, metadata, f"# {name}, {scheme.method}\n\nQuantized by qbatch and not measured yet.")


def _read(path: Path) -> str | None:
    """The beginning of a text; None if there is no file."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.read(_LONGEST_CARD)
    except FileNotFoundError:
        return None


def _plain(value: Any) -> str | list[str] | None:
    if isinstance(value, str):
        return value if value.isprintable() and len(value) <= _LONGEST_TEXT else None
    if isinstance(value, list):
        return [text for item in value[:_MOST_ITEMS] if isinstance(item, str) and (text := _plain(item))]  # type: ignore[misc]
    return None
