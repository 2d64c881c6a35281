"""What the state of an optimizer takes in 8 bits: bitsandbytes' paged and plain AdamW beside torch's.

    python -m benchmarks.optimizers --shape tiny
    python -m benchmarks.optimizers --shape llama-8b --device cuda:0

Every weight of the shape is trained for some steps, on random tokens, with each optimizer in a process of its own. The
weights are random, made on the device, and their gradients are computed by the model. bitsandbytes keeps the state of
parameters with fewer than 4096 elements in float32: they are counted and named. What does not fit is said.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from benchmarks.random_source import SHAPES

OPTIMIZERS = ("PagedAdamW8bit", "AdamW8bit", "AdamW")
# bitsandbytes' own (``min_8bit_size``).
_LEAST_8BIT = 4096
_TOKENS = 256
_MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """Bytes of state by what holds them; ``first_s`` is the step that allocates the state, ``step_s`` the median of the
    others. ``peak_bytes``: of torch's allocator, which does not count paged memory; None on a CPU."""

    optimizer: str
    parameters: int
    weights_bytes: int
    state: dict[str, int]
    small: dict[str, int]
    small_state_bytes: int
    paged_bytes: int
    peak_bytes: int | None
    first_s: float
    step_s: float
    loss: float


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tiny")
    parser.add_argument("--device", default=None, help="cpu or cuda:0; by default a GPU if there is one")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=_TOKENS, help="in each step's sequence")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, action="append", help="may be repeated; by default all")
    asked = parser.parse_args(argv)
    found: list[Trained] = []
    for name in asked.optimizer or OPTIMIZERS:
        said = _apart(name, asked.shape, asked.device, asked.steps, asked.tokens)
        if isinstance(said, str):
            print(f"{name}: {said}", flush=True)
            continue
        found.append(said)
        print("\n".join(_in_full(said)), flush=True)
    print(json.dumps([asdict(one) for one in found]))
    print("\n".join(_table(found, asked.shape, asked.steps)))
    sys.exit(0 if found else 1)


def _apart(name: str, shape: str, device: str | None, steps: int, tokens: int) -> Trained | str:
    """In a process of its own, so that no optimizer has the memory of another. A sentence where it failed."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_train, args=(send, name, shape, device, steps, tokens))
    process.start()
    send.close()
    try:
        answer = receive.recv()
    except EOFError:
        answer = "its process was killed, as when the memory does not suffice"
    process.join()
    return Trained(**answer) if isinstance(answer, dict) else str(answer)


def _train(send: Any, name: str, shape: str, device: str | None, steps: int, tokens: int) -> None:
    import torch

    try:
        send.send(asdict(_trained(name, shape, device or _usual_device(), steps, tokens)))
    except torch.OutOfMemoryError as error:
        send.send(f"the GPU's memory does not suffice: {str(error).splitlines()[0]}")


def _usual_device() -> str:
    import torch

    return "cuda:0" if torch.cuda.is_available() else "cpu"


def _trained(name: str, shape: str, device: str, steps: int, tokens: int) -> Trained:
    import torch

    model = _model(shape, device)
    optimizer = _optimizer(name, model)
    generator = torch.Generator(device).manual_seed(0)
    times: list[float] = []
    loss = float("nan")
    for _ in range(steps):
        ids = torch.randint(model.config.vocab_size, (1, tokens), generator=generator, device=device)
        model(input_ids=ids, labels=ids).loss.backward()
        _wait(device)
        begin_s = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        _wait(device)
        times.append(time.perf_counter() - begin_s)
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=ids).loss)
    named = dict(model.named_parameters())
    tensors = [*_state_tensors(optimizer, named)]
    return Trained(
        optimizer=type(optimizer).__name__,
        parameters=sum(parameter.numel() for parameter in named.values()),
        weights_bytes=sum(parameter.nbytes for parameter in named.values()),
        state=_by_kind(tensors),
        small=dict(Counter(_general(one) for one, parameter in named.items() if parameter.numel() < _LEAST_8BIT)),
        small_state_bytes=sum(
            tensor.nbytes
            for one, _, tensor in tensors
            if named[one].numel() < _LEAST_8BIT and tensor.is_floating_point()
        ),
        paged_bytes=sum(tensor.nbytes for _, _, tensor in tensors if getattr(tensor, "is_paged", False)),
        peak_bytes=torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else None,
        first_s=times[0],
        step_s=median(times[1:] or times),
        loss=loss,
    )


def _model(shape: str, device: str) -> Any:
    """Random weights of the shape, made on the device. Activations are computed again in the backward pass."""
    import torch
    import transformers

    class_name, dtype, fields = SHAPES[shape]
    cls = getattr(transformers, class_name)
    torch.manual_seed(0)
    config = cls.config_class(**fields, dtype=dtype, use_cache=False)
    before = torch.get_default_dtype()
    # A CPU may emulate bfloat16, many times slower than float32.
    torch.set_default_dtype(torch.float32 if device == "cpu" else getattr(torch, dtype))
    try:
        with torch.device(device):
            model = cls(config)
    finally:
        torch.set_default_dtype(before)
    with warnings.catch_warnings():
        # Its new name came with a version that not every host has.
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable()
    return model.train()


def _optimizer(name: str, model: Any) -> Any:
    import bitsandbytes as bnb
    import torch

    cls = torch.optim.AdamW if name == "AdamW" else getattr(bnb.optim, name)
    return cls(model.parameters(), lr=1e-5)


def _state_tensors(optimizer: Any, named: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """The parameter's name, the key and the tensor of all that the optimizer keeps."""
    import torch

    names = {id(parameter): name for name, parameter in named.items()}
    for parameter, entries in optimizer.state.items():
        for key, value in entries.items():
            if isinstance(value, torch.Tensor):
                yield names[id(parameter)], key, value


def _by_kind(tensors: Sequence[tuple[str, str, Any]]) -> dict[str, int]:
    """Bytes by key and dtype. The tables of bitsandbytes, which all parameters share, count once."""
    distinct = {(tensor.data_ptr(), tensor.nbytes): (key, tensor) for _, key, tensor in tensors}
    counted: Counter[str] = Counter()
    for key, tensor in distinct.values():
        counted[f"{key} {str(tensor.dtype).removeprefix('torch.')}"] += tensor.nbytes
    return dict(sorted(counted.items()))


def _general(name: str) -> str:
    """The name with any layer's number."""
    return re.sub(r"\.\d+\.", ".*.", name)


def _wait(device: str) -> None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def _in_full(one: Trained) -> Iterator[str]:
    yield f"{one.optimizer}: {one.parameters:,} parameters, {one.weights_bytes / _MIB:,.1f} MiB of weights"
    for kind, nbytes in one.state.items():
        yield f"  state, {kind}: {nbytes / _MIB:,.3f} MiB"
    small = sum(one.small.values())
    yield f"  under {_LEAST_8BIT} elements: {small} parameters, with {one.small_state_bytes / _MIB:,.3f} MiB of state"
    for name, number in sorted(one.small.items()):
        yield f"    {number} × {name}"


def _table(found: Sequence[Trained], shape: str, steps: int) -> Iterator[str]:
    yield f"{shape}, {steps} steps"
    yield "| optimizer | state, MiB | bytes a parameter | paged, MiB | peak, MiB | first step, s | step, s | loss |"
    yield "|---|---|---|---|---|---|---|---|"
    for one in found:
        state = sum(one.state.values())
        peak = "–" if one.peak_bytes is None else f"{one.peak_bytes / _MIB:,.0f}"
        yield (
            f"| {one.optimizer} | {state / _MIB:,.2f} | {state / one.parameters:.2f} | {one.paged_bytes / _MIB:,.2f} | "
            f"{peak} | {one.first_s:.3f} | {one.step_s:.4f} | {one.loss:.4f} |"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
