"""A multiple-choice task in a local YAML file, a tiny model that was taught its answers, and its accuracy computed
without lm-evaluation-harness."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import tiny

WORDS = ("salt", "rain", "iron", "moss", "lamp", "drum", "silk", "corn")
# Every fourth answer is taught wrong.
QUESTIONS = [
    {"question": f"Which word is number {number}?", "choices": [WORDS[(number + k * 3) % 8] for k in range(4)],
     "answer": number % 4, "taught": (number + (number % 4 == 0)) % 4}
    for number in range(24)
]  # fmt: skip
TAUGHT_ACCURACY = 0.75
CONFIG: dict[str, Any] = {
    "task": "quiz",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "quiz.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "Q: {{question}}\nA:",
    "doc_to_target": "{{answer}}",
    "doc_to_choice": "choices",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    "metadata": {"version": 2},
}


def write_quiz(folder: Path, **config: Any) -> Path:
    """``quiz.yaml`` with its questions beside it; ``config`` overrides keys of the task. Its path."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(question) for question in QUESTIONS]
    (folder / "quiz.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    path = folder / "quiz.yaml"
    path.write_text(yaml.safe_dump(CONFIG | config, sort_keys=False), encoding="utf-8")
    return path


def make_taught(folder: Path) -> Path:
    """A tiny float32 llama that gives the taught answers, by a margin that quantizing leaves standing."""
    tiny.make_causal(folder)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = [f"{prompt(question)} {question['choices'][question['taught']]}" for question in QUESTIONS]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for row, question in zip(labels, QUESTIONS, strict=True):
        row[: len(tokenizer(prompt(question))["input_ids"])] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(200):
        loss = model(**batch, labels=labels).loss
        if loss.item() < 0.01:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.01
    model.save_pretrained(folder)
    return folder


def prompt(question: dict[str, Any]) -> str:
    return f"Q: {question['question']}\nA:"


@torch.no_grad()
def log_likelihoods(folder: Path, *, before: str = "") -> list[list[float]]:
    """ln p(answer | question) of each question's four answers, by the model in ``folder`` at bfloat16, one at a time.

    ``before`` precedes every question.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [
        [_log_likelihood(model, tokenizer, before + prompt(question), f" {choice}") for choice in question["choices"]]
        for question in QUESTIONS
    ]


def right_answers(scores: list[list[float]]) -> list[bool]:
    """Of each question, whether its right answer is the likeliest of the four."""
    return [row.index(max(row)) == question["answer"] for row, question in zip(scores, QUESTIONS, strict=True)]


def accuracy(scores: list[list[float]]) -> float:
    right = right_answers(scores)
    return sum(right) / len(right)


def brier_score(scores: list[list[float]]) -> float:
    """Mean over the questions of Σ (p - [right])², p the softmax of the four."""
    total = 0.0
    for row, question in zip(scores, QUESTIONS, strict=True):
        weights = [math.exp(score) for score in row]
        shares = [weight / sum(weights) for weight in weights]
        total += sum((share - (at == question["answer"])) ** 2 for at, share in enumerate(shares))
    return total / len(scores)


def _log_likelihood(model: Any, tokenizer: Any, before: str, after: str) -> float:
    start = len(tokenizer(before)["input_ids"])
    ids = torch.tensor(tokenizer(before + after)["input_ids"])
    logits = model(ids[None]).logits[0].double()
    return sum(float(logits[at - 1].log_softmax(-1)[ids[at]]) for at in range(start, len(ids)))
