"""The states that are saved, one per rank: how they are made, changed, counted and told apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

TITLES = {
    "large": "10 x 100 MB",
    "small": "5,000 x 200 kB",
    "gpt": "GPT 124M with AdamW",
}
_UNIFORM = {"large": (10, 25_000_000), "small": (5_000, 50_000)}  # Tensors, float32 elements of each.
_LAYERS, _WIDTH, _VOCABULARY, _CONTEXT = 12, 768, 50_304, 1_024


@dataclass
class State:
    """`tree` is what is saved; `optimizers` own all its tensors."""

    tree: dict[str, Any]
    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)


def build(scenario: str, rank: int, scale: float, *, empty: bool = False) -> State:
    """`scale`: part of the full size. `empty`: all zero, every page touched; else different in every tensor and rank.

    Names differ between ranks, so that no system takes two ranks' tensors for copies of each other.
    """
    if scenario == "gpt":
        return _gpt(rank, scale, empty)
    count, elements = _UNIFORM[scenario]
    tensors = [torch.empty(elements) for _ in range(max(1, round(count * scale)))]
    _fill(tensors, rank, empty)
    model = {f"layer{i:04d}.weight": tensor for i, tensor in enumerate(tensors)}
    return State({f"model{rank}": model, "step": 0}, [torch.optim.SGD(tensors, lr=0.0)])


def _gpt(rank: int, scale: float, empty: bool) -> State:
    """124 million parameters at scale 1; AdamW keeps two tensors of the same shape and a counter for each."""
    with torch.device("meta"):
        model = torch.nn.ModuleDict(
            {
                "tokens": torch.nn.Embedding(round(_VOCABULARY * scale), _WIDTH),
                "positions": torch.nn.Embedding(_CONTEXT, _WIDTH),
                "blocks": torch.nn.ModuleList(_block() for _ in range(max(1, round(_LAYERS * scale)))),
                "norm": torch.nn.LayerNorm(_WIDTH),
            }
        )
    model.to_empty(device="cpu")
    names = {parameter: name for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(names, lr=1e-4)
    for parameter in names:
        optimizer.state[parameter] = {
            "step": torch.zeros(()),
            "exp_avg": torch.empty_like(parameter),
            "exp_avg_sq": torch.empty_like(parameter),
        }
    with torch.no_grad():
        _fill([p.detach() for p in names], 3 * rank, empty)
        for i, key in enumerate(("exp_avg", "exp_avg_sq")):
            _fill([optimizer.state[p][key] for p in names], 3 * rank + i + 1, empty)
    tree = {
        f"model{rank}": {name: parameter.detach() for parameter, name in names.items()},
        f"optimizer{rank}": {
            "state": {names[p]: optimizer.state[p] for p in names},
            "param_groups": [{"lr": 1e-4, "betas": [0.9, 0.999], "weight_decay": 0.01, "params": list(names.values())}],
        },
        "step": 0,
    }
    return State(tree, [optimizer])


def _block() -> torch.nn.Module:
    return torch.nn.ModuleDict(
        {
            "norm1": torch.nn.LayerNorm(_WIDTH),
            "qkv": torch.nn.Linear(_WIDTH, 3 * _WIDTH),
            "projection": torch.nn.Linear(_WIDTH, _WIDTH),
            "norm2": torch.nn.LayerNorm(_WIDTH),
            "up": torch.nn.Linear(_WIDTH, 4 * _WIDTH),
            "down": torch.nn.Linear(4 * _WIDTH, _WIDTH),
        }
    )


def _fill(tensors: list[torch.Tensor], seed: int, empty: bool) -> None:
    """Random numbers are made once and shifted: making them all would take longer than the measurement."""
    if empty:
        for tensor in tensors:
            tensor.zero_()  # Also touches its pages.
        return
    longest = max(tensor.numel() for tensor in tensors)
    noise = torch.rand(longest, generator=torch.Generator().manual_seed(seed))
    for i, tensor in enumerate(tensors):
        tensor.copy_(noise[: tensor.numel()].view(tensor.shape)).add_(i / 7)


def tensors_of(tree: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Path and tensor, in the order of the names."""
    items = sorted(tree.items()) if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        if isinstance(value, torch.Tensor):
            yield f"{path}/{key}", value
        elif isinstance(value, (dict, list)):
            yield from tensors_of(value, f"{path}/{key}")


def change(state: State, step: int) -> None:
    """As a training step does: another value in every element."""
    state.tree["step"] = step
    for _, tensor in tensors_of(state.tree):
        tensor.add_(1 + step / 16)


def clear(state: State) -> None:
    state.tree["step"] = -1
    for _, tensor in tensors_of(state.tree):
        tensor.zero_()


def digest(state: State) -> str:
    """Of every name, every byte and the step."""
    result = hashlib.sha256()
    for name, tensor in tensors_of(state.tree):
        result.update(name.encode())
        result.update(tensor.reshape(-1).view(torch.uint8).numpy())
    result.update(str(state.tree["step"]).encode())
    return result.hexdigest()


def size_of(state: State) -> tuple[int, int]:
    """Bytes and number of tensors."""
    sizes = [tensor.nbytes for _, tensor in tensors_of(state.tree)]
    return sum(sizes), len(sizes)


def expected_bytes(scenario: str, scale: float) -> int:
    """About: to size a pool before the state exists."""
    if scenario != "gpt":
        count, elements = _UNIFORM[scenario]
        return max(1, round(count * scale)) * elements * 4
    layers, vocabulary = max(1, round(_LAYERS * scale)), round(_VOCABULARY * scale)
    parameters = (vocabulary + _CONTEXT + 2) * _WIDTH + layers * (12 * _WIDTH * _WIDTH + 13 * _WIDTH)
    return 12 * parameters
