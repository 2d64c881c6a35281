"""Which model types and classes the installed transformers has, read from its sources: importing it takes seconds."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qbatch.core.errors import SourceCorrupt, Unsupported
from qbatch.core.model_heads import DEFAULT_MAPPINGS, MAPPINGS_OF_HEADS

# An entry of a mapping: ("llama", "LlamaForCausalLM"), or "llama": "LlamaConfig". Of several classes the first.
_ENTRY = re.compile(r'"([^"\n]+)"\s*[,:]\s*\(?\s*"([^"\n]+)"')
_MAPPING = r"^{name} = OrderedDict\(\n(.*?)^\)"
# What configuration_auto.py puts before and after the entries of auto_mappings.py.
_PUT_BEFORE = re.compile(r"^CONFIG_MAPPING_NAMES = OrderedDict\(\*\*(\{[^}]*\})", re.MULTILINE)
_ADDED = re.compile(r"^CONFIG_MAPPING_NAMES\.update\((.*?)^\)", re.MULTILINE | re.DOTALL)
# transformers has several hundred configs. If fewer are found, its sources are written differently and tell nothing.
_FEWEST = 100
_SHOWN = 60


def refuse_unknown_architecture(config: Mapping[str, Any]) -> None:
    """Raise Unsupported, or SourceCorrupt, if the installed transformers certainly has no class for the model.

    A model with code of its own is accepted: whether that code may run is up to a worker.
    """
    if config.get("auto_map"):
        return
    model_type, names = config.get("model_type"), config.get("architectures")
    if model_type is None:
        raise SourceCorrupt("config.json has no model_type, without which transformers cannot load it")
    if not isinstance(model_type, str):
        raise SourceCorrupt(f"config.json: model_type is {_shown(model_type)}, not a name")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None
    reason = _why_unknown(model_type, name)
    if reason is not None:
        raise Unsupported(reason)


def model_types() -> Mapping[str, str]:
    """The model types that transformers knows, with the names of their config classes. Empty if its sources cannot be
    read as they are expected."""
    first = _mapping(_source("models/auto/auto_mappings.py"), "CONFIG_MAPPING_NAMES")
    second = _source("models/auto/configuration_auto.py")
    before = dict(_ENTRY.findall("".join(_PUT_BEFORE.findall(second))))
    after = dict(_ENTRY.findall("".join(_ADDED.findall(second))))
    types = before | first | after
    return types if len(types) >= _FEWEST else {}


def has_class(name: str) -> bool:
    """Whether a file of transformers defines a class of models with this name."""
    return name.isidentifier() and (f'"{name}"' in _modeling_auto() or any(f"\nclass {name}(" in t for t in _models()))


@cache
def _why_unknown(model_type: str, name: str | None) -> str | None:
    types = model_types()
    if not types:
        return None
    if model_type not in types:
        return f"transformers {version('transformers')} does not know the model type {_shown(model_type)}"
    if name is None or has_class(name) or _stand_in(types, model_type, name):
        return None
    return f"transformers {version('transformers')} has no architecture {_shown(name)}"


def _stand_in(types: Mapping[str, str], model_type: str, name: str) -> bool:
    """Whether transformers' own class for the type takes the place of the class ``name``."""
    # transformers looks it up by the class of the config, under the last type that has this class.
    type_of_config = next(key for key, cls in reversed(list(types.items())) if cls == types[model_type])
    for ending, mappings in MAPPINGS_OF_HEADS:
        if name.endswith(ending):
            return any(type_of_config in _auto_mapping(mapping) for mapping in mappings)
    classes = (_auto_mapping(mapping).get(type_of_config, "") for mapping in DEFAULT_MAPPINGS)
    return any(cls.lower() == name.lower() for cls in classes)


@cache
def _auto_mapping(name: str) -> Mapping[str, str]:
    return _mapping(_modeling_auto(), f"{name}_NAMES")


def _mapping(source: str, name: str) -> dict[str, str]:
    block = re.search(_MAPPING.format(name=name), source, re.MULTILINE | re.DOTALL)
    return dict(_ENTRY.findall(block[1])) if block is not None else {}


@cache
def _modeling_auto() -> str:
    return _source("models/auto/modeling_auto.py")


def _models() -> Iterator[str]:
    folder = _folder()
    for path in sorted(folder.glob("models/*/modeling_*.py")) if folder is not None else ():
        yield path.read_text(encoding="utf-8")


def _source(path: str) -> str:
    folder = _folder()
    file = folder / path if folder is not None else None
    return file.read_text(encoding="utf-8") if file is not None and file.is_file() else ""


@cache
def _folder() -> Path | None:
    spec = find_spec("transformers")
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
