"""The names under which transformers loads the tensors of a file: it renames them by the conversions of the model."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from qbatch.worker.quantizing.planning.skeleton import Skeleton


def conversions_of(skeleton: Skeleton) -> list[Any]:
    """transformers' conversions for the model, none of them marked as used."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return list(get_model_conversion_mapping(skeleton.model, None, skeleton.quantizer))


def loaded_name(skeleton: Skeleton, name: str, conversions: list[Any], state: dict[str, Any]) -> str:
    """The parameter that the tensor ``name`` is loaded into, or becomes a part of. Marks the conversions that are used
    as used. ``state`` is the model's."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, WeightConverter)]
    return str(rename_source_key(name, renamings, converters, skeleton.model.base_model_prefix, state)[0])


def loads_own_names(skeleton: Skeleton) -> bool:
    """Whether a file with the model's own names is loaded as such. Some conversions rename those once more."""
    state = skeleton.model.state_dict()
    conversions = conversions_of(skeleton)
    return all(loaded_name(skeleton, name, conversions, state) == name for name in state)


def without_converters_of(conversions: list[Any], names: Container[str], state: dict[str, Any]) -> list[Any]:
    """``conversions`` without those that compute one of ``names``, which are keys of ``state``."""
    from transformers.core_model_loading import WeightConverter

    def computes(one: Any) -> bool:
        reverse = one.reverse_transform()
        return any(name in names and reverse.rename_source_key(name)[1] is not None for name in state)

    return [one for one in conversions if not isinstance(one, WeightConverter) or not computes(one)]
