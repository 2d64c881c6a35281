"""What of the environment a worker and its runners keep."""

from __future__ import annotations

import subprocess
import sys

import pytest

from qbatch.worker.serving.environment import without_secrets

KEPT = {
    *("PATH", "HOME", "TMPDIR", "LC_ALL", "LD_LIBRARY_PATH", "PYTHONPATH", "SSL_CERT_FILE", "https_proxy", "NO_PROXY"),
    *("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "PYTORCH_CUDA_ALLOC_CONF", "OMP_NUM_THREADS", "TRITON_CACHE_DIR"),
    *("HF_TOKEN", "HF_HOME", "HF_ENDPOINT", "HUGGING_FACE_HUB_TOKEN", "TRANSFORMERS_VERBOSITY", "BNB_CUDA_VERSION"),
    *("PGSSLMODE", "QBATCH_HOME"),
}
DROPPED = {
    *("QBATCH_BROKER_URL", "QBATCH_DATABASE_URL", "QBATCH_FLOWER_AUTH", "QBATCH_TRUST_REMOTE_CODE", "PGPASSWORD"),
    *("REDIS_PASSWORD", "POSTGRES_PASSWORD", "REDISCLI_AUTH", "CELERY_BROKER_URL", "FLOWER_BASIC_AUTH"),
    *("AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN", "SSH_AUTH_SOCK", "ANYTHING"),
}


def test_a_runner_has_what_its_libraries_read_and_nothing_else() -> None:
    assert without_secrets(dict.fromkeys(KEPT | DROPPED, "x")).keys() == KEPT


@pytest.mark.parametrize(("database", "code"), [("postgresql://127.0.0.1:1/none", 2), (None, 0)])
def test_a_password_that_runners_would_inherit_is_refused(database: str | None, code: int) -> None:
    script = (
        "import os, sys; from qbatch.core.errors import UsageError; from qbatch.core.settings import Settings;"
        "from qbatch.worker.serving.serve import drop_secrets\n"
        "try: drop_secrets(Settings.from_env(os.environ))\n"
        "except UsageError as error: sys.exit(2 if 'PGPASSWORD' in str(error) else 3)\n"
        "assert 'QBATCH_DATABASE_URL' not in os.environ and 'PGPASSWORD' not in os.environ"
    )
    environ = {"PATH": "/usr/bin", "HOME": "/nowhere", "PGPASSWORD": "x"}
    if database is not None:
        environ["QBATCH_DATABASE_URL"] = database
    done = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
