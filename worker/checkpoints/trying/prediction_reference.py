"""What the checkpoint predicts in its own dtype and in float32: the difference is the floor.

In its own dtype twice: as qbatch measures it, and with the kernels that round most often, which are those of other
engines. The packed kernel of some CPUs and fused attention round less.

And in float32 once more as if nothing had been left at 16 bits, since vLLM quantizes such layers in silence.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qbatch.core.domain import DType
from qbatch.core.errors import Unsupported
from qbatch.core.manifest import MANIFEST
from qbatch.core.sources import read_config, read_object
from qbatch.worker.methods.implementations import weights_of_model
from qbatch.worker.models.load import LoadedModel, load

PROMPTS = (
    "The weights of a model are stored in fewer bits, and each of its layers is a little different after that.",
    "A queue holds the jobs that nobody has begun, and a worker takes the next one whenever it has time for it.",
    "In the morning the town was quiet; the river had risen, and two boats lay on the wrong side of the bridge.",
)
_MOST_TOKENS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictionReference:
    """``exact`` and each of ``roundings`` are the model's outputs for each prompt, float32 [positions, width]: computed
    in float32, and in the checkpoint's dtype with one kind of kernels or another. They are logits over the vocabulary
    if ``is_logits``, else the vectors of the tokens.

    ``further`` are those in float32 if the layers left at 16 bits were quantized too, of which ``left`` are the last
    names; both are empty if there are none, or no logits.
    """

    tokens: tuple[tuple[int, ...], ...]
    exact: tuple[Any, ...]
    roundings: tuple[tuple[Any, ...], ...]
    is_logits: bool
    further: tuple[Any, ...] = ()
    left: tuple[str, ...] = ()


def make_reference(folder: Path, *, hidden: bool = False) -> PredictionReference:
    """Load the checkpoint three times. ``hidden`` asks for the vectors below the head. Raises what ``load`` raises, and
    Unsupported for an encoder-decoder."""
    dtype = _dtype(folder)
    rounded = _load(folder, dtype)
    tokens = _tokens(rounded)
    is_logits = not hidden and rounded.model.get_output_embeddings() is not None
    as_measured = _outputs(rounded, tokens, is_logits=is_logits)
    del rounded
    rounded_most = _load(folder, dtype)
    weights_of_model(rounded_most.model).use_generic_kernels(rounded_most.model)
    rounded_most.model.set_attn_implementation("eager")
    step_by_step = _outputs(rounded_most, tokens, is_logits=is_logits)
    del rounded_most
    exact = _load(folder, dtype)
    _compute_in_float32(exact.model)
    in_float32 = _outputs(exact, tokens, is_logits=is_logits)
    left = weights_of_model(exact.model).quantize_rest(exact.model) if is_logits else ()
    return PredictionReference(
        tokens=tokens,
        exact=in_float32,
        roundings=(as_measured, step_by_step),
        is_logits=is_logits,
        further=_outputs(exact, tokens, is_logits=is_logits) if left else (),
        left=left,
    )


def _dtype(folder: Path) -> DType:
    """The dtype in which the checkpoint was measured, or the config's if qbatch has not made the checkpoint."""
    manifest = folder / MANIFEST
    recorded = read_object(manifest).get("dtype") if manifest.is_file() else read_config(folder).get("dtype")
    return DType(recorded) if recorded in set(DType) - {DType.AUTO} else DType.FLOAT32


def _load(folder: Path, dtype: DType) -> LoadedModel:
    import torch

    loaded = load(folder, dtype=dtype, device="cuda:0" if torch.cuda.is_available() else "cpu")
    if loaded.model.config.is_encoder_decoder:
        raise Unsupported("an encoder-decoder is not tried: no prompt alone gives its predictions")
    return loaded


def _tokens(loaded: LoadedModel) -> tuple[tuple[int, ...], ...]:
    if loaded.tokenizer is not None:
        return tuple(tuple(loaded.tokenizer(text).input_ids[:_MOST_TOKENS]) for text in PROMPTS)
    size = loaded.model.config.get_text_config().vocab_size
    return tuple(tuple((start + 7 * step) % size for step in range(_MOST_TOKENS // 4)) for start in (3, 5, 11))


def _outputs(loaded: LoadedModel, tokens: tuple[tuple[int, ...], ...], *, is_logits: bool) -> tuple[Any, ...]:
    import torch

    model = loaded.model if is_logits else loaded.model.base_model
    with torch.inference_mode():
        found = [model(torch.tensor([ids], device=loaded.device)) for ids in tokens]
    # A position predicts the next token, so the last one of a prompt has nothing to be compared with.
    return tuple((one.logits[0, :-1] if is_logits else one.last_hidden_state[0]).float().cpu() for one in found)


def _compute_in_float32(model: Any) -> None:
    """transformers keeps a quantized checkpoint's other weights in the dtype that they are stored in, and packed layers
    compute in the one that their config names."""
    import torch

    weights = weights_of_model(model)
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = torch.float32
        for _, values in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if weights.is_quantized(values) or not values.is_floating_point():
                continue
            values.data = values.data.float()


def request(reference: PredictionReference, top: int) -> str:
    """The probe's standard input."""
    asked: Mapping[str, Any] = {"texts": PROMPTS, "tokens": reference.tokens, "top": top}
    return json.dumps(asked)
