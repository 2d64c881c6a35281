"""Write docs/coverage.md: every family of transformers, made tiny, quantized to NF4 on a CPU and measured.

``python -m benchmarks.families`` takes about ten minutes of a processor, and tries several types at a time. With names
of model types, only those are tried, and their lines of the page are written anew, unless other versions wrote the
others.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from itertools import islice
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import psutil
import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from qbatch.core.domain import BASELINE, Claim, DeviceKind, DType, JobSpec, Method, ProtocolOptions, Scheme, SourceRef
from qbatch.core.errors import one_line
from qbatch.core.measured.measurement import Measurement
from qbatch.worker.runner.bundle import Bundle
from qbatch.worker.runner.messages import CheckpointReady, Failed, Measured
from qbatch.worker.runner.timing_pauses import TimingPauses
from tests.bundles import TEXT_HASH, Ear, an_order
from tests.reference import contents, save_reference
from tests.shrunk import make, shrunk_config
from tests.tiny import make_tokenizer
from tests.unit.benchmark_models import QUICK

PAGE = Path(__file__).parents[1] / "docs" / "coverage.md"
BASE, QUANTIZED = 1, 2
NF4 = Scheme(method=Method.NF4)
MOST_PARAMETERS = 40_000_000
TIME_LIMIT_S = 90.0
# More than there are processors: what is timed here is not part of the page.
AT_ONCE = (os.cpu_count() or 1) + 1
_HALF = 110
# The first one that has the type names its class.
MAPPINGS = (
    "SPEECH_SEQ_2_SEQ",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "MASKED_LM",
    "CAUSAL_LM",
    "MULTIMODAL_LM",
    "CTC",
    "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "IMAGE_CLASSIFICATION",
    "VIDEO_CLASSIFICATION",
    "AUDIO_CLASSIFICATION",
    "OBJECT_DETECTION",
    "SEMANTIC_SEGMENTATION",
    "DEPTH_ESTIMATION",
)

INTRODUCTION = """\
# Families

`python -m benchmarks.families` writes this page: every model type of transformers {transformers} with a class for a
task (language, speech, vision, both), made tiny (random weights, at most {most} million parameters), quantized to NF4
on a CPU with torch {torch} and bitsandbytes {bitsandbytes}, published and measured by the code that runs a bundle.
Lines may be of several runs with these versions: `python -m benchmarks.families llama` writes that one anew.
*Identical*: the files are byte for byte those of the auto classes' `from_pretrained` and `save_pretrained`; *own
layout*: converted weights are quantized, so they cannot be (see [performance.md](performance.md)). *Runs*: a forward
pass of the checkpoint before it was published. A tiny model does not have the widths and layers of a real one: a family
that fails here may work, and the reverse.

"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A line of the table. ``note``: why something is missing."""

    model_type: str
    architecture: str
    published: str = "–"
    identical: str = "–"
    runs: str = "–"
    measured: str = "–"
    note: str = ""

    @property
    def line(self) -> str:
        cells = (self.model_type, self.architecture, self.published, self.identical, self.runs, self.measured)
        return f"| {' | '.join(cells)} | {self.note.replace('|', '/')} |"


def main(wanted: Sequence[str]) -> None:
    # Whatever is imported for the first one is there in all processes that are forked from this one.
    with tempfile.TemporaryDirectory(prefix="qbatch-family-") as folder:
        tried("llama", transformers.LlamaForCausalLM, Path(folder))
    gc.collect()
    gc.freeze()  # what is there already is looked through by none of them: it was half of their time
    families = written(PAGE.read_text(encoding="utf-8")) if wanted else {}
    for family in attempts(wanted or sorted(CONFIG_MAPPING_NAMES)):
        families[family.model_type] = family
        print(family.line, flush=True)
    save(families)


def save(families: Mapping[str, Family]) -> None:
    PAGE.write_text(page([families[model_type] for model_type in sorted(families)]), encoding="utf-8")


def page(families: Sequence[Family]) -> str:
    return introduction() + "\n".join([*summary(families), *table(families)])


def introduction() -> str:
    versions = {name: version(name) for name in ("torch", "transformers", "bitsandbytes")}
    return INTRODUCTION.format(**versions, most=MOST_PARAMETERS // 10**6)


def written(text: str) -> dict[str, Family]:
    """The lines of the page by model type. Raises SystemExit if other versions wrote it."""
    if not text.startswith(introduction()):
        raise SystemExit(f"{PAGE.name} is of other versions: write all of it, by naming no model type")
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    names = [field.name for field in fields(Family)]
    cells = [dict(zip(names, (cell.strip() for cell in row), strict=True)) for row in rows[1:]]
    return {row["model_type"]: Family(**row) for row in cells}


def summary(families: Sequence[Family]) -> Iterator[str]:
    made = [family for family in families if family.published != "–"]
    published = [family for family in made if family.published == "yes"]
    identical = Counter(family.identical for family in published)
    runs = Counter(family.runs for family in published)
    total = sum(class_of(model_type) is not None for model_type in CONFIG_MAPPING_NAMES)
    yield (
        f"{total} types have such a class, and {len(families)} of them were tried; {len(made)} could be made tiny, "
        f"{len(published)} of these were published, {identical['yes']} of them identical, and {runs['yes']} run."
    )
    yield ""


def table(families: Sequence[Family]) -> Iterator[str]:
    yield "| type | class | published | identical | runs | measured | why not |"
    yield "|---|---|---|---|---|---|---|"
    yield from (family.line for family in families)
    yield ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """A type that is tried in a process of its own, which sends its line."""

    model_type: str
    architecture: str
    process: ForkProcess
    receiver: Connection

    @classmethod
    def begin(cls, model_type: str, architecture: type[PreTrainedModel]) -> Attempt:
        context = multiprocessing.get_context("fork")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=report, args=(model_type, architecture, sender))
        process.start()
        sender.close()
        return cls(model_type=model_type, architecture=architecture.__name__, process=process, receiver=receiver)

    @property
    def is_late(self) -> bool:
        return computing_s(self.process.pid) > TIME_LIMIT_S

    def end(self) -> Family:
        note = f"it took longer than {TIME_LIMIT_S:.0f} s of a processor"
        try:
            if self.receiver.poll():
                family: Family = self.receiver.recv()
                return family
        except EOFError:
            note = "its process ended"
        finally:
            self.process.kill()
            self.process.join()
        return Family(model_type=self.model_type, architecture=self.architecture, note=note)


def attempts(model_types: Iterable[str]) -> Iterator[Family]:
    """The lines of those types of which transformers has a class for a task here, as they come."""
    waiting = ((model_type, cls) for model_type in model_types if (cls := class_of(model_type)) is not None)
    running: dict[Connection, Attempt] = {}
    while True:
        for model_type, cls in islice(waiting, AT_ONCE - len(running)):
            attempt = Attempt.begin(model_type, cls)
            running[attempt.receiver] = attempt
        if not running:
            return
        ready = set(wait(list(running), timeout=1.0))
        for receiver in [one for one, attempt in running.items() if one in ready or attempt.is_late]:
            yield running.pop(receiver).end()


def computing_s(pid: int | None) -> float:
    """What a process has used of a processor; 0 if it has ended."""
    with suppress(psutil.NoSuchProcess):
        times = psutil.Process(pid).cpu_times()
        return times.user + times.system
    return 0.0


def class_of(model_type: str) -> type[PreTrainedModel] | None:
    mappings = [getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES") for name in MAPPINGS]
    for mapping in mappings:
        name = mapping.get(model_type)
        name = name[0] if isinstance(name, tuple | list) else name
        cls = getattr(transformers, name, None) if name is not None else None
        if isinstance(cls, type) and issubclass(cls, PreTrainedModel):
            return cls
    return None


def report(model_type: str, cls: type[PreTrainedModel], sender: Connection) -> None:
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stderr.fileno())
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(prefix="qbatch-family-") as folder:
        sender.send(tried(model_type, cls, Path(folder)))


def tried(model_type: str, cls: type[PreTrainedModel], folder: Path) -> Family:
    family = Family(model_type=model_type, architecture=cls.__name__)
    try:
        config = config_of(model_type, cls)
        count = parameters(cls, config)
        if count > MOST_PARAMETERS:
            return replace(family, note=f"not made tiny: {count / 1e6:.0f} million parameters remain")
        source = folder / "source"
        make(cls, config).to(torch.bfloat16).save_pretrained(source)
        make_tokenizer(source)
    except Exception as error:  # whatever a class raises for such a config is what is reported
        return replace(family, note=f"not made tiny: {short(one_line(error))}")
    return of_bundle(family, bundle(source), source)


def config_of(model_type: str, cls: type[PreTrainedModel]) -> PreTrainedConfig:
    """A tiny config of the type, or of that part of it which ``cls`` is a model of."""
    config = shrunk_config(model_type)
    parts = (part for part in vars(config).values() if isinstance(part, cls.config_class))
    return config if isinstance(config, cls.config_class) else next(parts, config)


def parameters(cls: type[PreTrainedModel], config: PreTrainedConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in cls(config).parameters())


def bundle(source: Path) -> Ear:
    protocol = replace(QUICK, eval_text_sha256=TEXT_HASH)
    spec = JobSpec(
        source=SourceRef(name=str(source), location=str(source), is_folder=True),
        scheme=BASELINE,
        dtype=DType.AUTO,
        device=DeviceKind.CPU,
        protocol=ProtocolOptions(eval_text_sha256=TEXT_HASH),
    )
    schemes = {BASE: BASELINE, QUANTIZED: NF4}
    claims = [Claim(job_id=n, attempt=1, spec=replace(spec, scheme=scheme)) for n, scheme in schemes.items()]
    order = an_order(source.parent, claims, device_name="a CPU")
    ear = Ear()
    with patch.object(ProtocolOptions, "for_device", lambda _options, _kind: protocol):
        Bundle(order, ear, TimingPauses()).run()
    return ear


def of_bundle(family: Family, ear: Ear, source: Path) -> Family:
    failures = {m.job_id: f"{m.kind}: {m.message}" for m in ear.heard if isinstance(m, Failed)}
    published = [m.published for m in ear.heard if isinstance(m, CheckpointReady)]
    rows = [m.measurement for m in ear.heard if isinstance(m, Measured) and m.job_id == QUANTIZED]
    note = failures.get(QUANTIZED, "")
    if not published:
        return replace(family, published="no", note=short(note))
    forward = str(published[0].audit["forward"])
    if rows:
        reasons = dict.fromkeys(
            [*([forward] if forward != "ran" else []), *(rows[0].details.not_measured or {}).values()]
        )
        note = "; ".join(reasons)
    return replace(
        family,
        published="yes",
        identical=identical(source, source.parent / "storage" / published[0].path, published[0].audit),
        runs="yes" if forward == "ran" else "no",
        measured=how(rows[0]) if rows else "–",
        note=short(note),
    )


def identical(source: Path, checkpoint: Path, audit: Mapping[str, Any]) -> str:
    """Whether every file that transformers writes is the same in ``checkpoint``."""
    try:
        scheme = replace(NF4, compute_dtype=DType.BFLOAT16)
        expected = contents(save_reference(source, source.parent / "reference", scheme, DType.BFLOAT16))
    except Exception as error:  # transformers may fail where qbatch does not
        return f"transformers fails ({type(error).__name__})"
    found = contents(checkpoint)
    differing = sorted(name for name, content in expected.items() if found.get(name) != content)
    if differing and "whole_model_because" in audit:
        return "own layout"
    return "yes" if not differing else f"not {differing[0]}"


def how(row: Measurement) -> str:
    quality = row.details.quality
    figures = {
        "perplexity": row.perplexity,
        "KL": quality.kl_mean,
        "cosine": quality.cosine_mean,
        "decode": row.decode_tokens_per_s,
        "forward": row.forward_s_p50,
        "forward on noise": row.details.noise_inputs,
    }
    return ", ".join(name for name, value in figures.items() if value is not None) or "size"


def short(text: Any) -> str:
    """The beginning and the end, which says what mends it, of a long text."""
    said = " ".join(str(text).split())
    return said if len(said) <= 2 * _HALF else f"{said[:_HALF]} … {said[-_HALF:]}"


if __name__ == "__main__":
    main(sys.argv[1:])
