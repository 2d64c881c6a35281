"""Which environment variables a worker keeps after reading its settings. Its runners inherit them."""

from __future__ import annotations

from collections.abc import Mapping

from qbatch.core.methods.registry import every_environment_prefix

# Paths, locale and proxies. QBATCH_HOME tells which stack a process belongs to.
_NAMES = frozenset(
    {
        *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "TERM", "COLUMNS", "NO_COLOR"),
        *("TMPDIR", "TEMP", "TMP", "VIRTUAL_ENV", "QBATCH_HOME"),
        *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"),
    }
)
# Settings of the libraries used for computing, downloading and TLS. PG is for libpq in the worker.
_PREFIXES = (
    *("LC_", "PYTHON", "LD_", "XDG_", "MALLOC_", "GLIBC_", "RUST_", "RAYON_"),
    *("SSL_", "CURL_CA_", "REQUESTS_CA_", "HF_", "HUGGING", "PG"),
    *("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "BLIS_", "NUMEXPR_", "VECLIB_", "ONEDNN_", "DNNL_", "ATEN_"),
    *("CUDA", "CUBLAS", "CUDNN_", "NVIDIA_", "NCCL_", "TORCH", "PYTORCH", "TRITON_"),
    *every_environment_prefix(),
    *("TRANSFORMERS_", "TOKENIZERS_", "SAFETENSORS_", "ACCELERATE_", "DATASETS_", "LM_", "NLTK_"),
)
_LIBPQ_VARIABLE = "PGPASSWORD"


def without_secrets(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that a runner may need. A model's own code can read them, including the token of the hub."""
    return {
        name: value
        for name, value in environ.items()
        if name != _LIBPQ_VARIABLE and (name.upper() in _NAMES or name.startswith(_PREFIXES))
    }


def has_database_password(environ: Mapping[str, str]) -> bool:
    """Whether libpq takes its password from a variable that ``without_secrets`` removes."""
    return bool(environ.get(_LIBPQ_VARIABLE))
