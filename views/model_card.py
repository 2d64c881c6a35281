"""The text of a checkpoint's model card: how to load it, and what was measured of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import partial

from qbatch.core.domain import JobState
from qbatch.core.measured.measured_part import MeasuredPart
from qbatch.core.measured.metric import MetricColumn
from qbatch.core.measured.metrics import BITS_PER_PARAM, LOAD, QUANTIZE, RESULTS_COLUMNS
from qbatch.core.measured.result_row import ResultRow
from qbatch.core.methods.registry import describe_row
from qbatch.core.recovery import LIBRARY
from qbatch.core.storage import base_path
from qbatch.models_db.measured_checkpoints import MeasuredCheckpoint
from qbatch.views.audit_text import audit_warnings, fairness_remarks
from qbatch.views.emulation import emulation_remarks
from qbatch.views.formats import printable
from qbatch.views.metric_text import show_metric
from qbatch.views.noise import NOISE_MARK, NOT_DISTINGUISHABLE, UNSTEADY_MARK
from qbatch.views.protocol import show_protocol
from qbatch.views.ratios import may_compare, show_relative
from qbatch.views.scheme import show_scheme, show_scheme_alone
from qbatch.views.task_scores import task_lines

_AUTO_CLASSES = {
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "seq2seq": "AutoModelForSeq2SeqLM",
}
# The host's, not the checkpoint's.
_LEFT_OUT = ((QUANTIZE,), (LOAD,))
# Whoever has the checkpoint alone cannot ask for more.
_WITH_DATABASE = re.compile(r" \(`qbatch [^)]*\)")
_VERSIONS = ("qbatch", "torch", "transformers")


def card_text(checkpoint: MeasuredCheckpoint, *, licence: str | None, runs_code: bool, has_tokenizer: bool) -> str:
    """The card below its metadata. ``licence`` is that of the base model; ``runs_code``: it has Python files."""
    row = checkpoint.row
    base = _base(checkpoint)
    loading = _loading if base is None else partial(_loading_adapter, base)
    parts = [_heading(checkpoint), loading(row, runs_code=runs_code, has_tokenizer=has_tokenizer)]
    parts.append(_measured(row, checkpoint.baseline) if row.state == JobState.SUCCEEDED else _not_measured(row))
    parts += [_other_loaders(row), _provenance(checkpoint, licence)]
    return "\n\n".join(part for part in parts if part)


def _heading(checkpoint: MeasuredCheckpoint) -> str:
    row = checkpoint.row
    name = _plain(_folder_name(row.model))
    scheme = _plain(show_scheme_alone(row))
    source = _code(_public_name(checkpoint))
    if (base := _base(checkpoint)) is not None:
        return (
            f"# {name}, {scheme}\n\nAn adapter for the checkpoint {_code(base)} of {source}, which stays as it is. It "
            "wins back a part of what quantizing took."
        )
    return f"# {name}, {scheme}\n\n{source} with its weights quantized as {scheme}; the others are {row.dtype}."


def _base(checkpoint: MeasuredCheckpoint) -> str | None:
    """The folder of the checkpoint to which an adapter belongs."""
    return base_path(checkpoint.path.rsplit("/", 1)[-1])


def _folder_name(model: str) -> str:
    return model.rstrip("/").rsplit("/", 1)[-1]


def _public_name(checkpoint: MeasuredCheckpoint) -> str:
    """The name of the model. Of a folder, without the folders above it, which are private."""
    return _folder_name(checkpoint.row.model) if checkpoint.is_folder else checkpoint.row.model


def _loading(row: ResultRow, *, runs_code: bool, has_tokenizer: bool) -> str:
    auto_class = _AUTO_CLASSES.get(row.details.task or "", "AutoModel")
    trust = ", trust_remote_code=True" if runs_code else ""
    libraries = " ".join(dict.fromkeys(("transformers", "accelerate", *describe_row(row.scheme).libraries)))
    lines = [
        "## How to load it",
        f"With `pip install {libraries}`; the scheme is in `config.json`, so nothing else is needed:",
        "```python\n"
        f"from transformers import {'AutoTokenizer, ' if has_tokenizer else ''}{auto_class}\n\n"
        'model_id = "."  # this folder, or its id on the hub\n'
        f'model = {auto_class}.from_pretrained(model_id, device_map="auto"{trust})\n'
        + (f"tokenizer = AutoTokenizer.from_pretrained(model_id{trust})\n" if has_tokenizer else "")
        + "```",
    ]
    if auto_class == "AutoModelForCausalLM" and "bitsandbytes" in describe_row(row.scheme).libraries:
        lines += [
            "To train an adapter on it (QLoRA), with `pip install peft`:",
            "```python\n"
            "from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training\n\n"
            'adapter = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")\n'
            "model = get_peft_model(prepare_model_for_kbit_training(model), adapter)\n"
            "```",
        ]
    return "\n\n".join(lines)


def _loading_adapter(base: str, row: ResultRow, *, runs_code: bool, has_tokenizer: bool) -> str:
    auto_class = _AUTO_CLASSES.get(row.details.task or "", "AutoModel")
    trust = ", trust_remote_code=True" if runs_code else ""
    libraries = " ".join(dict.fromkeys(("transformers", "accelerate", LIBRARY, *describe_row(row.scheme).libraries)))
    return "\n\n".join(
        [
            "## How to load it",
            f"With `pip install {libraries}`, and the checkpoint that it belongs to:",
            "```python\n"
            "from peft import PeftModel\n"
            f"from transformers import {'AutoTokenizer, ' if has_tokenizer else ''}{auto_class}\n\n"
            f'base_id = "../{base}"  # the checkpoint, or its id on the hub\n'
            f'model = {auto_class}.from_pretrained(base_id, device_map="auto"{trust})\n'
            'model = PeftModel.from_pretrained(model, ".")  # this folder, or its id on the hub\n'
            + (f"tokenizer = AutoTokenizer.from_pretrained(base_id{trust})\n" if has_tokenizer else "")
            + "```",
        ]
    )


def _other_loaders(row: ResultRow) -> str:
    """What `verify --for` makes of it, as far as that is on record."""
    lines = [
        f"- {_plain(name)} ({judged.version}): {_plain(' '.join((f'{judged.verdict}.', *(judged.reasons or ()))))}"
        for name, judged in (row.details.audit.loaders or {}).items()
    ]
    told = "Judged from its config, headers and names, by reading the source of each:"
    return "\n".join(["## With others", "", told, "", *lines]) if lines else ""


def _not_measured(row: ResultRow) -> str:
    reason = f": {_plain(': '.join(filter(None, (row.error_kind, row.error_message))))}" if row.error_kind else ""
    return f"## Measurements\n\nNone: its job {row.job_id} is {row.state}{reason}"


def _measured(row: ResultRow, baseline: ResultRow | None) -> str:
    if baseline is not None and not _is_comparable(row, baseline):
        baseline = None
    columns = [column for column in RESULTS_COLUMNS if column.metrics not in _LEFT_OUT]
    lines = [line for column in columns if (line := _line(column, row, baseline)) is not None]
    if baseline is None:
        table = ["| | this model |", "|---|---|"]
    else:
        table = [f"| | this model | {_plain(show_scheme(baseline))} | |", "|---|---|---|---|"]
    parts = ["## Measurements", "\n".join([*table, *lines])]
    if tasks := [f"- {_plain(title)}: {_plain(text)}" for title, text in task_lines(row)]:
        parts.append("\n".join(["Tasks of lm-evaluation-harness:", "", *tasks]))
    parts.append("\n".join(f"- {text}" for text in _remarks(row, baseline, lines)))
    return "\n\n".join(parts)


def _is_comparable(row: ResultRow, baseline: ResultRow) -> bool:
    return baseline.state == JobState.SUCCEEDED and may_compare(row, baseline, on_device=False)


def _line(column: MetricColumn, row: ResultRow, baseline: ResultRow | None) -> str | None:
    metric = column.metric_of(row)
    if metric is None:
        return None
    unit = " (nats)" if metric.label == "KL" else ""
    cells = [f"{metric.line_title}{unit}", show_metric(metric, row)]
    if baseline is not None:
        comparable = may_compare(row, baseline, on_device=metric.on_device)
        cells += [show_metric(metric, baseline) if comparable else "–", show_relative(column, row, baseline)]
    return f"| {' | '.join(map(_plain, cells))} |"


def _remarks(row: ResultRow, baseline: ResultRow | None, lines: Sequence[str]) -> Iterable[str]:
    yield f"Measured with {_plain(show_protocol(row))}."
    device = _plain(str(row.device_name))
    if MeasuredPart.SPEED not in row.not_measured:
        yield f"Speed and memory were measured on {device}; other devices give other figures."
    else:
        yield f"Measured on {device}, without its speed."
    versions = row.details.versions or {}
    names = (*_VERSIONS, *describe_row(row.scheme).libraries)
    if known := [f"{name} {versions[name]}" for name in dict.fromkeys(names) if versions.get(name)]:
        yield _plain(f"With {', '.join(known)}.")
    if row.kl_mean is not None:
        yield (
            "KL is the mean Kullback-Leibler divergence of its predictions from the unquantized model's; top-1 "
            "agreement is how often the most likely token is the same."
        )
    if any(NOISE_MARK in line for line in lines):
        yield f"{NOISE_MARK} means {NOT_DISTINGUISHABLE} from the unquantized model."
    if any(UNSTEADY_MARK in line for line in lines):
        yield f"{UNSTEADY_MARK} means uncertain: the speed differed much between rounds, or they confirm no difference."
    if BITS_PER_PARAM.value(row) is not None:
        yield "bits/param is of all parameters, unquantized ones included."
    for text in (*audit_warnings(row), *fairness_remarks(row.details.flags), *emulation_remarks([row])):
        alone = _WITH_DATABASE.sub("", text)
        yield f"{_plain(alone[0].upper() + alone[1:])}"
    if baseline is None:
        yield "The unquantized model has no result under the same protocol, so there are no ratios."


def _provenance(checkpoint: MeasuredCheckpoint, licence: str | None) -> str:
    row = checkpoint.row
    commit = row.details.commit or row.revision
    origin = (
        _code(_public_name(checkpoint))
        if checkpoint.is_folder
        else f"[{row.model}](https://huggingface.co/{row.model})"
    )
    lines = [
        f"- Base model: {origin}" + (f" at {_code(commit)}" if commit else ""),
        f"- Licence: {_plain(licence)}, that of the base model" if licence else "- Licence: as for the base model",
        f"- Made by qbatch, job {row.job_id}. `qbatch.json` has the checksums of all files, with the root "
        + _code(checkpoint.root_sha256),
    ]
    return "\n".join(["## Where it comes from", "", *lines])


def _plain(text: str) -> str:
    """On one line, and without what Markdown would take for a table, a link or HTML: names come from anywhere."""
    for character in ("|", "<", "[", "]", "`"):
        text = text.replace(character, f"\\{character}" if character != "`" else "'")
    return printable(text)


def _code(text: str) -> str:
    return f"`{printable(text).replace('`', chr(39))}`"
