"""Reads from an engine's source what it calls a model's modules, and writes that into ``core/loaders/``.

``python -m benchmarks.read_engine_names vllm|sglang FOLDER``: the folder into which the engine's wheel was unpacked,
with its ``.dist-info``. Nothing of it is imported: only class attributes that are literals are read
(docs/howto/renew-loader-knowledge.md).
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qbatch.core.loaders import engine_names

DATA = Path(engine_names.__file__).parent
_GENERIC = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
_MAPPER_FIELDS = {"orig_to_new_substr": "parts", "orig_to_new_prefix": "prefixes"}


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceClass:
    """A class of a model: its bases' names, and its attributes as expressions."""

    bases: tuple[str, ...]
    attributes: Mapping[str, ast.expr]


@dataclass(slots=True)
class Classes:
    """All classes below a folder, by name. Of two of one name, the one in the file that is asked for comes first."""

    by_file: dict[str, dict[str, SourceClass]] = field(default_factory=dict)

    def read(self, folder: Path) -> None:
        for path in sorted(folder.rglob("*.py")):
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.ClassDef):
                    self.by_file.setdefault(path.stem, {})[node.name] = _source_class(node)

    def find(self, name: str, near: str) -> SourceClass | None:
        files = [self.by_file.get(near, {}), *self.by_file.values()]
        return next((file[name] for file in files if name in file), None)

    def attribute(self, name: str, near: str, attribute: str) -> ast.expr | None:
        """The attribute's expression, inherited or own."""
        found = self.find(name, near)
        if found is None:
            return None
        if attribute in found.attributes:
            return found.attributes[attribute]
        inherited = (self.attribute(base, near, attribute) for base in found.bases if base != name)
        return next((expression for expression in inherited if expression is not None), None)

    def inherits(self, name: str, near: str, base: str) -> bool:
        found = self.find(name, near)
        return found is not None and any(
            one == base or (one != name and self.inherits(one, near, base)) for one in found.bases
        )


def _source_class(node: ast.ClassDef) -> SourceClass:
    attributes: dict[str, ast.expr] = {}
    for statement in node.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        value = getattr(statement, "value", None)
        if isinstance(targets[0], ast.Name) and isinstance(value, ast.expr):
            attributes[targets[0].id] = value
    bases = tuple(ast.unparse(base).rpartition(".")[2] for base in node.bases)
    return SourceClass(bases=bases, attributes=attributes)


def _literal(expression: ast.expr | None) -> Any:
    """The expression's value; None where it is no literal."""
    if expression is None:
        return None
    try:
        return ast.literal_eval(expression)
    except ValueError:
        return None


def vllm(folder: Path) -> dict[str, Any]:
    classes = Classes()
    classes.read(folder / "vllm" / "model_executor" / "models")
    classes.read(folder / "vllm" / "models")
    registry = ast.parse((folder / "vllm" / "model_executor" / "models" / "registry.py").read_text())
    return {name: _of_vllm(classes, *place) for name, place in sorted(_registered(registry).items())}


def _registered(registry: ast.Module) -> dict[str, tuple[str, str, bool]]:
    """Each architecture's file, class, and whether it is registered as multimodal."""
    found: dict[str, tuple[str, str, bool]] = {}
    for statement in registry.body:
        if not isinstance(statement, ast.Assign) or not isinstance(statement.value, ast.Dict):
            continue
        table = ast.unparse(statement.targets[0])
        for key, value in zip(statement.value.keys, statement.value.values, strict=True):
            place = _literal(value)
            if isinstance(key, ast.Constant) and isinstance(place, tuple):
                file, name = place
                found[key.value] = (file.rpartition(".")[2], name, "MULTIMODAL" in table)
    return found


def _of_vllm(classes: Classes, file: str, name: str, is_multimodal: bool) -> dict[str, Any]:
    if file == "transformers":
        return {"generic": True}
    fused = _literal(classes.attribute(name, file, "packed_modules_mapping"))
    if fused is None and not classes.inherits(name, file, "SupportsLoRA"):
        return {"refused": "no packed_modules_mapping"}
    if not fused and is_multimodal:  # it takes those of its parts
        fused = _GENERIC
    renames = _renames(classes, classes.attribute(name, file, "hf_to_vllm_mapper"), file)
    return {"fused": {key: list(value) for key, value in (fused or {}).items()}} | renames


def _renames(classes: Classes, mapper: ast.expr | None, file: str) -> dict[str, Any]:
    if isinstance(mapper, ast.BinOp):  # mapper | mapper
        left, right = _renames(classes, mapper.left, file), _renames(classes, mapper.right, file)
        return {key: left.get(key, {}) | right.get(key, {}) for key in left | right}
    if isinstance(mapper, ast.Attribute) and isinstance(mapper.value, ast.Name):
        return _renames(classes, classes.attribute(mapper.value.id, file, mapper.attr), file)
    if not isinstance(mapper, ast.Call):
        return {}
    given = {keyword.arg: _literal(keyword.value) for keyword in mapper.keywords}
    kept = {
        ours: {old: new for old, new in (given.get(theirs) or {}).items() if new is not None}
        for theirs, ours in _MAPPER_FIELDS.items()
    }
    return {key: value for key, value in kept.items() if value}


def sglang(folder: Path) -> dict[str, Any]:
    return {name: found for name, found in sorted(_of_sglang(folder / "sglang" / "srt" / "models"))}


def _of_sglang(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    classes = Classes()
    classes.read(folder)
    for path in sorted(folder.glob("*.py")):
        for name in _entry_classes(ast.parse(path.read_text())):
            stacked = _literal(classes.attribute(name, path.stem, "bitsandbytes_stacked_params_mapping"))
            if stacked is None:
                yield name, {"refused": "no bitsandbytes_stacked_params_mapping"}
                continue
            fused: dict[str, list[str]] = {}
            for member, (whole, _) in stacked.items():
                fused.setdefault(whole.strip("."), []).append(member.strip("."))
            yield name, {"fused": fused}


def _entry_classes(module: ast.Module) -> Iterator[str]:
    for statement in module.body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "EntryClass":
            value = statement.value
            for node in value.elts if isinstance(value, ast.List) else [value]:
                yield ast.unparse(node)


def _version(folder: Path, package: str) -> str:
    (info,) = folder.glob(f"{package}-*.dist-info")
    return info.name.removeprefix(f"{package}-").removesuffix(".dist-info")


def main() -> None:
    engine, folder = sys.argv[1], Path(sys.argv[2])
    architectures = {"vllm": vllm, "sglang": sglang}[engine](folder)
    lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(found)}" for name, found in architectures.items())
    head = f'"package": "{engine}", "version": "{_version(folder, engine)}", "read_on": "{datetime.now(UTC).date()}"'
    (DATA / f"{engine}.json").write_text(f'{{\n  {head},\n  "architectures": {{\n{lines}\n  }}\n}}\n')
    refused = sum("refused" in found for found in architectures.values())
    print(f"{engine} {_version(folder, engine)}: {len(architectures)} architectures, {refused} of them refused")


if __name__ == "__main__":
    main()
