"""The seam: every method has a description and an implementation, and nothing else knows it by name."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import pytest
import torch

import qbatch
from qbatch.commands.parameter_types import Schemes
from qbatch.core import identity
from qbatch.core.domain import BASELINE, DeviceKind, DType, JobSpec, Method, ProtocolOptions, Scheme, SourceRef
from qbatch.core.errors import Unsupported, UsageError
from qbatch.core.measured.result_row import ResultRow
from qbatch.core.methods.registry import (
    describe_row,
    every_option,
    find_method,
    known_bits,
    quant_types,
    selected_by_bits,
)
from qbatch.core.safetensors_size import nbytes
from qbatch.core.settings import Settings
from qbatch.models_db.session import Database
from qbatch.scheduler.job_grid import Grid
from qbatch.scheduler.submit import Submission, submit
from qbatch.views.scheme import show_scheme
from qbatch.worker.methods.implementations import weights_of, weights_of_config
from qbatch.worker.methods.packing import StreamedPacking
from tests.rows import a_worker
from tests.unit.measured_rows import result

QUANTIZING = [method for method in Method if method is not Method.NONE]
PACKAGE = Path(qbatch.__file__).parent
# What belongs to one method; a data type of torch or of safetensors does not.
_OF_A_METHOD = re.compile(r"(?<!u)(?<!torch\.)(?<!\")\bint8|nf4|fp4|bnb[-_]|int4|LLM\.int8|is_4bit", re.IGNORECASE)
# And what is known of other programs, by their own names.
_OWN = ("core/methods/", "worker/methods/", "core/loaders/", "core/prior_quantization.py")


@pytest.mark.parametrize("method", QUANTIZING)
def test_a_method_has_a_description_and_an_implementation(method: Method) -> None:
    scheme = Scheme(method=method)
    weights, packing = weights_of(scheme.description), weights_of(scheme.description).packing(scheme)
    assert isinstance(packing, StreamedPacking) == (weights.why_whole is None) == scheme.description.is_streamed
    assert scheme.bits(DType.BFLOAT16) in (4, 8)
    assert 0.5 <= scheme.description.loaded_bytes(1024, 1024, scheme.options) / 1024**2 < 1.1
    parts = scheme.description.stored_parts("layer.weight", 1024, 1024, scheme.options, "bfloat16")
    assert parts is not None
    stored = {nbytes(*part) for part in parts.values()}
    computed = (torch.Size(shape).numel() * dtype.itemsize for dtype, shape in packing.part_shapes(1024, 1024).values())
    assert stored >= set(computed), "both say the same of the parts that are computed"
    config = weights.quantization_config(scheme.resolved(DType.BFLOAT16), None)
    assert weights_of_config(config) is weights_of_config(config.to_dict()) is weights
    assert type(weights.packing_of_config(config)) is type(packing)


def test_nothing_beyond_its_own_modules_names_a_method() -> None:
    named = []
    for path in _files():
        where = str(path.relative_to(PACKAGE))
        if where.startswith(_OWN):
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if _OF_A_METHOD.search(line):
                named.append(f"{where}:{number}: {line.strip()}")
    assert named == []


def _files() -> list[Path]:
    folders = [PACKAGE / name for name in ("commands", "core", "models_db", "scheduler", "views", "worker")]
    return [PACKAGE / "cli.py", *(p for folder in folders for p in folder.rglob("*.py"))]


def test_names_and_aliases_lead_to_one_method() -> None:
    names = [name for method in Method for name in (method.value, *method.description.aliases)]
    assert len(names) == len(set(names))
    assert [find_method(method.value) for method in Method] == list(Method)
    assert Schemes().convert("nf4, torchao-int8,baseline", None, None) == (Method.NF4, Method.TORCHAO_INT8, Method.NONE)
    with pytest.raises(UsageError, match="'hqq-4' is not a known scheme; qbatch knows bnb-nf4, "):
        find_method("hqq-4")


def test_bits_keep_meaning_bitsandbytes() -> None:
    assert known_bits() == (4, 8)
    assert [selected_by_bits(bits)[0] for bits in (4, 8)] == [Method.NF4, Method.INT8]
    assert quant_types() == {"nf4": Method.NF4, "fp4": Method.FP4}


def test_schemes_by_name_stand_beside_bits_each_once() -> None:
    grid = Grid(bits=(4,), methods=(Method.TORCHAO_INT8, Method.NF4, Method.TORCHAO_INT8_DYNAMIC))
    assert [scheme.method for scheme in grid.schemes()] == [
        Method.NONE,
        Method.TORCHAO_INT8,
        Method.TORCHAO_INT8_DYNAMIC,
        Method.NF4,
    ]
    assert Grid(methods=(Method.NONE,), baseline=False).schemes() == (BASELINE,)
    with pytest.raises(UsageError, match=r"give --bits or --scheme"):
        Grid()


def test_a_scheme_stores_the_options_of_its_method_and_no_others() -> None:
    scheme = Scheme.of(Method.TORCHAO_INT4, group_size=64)
    assert scheme.to_json() == {
        "method": "torchao-int4",
        "compute_dtype": "auto",
        "skip_modules": [],
        "max_shard_bytes": None,
        "group_size": 64,
    }
    assert Scheme.from_json(scheme.to_json()) == scheme
    with pytest.raises(UsageError, match="bnb-nf4 has no option group_size"):
        Scheme.of(Method.NF4, group_size=64)


def test_a_compute_dtype_goes_to_the_methods_that_take_one() -> None:
    grid = Grid(bits=(4,), methods=(Method.TORCHAO_INT8,), compute_dtype=DType.FLOAT16, baseline=False)
    assert [scheme.compute_dtype for scheme in grid.schemes()] == [DType.AUTO, DType.FLOAT16]
    with pytest.raises(UsageError, match="torchao-int8 computes in the type of its inputs: leave --compute-dtype out"):
        Grid(methods=(Method.TORCHAO_INT8,), compute_dtype=DType.FLOAT16)


def test_options_have_flags_of_their_own() -> None:
    flags = [option.flag for option in every_option()]
    assert flags == ["--double-quant", "--quant-storage", "--int8-threshold", "--group-size"]


def test_a_row_of_an_unknown_method_is_shown_by_its_name() -> None:
    row = result(2, "hqq-4", options={"skip_modules": ["a"], "max_shard_bytes": None, "axis": 1})
    assert show_scheme(ResultRow.from_json(row)) == "hqq-4 without a"
    assert describe_row("hqq-4").options == ()


def test_a_method_has_its_own_librarys_version_in_its_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "version", lambda name: {"torch": "2.13.0+cpu"}.get(name, "1"))
    identity.writer_versions.cache_clear()
    found = identity.writer_versions(Method.TORCHAO_INT8)
    identity.writer_versions.cache_clear()
    assert found == {"torchao": "1", "torch": "2.13.0", "transformers": "1", "writer": "1"}


@pytest.fixture
def without_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    of_installed = metadata.version

    def version(name: str) -> str:
        if name == "torchao":
            raise metadata.PackageNotFoundError(name)
        return of_installed(name)

    monkeypatch.setattr(metadata, "version", version)
    identity.writer_versions.cache_clear()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path, storage=tmp_path, cache=tmp_path)


def submission(folder: Path, method: Method) -> Submission:
    source = SourceRef(name="a", location=str(folder), is_folder=True)
    return Submission(sources=(source,), grid=Grid(methods=(method,)), eval_text="words")


@pytest.mark.usefixtures("without_torchao")
def test_submit_says_how_a_missing_library_is_installed(
    sqlite_database: Database, settings: Settings, tmp_path: Path
) -> None:
    line = r"torchao-int8 needs torchao, which is not installed here: pip install 'qbatch\[torchao\]'"
    with pytest.raises(UsageError, match=line):
        submit(sqlite_database, settings, submission(tmp_path, Method.TORCHAO_INT8))
    submit(sqlite_database, settings, submission(tmp_path, Method.NF4))


@pytest.mark.usefixtures("without_torchao")
def test_a_worker_without_the_library_refuses_its_jobs() -> None:
    spec = JobSpec(
        source=SourceRef(name="a", location="/a", is_folder=True),
        scheme=Scheme(method=Method.TORCHAO_INT8),
        dtype=DType.BFLOAT16,
        device=DeviceKind.CPU,
        protocol=ProtocolOptions(eval_text_sha256="0" * 64),
    )
    with pytest.raises(Unsupported, match="needs torchao"):
        identity.settle(spec, fingerprint="f", source=DType.BFLOAT16, device_kind=DeviceKind.CPU)


def test_submit_refuses_a_method_that_the_live_workers_cannot_do(
    sqlite_database: Database, settings: Settings, tmp_path: Path
) -> None:
    a_worker(sqlite_database, kind=DeviceKind.CPU)
    with pytest.raises(UsageError, match="torchao-int4 does not work on cpu; use --device cuda"):
        submit(sqlite_database, settings, submission(tmp_path, Method.TORCHAO_INT4))
    a_worker(sqlite_database, "gpu", kind=DeviceKind.CUDA, uuid="GPU-1")
    submit(sqlite_database, settings, submission(tmp_path, Method.TORCHAO_INT4))
