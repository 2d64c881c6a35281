"""The search's text as a model reads it."""

from __future__ import annotations

from dataclasses import replace

from qbatch.core.domain import DeviceKind, ProtocolOptions
from qbatch.core.search.search_protocol import SearchProtocol
from qbatch.worker.measuring.quality.probes import Probe, probes_of
from qbatch.worker.models.load import LoadedModel


def search_probes(loaded: LoadedModel, protocol: SearchProtocol, text: str) -> list[Probe]:
    """The windows of ``text``, each of which stands alone. Empty without a tokenizer."""
    measured = replace(
        ProtocolOptions(eval_text_sha256=protocol.text_sha256).for_device(DeviceKind.CPU),
        eval_window=protocol.window,
        eval_stride=protocol.window,
        eval_max_windows=protocol.windows,
    )
    return probes_of(loaded, measured, text)
