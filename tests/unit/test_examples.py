"""The example models: trained, whole, and of the dtypes they promise."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoTokenizer

from examples import make_models, training
from examples.make_models import EXAMPLES, Example
from examples.muon import orthogonalized
from qbatch.core.domain import DType
from qbatch.worker.models.architecture import ModelKind
from qbatch.worker.models.load import load
from tests.model_lists import read_model_list

ROOT = Path(__file__).parents[2]
_STEPS = 30
_TEXTS = 600


class Dtypes(TorchDispatchMode):
    """Notes the dtype of every tensor that an operation takes or gives."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs, found))
        self.seen |= {leaf.dtype for leaf in leaves if isinstance(leaf, torch.Tensor)}
        return found


def unheard(_: str) -> None:
    return None


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """A part of the corpus, in its own order."""
    return training.corpus()[:_TEXTS]


@pytest.fixture(scope="module", params=EXAMPLES, ids=lambda example: example.name)
def made(
    request: pytest.FixtureRequest, texts: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Example, Path, str]:
    """An example after a few steps of its training, its folder, and the line that says how it went."""
    into = tmp_path_factory.mktemp("examples")
    report = training.make(request.param, into, report=unheard, texts=texts, steps=_STEPS)
    return request.param, into / request.param.name, report


@pytest.mark.slow
def test_training_lowers_the_held_out_loss(made: tuple[Example, Path, str]) -> None:
    losses = re.search(r"held-out loss ([\d.]+) → ([\d.]+) nats", made[2])
    assert losses is not None
    before, after = map(float, losses.groups())
    # ln 2048 = 7.62 is the loss of knowing nothing.
    assert before == pytest.approx(7.62, abs=0.15)
    assert after < before - 0.5


@pytest.mark.slow
def test_an_example_loads_as_a_causal_model_that_its_tokenizer_fits(made: tuple[Example, Path, str]) -> None:
    example, folder, _ = made
    loaded = load(folder, dtype=DType.FLOAT32, device="cpu")
    assert loaded.kind is ModelKind.CAUSAL_LM
    assert len(loaded.tokenizer) == loaded.model.config.vocab_size == training.VOCAB_SIZE
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == example.dtype


def test_every_text_survives_the_tokenizer(made: tuple[Example, Path, str]) -> None:
    example, folder, _ = made
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "def f(x):\n    return x  # naïve — 𝛑\n"
    ids = tokenizer(text)["input_ids"]
    assert (ids[0] == training.BOS) == example.prefix_bos
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_no_staging_is_left_behind(made: tuple[Example, Path, str]) -> None:
    assert [path.name for path in made[1].parent.iterdir()] == [made[0].name]


def test_a_model_that_is_there_is_left_alone(tmp_path: Path) -> None:
    for example in EXAMPLES:
        (tmp_path / example.name).mkdir()
    make_models.main([str(tmp_path)])
    assert all(not list((tmp_path / example.name).iterdir()) for example in EXAMPLES)


def test_the_list_names_the_models_that_are_made() -> None:
    sources = read_model_list(
        (ROOT / "examples" / "models.txt").read_text().splitlines(), check_folders=False, roots=None
    )
    assert [source.name for source in sources] == [f"examples/models/{example.name}" for example in EXAMPLES]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_training_uses_no_16_bit_arithmetic(example: Example) -> None:
    with Dtypes() as dtypes:
        model = training.untrained(example)
        training.train(model, torch.zeros(64, training.WINDOW_TOKENS, dtype=torch.long), 3, unheard)
    assert {dtype for dtype in dtypes.seen if dtype.is_floating_point} == {torch.float32}


def test_muon_s_updates_are_nearly_orthogonal() -> None:
    matrices = torch.randn(2, 128, 384, generator=torch.Generator().manual_seed(0))
    for found in (orthogonalized(matrices), orthogonalized(matrices.mT)):
        values = torch.linalg.svdvals(found)
        assert ((values > 0.6) & (values < 1.3)).all()
    # The same as torch's own, which computes in bfloat16.
    parameter = torch.nn.Parameter(torch.zeros(128, 384))
    parameter.grad = matrices[0].clone()
    torch.optim.Muon([parameter], lr=1.0, momentum=0.0, nesterov=False, weight_decay=0.0).step()
    torch.testing.assert_close(-parameter.data, orthogonalized(matrices)[0], atol=0.01, rtol=0.05)


def test_the_first_line_waits_for_no_import() -> None:
    code = "import sys, examples.make_models; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
