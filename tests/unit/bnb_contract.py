"""What bitsandbytes' rows were before methods had a seam: keys, stored values, predictions, manifests and words.

``python -m tests.unit.bnb_contract`` writes bnb_contract.json anew. It was recorded before the seam, from code in which
every branch said "int8, else 4 bits"; recording it again would only say that today's code agrees with itself.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from qbatch.core import identity
from qbatch.core.domain import DeviceKind, DType, JobSpec, Method, ProtocolOptions, Scheme, SourceRef, content_hash
from qbatch.core.identity import settle, writer_versions
from qbatch.core.inspection import inspect_source
from qbatch.core.measured.result_row import ResultRow
from qbatch.core.sources import TensorInfo
from qbatch.models_db.batches import NewJob
from qbatch.models_db.schema import upgrade
from qbatch.models_db.session import Database
from qbatch.models_db.tables import Job
from qbatch.scheduler.job_grid import Grid
from qbatch.scheduler.vram_prediction import memory_bytes
from qbatch.views.audit_text import audit_lines, defects
from qbatch.views.scheme import show_scheme
from qbatch.worker.checkpoints.publish import Origin, publish
from qbatch.worker.checkpoints.published import checkpoint_path
from qbatch.worker.measuring.speed.size import measure_size
from qbatch.worker.measuring.why.traffic import step_work
from qbatch.worker.models.load import load
from qbatch.worker.quantizing import Target, Written, write_checkpoints
from tests.rows import add_batch
from tests.tiny import make_causal
from tests.unit.measured_rows import result

RECORDED = Path(__file__).with_suffix(".json")
_COMMON = {
    "double_quant": False,
    "compute_dtype": "auto",
    "skip_modules": [],
    "int8_threshold": 6.0,
    "quant_storage": "uint8",
    "max_shard_bytes": None,
}
SCHEMES: Mapping[str, Mapping[str, Any]] = {
    "none": {"method": "none"},
    "nf4": {"method": "bnb-nf4"},
    "nf4 double": {"method": "bnb-nf4", "double_quant": True},
    "nf4 in float16": {"method": "bnb-nf4", "compute_dtype": "float16"},
    "nf4 stored as bfloat16": {"method": "bnb-nf4", "quant_storage": "bfloat16"},
    "nf4 skipping": {"method": "bnb-nf4", "skip_modules": ["down_proj", "lm_head"]},
    "fp4": {"method": "bnb-fp4"},
    "fp4 double": {"method": "bnb-fp4", "double_quant": True},
    "int8": {"method": "bnb-int8"},
    "int8 without outliers": {"method": "bnb-int8", "int8_threshold": 0.0},
    "int8 in shards": {"method": "bnb-int8", "max_shard_bytes": 200_000},
}
_LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
_VOLATILE = ("created_at", "versions", "quantize_s", "root_sha256", "files", "file_system_refused")


def schemes() -> dict[str, Scheme]:
    return {name: Scheme.from_json(_COMMON | dict(value)) for name, value in SCHEMES.items()}


def record() -> dict[str, Any]:
    return {
        "schemes": {name: _described(scheme) for name, scheme in schemes().items()},
        "grids": _grids(),
        "rows": _rows(),
        "words": _words(),
        "written": _written(),
    }


def _described(scheme: Scheme) -> dict[str, Any]:
    kinds = (DeviceKind.CUDA, DeviceKind.CPU)
    spec = _spec(scheme)
    with _versions():
        keys = {
            kind.value: settle(spec, fingerprint="sha256:f", source=DType.BFLOAT16, device_kind=kind).key
            for kind in kinds
        }
    protocol = spec.protocol.for_device(DeviceKind.CUDA)
    return {
        "json": scheme.to_json(),
        "resolved": scheme.resolved(DType.BFLOAT16).to_json(),
        "hash": content_hash(scheme.to_json()),
        "is_baseline": scheme.is_baseline,
        "bits": {dtype.value: scheme.bits(dtype) for dtype in DType},
        "keys": keys,
        "path": checkpoint_path("a/model", scheme, keys["cpu"]),
        "bytes": {
            "8b": memory_bytes(_llama_tensors(32), _LLAMA_8B, scheme, DType.BFLOAT16, protocol),
            "8b in float32": memory_bytes(_llama_tensors(32), _LLAMA_8B, scheme, DType.FLOAT32, protocol),
            "small": memory_bytes(_llama_tensors(1), {}, scheme, DType.BFLOAT16, protocol),
        },
    }


@contextmanager
def _versions() -> Iterator[None]:
    """The keys of made-up versions: those of the day would change them."""
    writer_versions.cache_clear()
    with mock.patch.object(identity, "version", lambda name: f"{name}-1.2.3"):
        yield
    writer_versions.cache_clear()


def _llama_tensors(layers: int) -> list[TensorInfo]:
    hidden, inner, vocabulary = 4096, 14336, 128256
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (vocabulary, hidden)}
    for n in range(layers):
        layer = f"model.layers.{n}"
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qo"}
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (1024, hidden) for name in "kv"}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj.weight": (hidden, inner)}
    return [
        TensorInfo(name=name, dtype="BF16", shape=shape, start=0, end=2 * shape[0] * shape[1])
        for name, shape in shapes.items()
    ]


def _spec(scheme: Scheme) -> JobSpec:
    return JobSpec(
        source=SourceRef(name="a/model", location="/models/a", is_folder=True),
        scheme=scheme,
        dtype=DType.BFLOAT16,
        device=DeviceKind.CPU,
        protocol=ProtocolOptions(eval_text_sha256="0" * 64),
    )


def _grids() -> dict[str, Any]:
    grids = {
        "4,8": Grid(bits=(4, 8)),
        "16": Grid(bits=(16,), baseline=False),
        "fp4,nf4 double": Grid(bits=(4,), quant_types=(Method.FP4, Method.NF4), options={"double_quant": True}),
        "every option": Grid(
            bits=(4, 8),
            options={"double_quant": True, "int8_threshold": 3.0, "quant_storage": "float32"},
            compute_dtype=DType.FLOAT16,
            skip_modules=("b", "a", "b"),
            max_shard_bytes=7,
        ),
    }
    return {name: [scheme.to_json() for scheme in grid.schemes()] for name, grid in grids.items()}


def _rows() -> dict[str, Any]:
    """The columns of stored jobs that a scheme decides."""
    with tempfile.TemporaryDirectory() as folder:
        database = Database(f"sqlite:///{folder}/qbatch.sqlite3")
        try:
            upgrade(database)
            jobs = [NewJob(spec=_spec(scheme), bits=scheme.bits(DType.BFLOAT16)) for scheme in schemes().values()]
            with database.write() as session:
                add_batch(session, [jobs])
            with database.read() as session:
                stored = session.query(Job).order_by(Job.id).all()
                return {
                    name: {"scheme": job.scheme, "method": job.method, "bits": job.bits}
                    for name, job in zip(SCHEMES, stored, strict=True)
                }
        finally:
            database.dispose()


def _words() -> dict[str, Any]:
    """What the tables, the job's page and the audit say."""
    found = {}
    for number, (name, value) in enumerate(SCHEMES.items(), 1):
        options = _COMMON | {key: item for key, item in value.items() if key != "method"}
        row = result(number, value["method"], options=options, double_quant=options["double_quant"])
        row |= {"compute_dtype": options["compute_dtype"], "baseline_job_id": None}
        row["details"] = (
            {}
            if value["method"] == "none"
            else {"audit": {"int8_zero_scales": 2, "int8_infinite_scales": 1, "relative_error_mean": 0.09}}
        )
        row["bits_per_param"] = 4.5
        read = ResultRow.from_json(row)
        found[name] = {
            "scheme": show_scheme(read),
            "audit": [list(line) for line in audit_lines(read)] if value["method"] != "none" else [],
            "defects": list(defects(read)),
            "page": _page_options(read),
        }
    return found


def _page_options(row: ResultRow) -> list[str]:
    from qbatch.views.job_details import _options  # what it lists, not how it lays it out

    return list(_options(row))


def _written() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = make_causal(folder / "source", dtype="bfloat16")
        quantized = {key: one.resolved(DType.BFLOAT16) for key, one in schemes().items() if not one.is_baseline}
        targets = [Target(scheme=scheme, folder=folder / "staging" / key) for key, scheme in quantized.items()]
        for target in targets:
            target.folder.mkdir(parents=True)
        outcomes = write_checkpoints(source, targets, dtype=DType.BFLOAT16, device="cpu", on_progress=lambda *_: None)
        return {outcome.target.folder.name: _published(outcome, source, folder / "storage") for outcome in outcomes}


def _published(written: Any, source: Path, storage: Path) -> dict[str, Any]:
    assert isinstance(written, Written), written
    name = written.target.folder.name
    origin = Origin(
        model="a/model",
        revision=None,
        fingerprint="f",
        scheme=written.target.scheme,
        dtype=DType.BFLOAT16,
        device_kind=DeviceKind.CPU,
        device_name="a CPU",
        versions={},
    )
    done = publish(
        written.target.folder,
        storage=storage,
        source=source,
        key=content_hash({"name": name}),
        origin=origin,
        files=written.files,
        audit=dict(written.audit) | {"writer": written.writer},
        quantize_s=1.0,
        confirm=lambda: None,
    )
    place = storage / done.published.path
    manifest = json.loads((place / "qbatch.json").read_text())
    model = load(place, dtype=DType.BFLOAT16, device="cpu").model
    size = measure_size(model)
    work = step_work(model, None, batch_size=1)
    return {
        "manifest": {key: value for key, value in manifest.items() if key not in _VOLATILE},
        "files": {file["name"]: file["size"] for file in manifest["files"] if file["name"].startswith("model")},
        "config": json.loads((place / "config.json").read_text())["quantization_config"],
        "size": {field: getattr(size, field) for field in size.__slots__},
        "step": {field: getattr(work, field) for field in work.__slots__},
        "inspected": {
            key: value
            for key, value in inspect_source(SourceRef(name="m", location=str(place), is_folder=True)).items()
            if key in ("quantization", "num_parameters", "dtypes", "memory_bytes", "memory_bytes_by_dtype")
        },
    }


if __name__ == "__main__":
    RECORDED.write_text(json.dumps(record(), indent=1, sort_keys=True) + "\n")
