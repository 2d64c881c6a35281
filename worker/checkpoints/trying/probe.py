"""``python probe.py LOADER FOLDER ANSWER``: loads the checkpoint and writes what it predicts, as JSON, to ANSWER.

The prompts are JSON on standard input: ``{"texts": […], "tokens": [[…], …], "top": 20}``. Any interpreter can run this
file: it imports nothing of qbatch. A loader that this interpreter lacks ends it with exit code 3.
"""

from __future__ import annotations

import importlib
import json
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

NOT_INSTALLED = 3
"""The exit code that says so."""


def of_transformers(folder: str, asked: dict[str, Any]) -> dict[str, Any]:
    return _forward(_model(folder), asked)


def of_peft(folder: str, asked: dict[str, Any]) -> dict[str, Any]:
    """The model with a new adapter on every linear layer. That changes no output, but PEFT has replaced each layer."""
    peft = importlib.import_module("peft")
    model = peft.get_peft_model(_model(folder), peft.LoraConfig(target_modules="all-linear", r=4))
    return _forward(model.eval(), asked)


def of_sentence_transformers(folder: str, asked: dict[str, Any]) -> dict[str, Any]:
    """The vectors of the tokens, before they are pooled."""
    library = importlib.import_module("sentence_transformers")
    model = library.SentenceTransformer(folder, local_files_only=True)
    encoded = model.encode(asked["texts"], output_value="token_embeddings")
    return {"hidden": [vectors.float().cpu().tolist() for vectors in encoded]}


def of_vllm(folder: str, asked: dict[str, Any]) -> dict[str, Any]:
    library = importlib.import_module("vllm")
    engine = library.LLM(model=folder, enforce_eager=True, max_model_len=256, max_logprobs=asked["top"])
    sampling = library.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=asked["top"])
    prompts = [{"prompt_token_ids": tokens} for tokens in asked["tokens"]]
    outputs = engine.generate(prompts, sampling)
    # The first token of a prompt has no prediction.
    return {"logprobs": [[_pairs_of_vllm(step) for step in output.prompt_logprobs[1:]] for output in outputs]}


def _pairs_of_vllm(step: Any) -> list[tuple[int, float]]:
    return [(token, one.logprob) for token, one in sorted(step.items(), key=lambda item: -item[1].logprob)]


def _model(folder: str) -> Any:
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    cls = getattr(transformers, config.architectures[0])
    return cls.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype="auto").eval()


def _forward(model: Any, asked: dict[str, Any]) -> dict[str, Any]:
    import torch

    device = next(model.parameters()).device
    with torch.inference_mode():
        outputs = [model(torch.tensor([tokens], device=device)) for tokens in asked["tokens"]]
    if hasattr(outputs[0], "logits"):
        return {"logprobs": [top_logprobs(output.logits[0, :-1], asked["top"]) for output in outputs]}
    return {"hidden": [output.last_hidden_state[0].float().cpu().tolist() for output in outputs]}


def top_logprobs(logits: Any, count: int) -> list[list[tuple[int, float]]]:
    """Of each position of ``logits`` [positions, tokens] the likeliest tokens with their logarithmic probabilities."""
    values, tokens = logits.float().log_softmax(-1).topk(min(count, logits.shape[-1]))
    return [list(zip(*pair, strict=True)) for pair in zip(tokens.tolist(), values.tolist(), strict=True)]


LOADERS = {
    "transformers": (of_transformers, ("transformers",)),
    "peft": (of_peft, ("peft", "transformers")),
    "sentence-transformers": (of_sentence_transformers, ("sentence-transformers", "transformers")),
    "vllm": (of_vllm, ("vllm",)),
}


def version_of(package: str) -> str:
    """Raises ImportError. vLLM's build for CPUs is another distribution of the same package."""
    for distribution in (package, f"{package}-cpu"):
        with suppress(PackageNotFoundError):
            return version(distribution)
    raise ImportError(f"{package} is not installed")


def main(loader: str, folder: str, answer: str) -> int:
    probe, packages = LOADERS[loader]
    try:
        versions = {package: version_of(package) for package in packages}
        predicted = probe(folder, json.load(sys.stdin))
    except ImportError as error:
        sys.stderr.write(f"{error}\n")
        return NOT_INSTALLED
    Path(answer).write_text(json.dumps({"versions": versions} | predicted))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
