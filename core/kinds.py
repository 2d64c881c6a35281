"""The words for data types and devices. Standard library only."""

from __future__ import annotations

from enum import StrEnum

FLOATS = ("F64", "F32", "F16", "BF16")
FLOAT8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
"""The floating-point types of safetensors headers: of 16 bits or more, and of 8."""


class DType(StrEnum):
    """A floating-point type by its torch name; AUTO is resolved against the source (see ``stored_dtype``)."""

    AUTO = "auto"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


FLOAT_NAMES = {DType.FLOAT32: "F32", DType.FLOAT16: "F16", DType.BFLOAT16: "BF16"}
"""What safetensors headers call these types."""


class DeviceKind(StrEnum):
    """What a job may run on; AUTO is whichever kind a live worker serves, CUDA first."""

    AUTO = "auto"
    CUDA = "cuda"
    CPU = "cpu"
