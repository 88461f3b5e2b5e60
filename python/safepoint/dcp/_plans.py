"""From a plan that DCP's own planner made to a state that the engine saves."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItemType

from safepoint._boxes import Chunks
from safepoint._state import DATACLASS, DICT, LIST, TUPLE, kind_of
from safepoint.dcp import _torch


def planned_state(plan: SavePlan, planner: SavePlanner, *, whole: bool) -> dict[str, Any]:
    """What the plan has this rank write, under the names that the plan gives it. `whole`: all that the (default)
    planner was given, because the engine decides who writes what.

    Values are the objects themselves where the planner only pickles them; what is no pickled plain value is kept as the
    bytes that the planner gave.
    """
    mappings = getattr(planner, "mappings", {})
    if whole:
        assert isinstance(planner, DefaultSavePlanner)
        return _torch.nested(planner.state_dict, mappings, _hole)
    plain = _torch.gives_objects_by_default(planner)
    chunks: dict[str, list[tuple[torch.Tensor, tuple[int, ...]]]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    flat: dict[str, Any] = {}
    for item in plan.items:
        name = item.index.fqn
        if item.type == WriteItemType.BYTE_IO:
            if plain:
                flat[name] = planner.lookup_object(item.index)  # type: ignore[attr-defined]
            else:
                flat[name] = _unpacked(planner.resolve_data(item))
            continue
        tensor = planner.resolve_data(item)
        about = item.tensor_data
        if not isinstance(tensor, torch.Tensor) or about is None:
            raise TypeError(f"the planner gave {type(tensor).__name__} for the tensor {name}")
        shapes[name] = tuple(about.size)
        chunks.setdefault(name, []).append((tensor.detach(), tuple(about.chunk.offsets)))
    for name, pieces in chunks.items():
        flat[name] = Chunks(shapes[name], pieces)
    return _torch.nested(flat, mappings, _hole)


def with_plain_bits(value: Any) -> Any:
    """The state with the values of lazily conjugated or negated tensors; containers that have none stay themselves."""
    if isinstance(value, torch.Tensor):
        return value.detach().resolve_conj().resolve_neg() if value.is_conj() or value.is_neg() else value
    kind = kind_of(value)
    if kind == DICT:
        made = {key: with_plain_bits(child) for key, child in value.items()}
        return made if any(made[key] is not child for key, child in value.items()) else value
    if kind in (LIST, TUPLE):
        items = [with_plain_bits(child) for child in value]
        if all(a is b for a, b in zip(items, value, strict=True)):
            return value
        return items if kind == LIST else value._make(items) if hasattr(value, "_make") else tuple(items)
    if kind == DATACLASS:
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        plain = {name: with_plain_bits(child) for name, child in fields.items()}
        if all(plain[name] is child for name, child in fields.items()):
            return value
        same = copy.copy(value)
        for name, child in plain.items():
            object.__setattr__(same, name, child)
        return same
    return value


def _hole() -> Chunks:
    """An element of a list that another rank writes: a leaf without any part here."""
    return Chunks((0,), [])


def _unpacked(data: torch.Tensor | io.BytesIO) -> Any:
    """What a planner gave for a value: most wrap what torch's own gives, the value pickled with `torch.save`."""
    if isinstance(data, torch.Tensor):
        return data
    stream = io.BytesIO(data.getvalue())
    try:
        return torch.load(stream, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError):
        stream.seek(0)
        return stream
