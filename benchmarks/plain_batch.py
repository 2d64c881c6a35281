"""What somebody without qbatch would write: quantize and measure each model of a list, one after another.

    python -m benchmarks.plain_batch --text TEXT_FILE --folder FOLDER MODEL...

It uses nothing of qbatch. For each model: load it at 16 bits; time the prefill and the decoding of 64 tokens in 6 runs
each, after 2 warm-ups; score the windows of the text. Then for 8 and for 4 bits: quantize with bitsandbytes, save, load
what was saved, and measure the same, with the KL divergence from the model at 16 bits on the same windows. Prints one
line of JSON: the seconds of each stage, and the figures and seconds of each row. ``benchmarks.batch`` compares it with
qbatch.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROMPT_TOKENS, NEW_TOKENS = 256, 64
WARMUPS, RUNS = 2, 6
MAX_WINDOWS = 32
_LOADED_S = time.perf_counter()
# Rows of logits that are converted to float64 at once.
_ROWS = 256


class Stages:
    """Seconds spent in each stage, in order of the first use."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begin_s = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin_s


def text_windows(tokenizer: Any, text: Path, length: int, device: str) -> list[Any]:
    """Ids [1, length] of consecutive windows of the text; the last may be shorter."""
    import torch

    ids = tokenizer(text.read_text(), add_special_tokens=False, verbose=False)["input_ids"]
    starts = range(0, min(len(ids), length * MAX_WINDOWS), length)
    cut = (ids[start : start + length] for start in starts)
    return [torch.tensor([window], device=device) for window in cut if len(window) > 1]


def speed(model: Any, prompt: Any, synchronize: Callable[[], None]) -> dict[str, Any]:
    """Prefill seconds and decoded tokens per second, with each run's figure."""
    prefills = _timed(model, prompt, 1, synchronize)
    generates = _timed(model, prompt, NEW_TOKENS, synchronize)
    prefill_s = statistics.median(prefills)
    rates = [(NEW_TOKENS - 1) / (seconds - prefill_s) for seconds in generates]
    return {"prefill_s": prefill_s, "decode_tokens_per_s": statistics.median(rates), "decode_runs": rates}


def _timed(model: Any, prompt: Any, new_tokens: int, synchronize: Callable[[], None]) -> list[float]:
    """Seconds of each run of ``generate``, after the warm-ups."""
    times_s = []
    for _ in range(WARMUPS + RUNS):
        synchronize()
        begin_s = time.perf_counter()
        model.generate(prompt, min_new_tokens=new_tokens, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
        synchronize()
        times_s.append(time.perf_counter() - begin_s)
    return times_s[WARMUPS:]


def quality(model: Any, windows: list[Any], base_logits: list[Any] | None) -> tuple[dict[str, float], list[Any]]:
    """(the perplexity, and the KL divergence from ``base_logits`` if there are any; the logits of each window)."""
    import torch

    nll, kl, tokens, kept = 0.0, 0.0, 0, []
    for number, ids in enumerate(windows):
        logits = model(ids, use_cache=False).logits[0, :-1]
        base = None if base_logits is None else base_logits[number]
        for begin in range(0, len(logits), _ROWS):
            log_p = torch.log_softmax(logits[begin : begin + _ROWS].double(), -1)
            targets = ids[0, 1:][begin : begin + _ROWS]
            nll -= float(log_p.gather(1, targets[:, None]).sum())
            if base is not None:
                base_log_p = torch.log_softmax(base[begin : begin + _ROWS].double(), -1)
                kl += float((base_log_p.exp() * (base_log_p - log_p)).sum())
        tokens += len(logits)
        if base is None:
            kept.append(logits)
    figures = {"perplexity": float(torch.tensor(nll / tokens, dtype=torch.float64).exp())}
    return figures if base_logits is None else figures | {"kl_mean": kl / tokens}, kept


def batch(arguments: argparse.Namespace) -> dict[str, Any]:
    """Work through the models. Returns the seconds of each stage and the figures of each row."""
    stages = Stages()
    with stages("imports"):
        import bitsandbytes  # noqa: F401
        import torch
        import transformers
        from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        # It says in each layer of each step to what it casts its input, which costs the host a part of the step.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    device = arguments.device
    synchronize = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    configs = {
        8: lambda: BitsAndBytesConfig(load_in_8bit=True),
        4: lambda: BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        ),
    }
    rows: list[dict[str, Any]] = []
    row_began_s = time.perf_counter()

    def load(folder: Path, **options: Any) -> Any:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, device_map={"": device}, **options
        ).eval()
        synchronize()
        return model

    def measured(model: Any, name: str, bits: int, base_logits: list[Any] | None) -> list[Any]:
        with stages("speed"):
            figures = speed(model, windows[0][:, :PROMPT_TOKENS], synchronize)
        with stages("quality"):
            more, logits = quality(model, windows, base_logits)
        nonlocal row_began_s
        now_s = time.perf_counter()
        rows.append({"model": name, "bits": bits, "row_s": now_s - row_began_s, **figures, **more})
        row_began_s = now_s
        return logits

    with torch.inference_mode():
        for source in arguments.models:
            windows = text_windows(AutoTokenizer.from_pretrained(source), arguments.text, arguments.window, device)
            with stages("load"):
                model = load(source)
            base_logits = measured(model, source.name, 16, None)
            model = None
            for bits in map(int, arguments.bits.split(",")):
                folder = arguments.folder / f"{source.name}-{bits}"
                with stages("quantize and save"):
                    model = load(source, quantization_config=configs[bits]())
                    model.save_pretrained(folder)
                model = None
                with stages("load"):
                    model = load(folder)
                measured(model, source.name, bits, base_logits)
                model = None
    return {"seconds": stages.seconds, "total_s": time.perf_counter() - _LOADED_S, "rows": rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, help="folders of models")
    parser.add_argument("--text", type=Path, required=True, help="the text whose windows are scored")
    parser.add_argument("--folder", type=Path, required=True, help="where to save the checkpoints")
    parser.add_argument("--bits", default="8,4")
    parser.add_argument("--window", type=int, default=1024, help="tokens of a window (default: 1024)")
    parser.add_argument("--device", default="cuda:0")
    arguments = parser.parse_args()
    # Libraries print to the log; the answer stands alone.
    answer = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    answer.write(json.dumps(batch(arguments)) + "\n")
    answer.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
