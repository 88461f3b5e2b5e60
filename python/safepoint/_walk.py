"""The walk of every save and restore: structure, names, layout and addresses of a state, in C++ (bindings/walk*.cc) or
in Python.

Both ways have one meaning, that of `_state.flatten` and of the attributes of a tensor. Python is taken when the
environment variable SAFEPOINT_WALK is "python"; tensors that torch's DLPack table does not tell, and all of them where
torch has no such table, are read by their attributes in either case.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from safepoint import _core, _state
from safepoint._state import DICT, Flat, Leaf, Names, Token

Addresses = npt.NDArray[np.uint64]

# Tests set it; no other code does.
native = os.environ.get("SAFEPOINT_WALK", "") != "python"


def walk(state: Any, expected: list[Token] | None = None) -> Flat:
    """Walks the state; calls `state_dict()` of the Stateful objects in it. `expected`: tokens of an earlier walk.

    `flat.tokens is expected` afterwards means that the state has this very structure. InvalidArgument, NotPlain: as
    `_state.flatten`; what the state's own methods raise is raised.
    """
    global _rules
    if _state.know_dtensors():
        _rules = _make_rules()
    if native:
        flat = Flat()
        same = _rules.walk(flat, _state.root_kind(state), state, expected)
    else:
        flat = _state.flatten(state)
        same = expected is not None and _same_tokens(expected, flat.tokens)
    if same and expected is not None:
        flat.tokens = expected
    return flat


def describe(tokens: list[Token]) -> Names:
    """Names and paths of what a walk met. NotPlain: a key of a dict is no plain value."""
    if not native:
        return _state.describe(tokens)
    names = Names([], [], [], [], [], [], [])
    _core.describe(tokens, names, Leaf, _state.path_element, _state.name_leaf)
    return names


@contextlib.contextmanager
def paused_collector() -> Iterator[None]:
    """No cyclic garbage collection: thousands of new objects would make it walk all of torch's several times."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _same_tokens(a: list[Token], b: list[Token]) -> bool:
    return a == b and all(_same_key(x[1], y[1]) for x, y in zip(a, b, strict=True) if x[0] == DICT and x[1] is not y[1])


def _same_key(a: Any, b: Any) -> bool:
    """Equal keys of equal types: 1, True and 1.0 are one key of a dict and three names."""
    if type(a) is not type(b) or (type(a) is tuple and len(a) != len(b)):
        return False
    return all(map(_same_key, a, b)) if type(a) is tuple else bool(a == b)


class Tensors(Protocol):
    """Layout and addresses of a list of tensors, as of when it was made. Columns have one item per tensor."""

    @property
    def shapes(self) -> list[tuple[int, ...]]: ...
    @property
    def dtypes(self) -> list[torch.dtype]: ...
    @property
    def devices(self) -> list[torch.device]: ...
    @property
    def contiguous(self) -> npt.NDArray[np.bool_]: ...
    @property
    def negative(self) -> npt.NDArray[np.bool_]: ...
    @property
    def conjugate(self) -> npt.NDArray[np.bool_]: ...
    @property
    def plain(self) -> npt.NDArray[np.bool_]:
        """Known to be dense tensors whose `data_ptr` is where their values are."""
        ...

    @property
    def nbytes(self) -> npt.NDArray[np.uint64]: ...
    @property
    def addresses(self) -> Addresses: ...

    def match(self, tensors: list[torch.Tensor]) -> Addresses | None:
        """The addresses of other tensors with this layout; None: their layout differs."""
        ...


def _describe(
    tensor: torch.Tensor,
) -> tuple[int, torch.dtype, torch.device, tuple[int, ...], bool, bool, bool]:
    return (
        tensor.data_ptr(),
        tensor.dtype,
        tensor.device,
        tuple(tensor.shape),
        tensor.is_contiguous(),
        tensor.is_neg(),
        tensor.is_conj(),
    )


class _NativeTensors:
    """Most users look at two or three of the columns: each is made when it is asked for."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self._table = _core.TensorTable(_reader, tensors)

    @functools.cached_property
    def shapes(self) -> list[tuple[int, ...]]:
        return self._table.shapes

    @functools.cached_property
    def dtypes(self) -> list[torch.dtype]:
        return self._table.dtypes

    @functools.cached_property
    def devices(self) -> list[torch.device]:
        return self._table.devices

    @functools.cached_property
    def contiguous(self) -> npt.NDArray[np.bool_]:
        return np.frombuffer(self._table.contiguous, dtype=np.bool_)

    @functools.cached_property
    def negative(self) -> npt.NDArray[np.bool_]:
        return np.frombuffer(self._table.negative, dtype=np.bool_)

    @functools.cached_property
    def conjugate(self) -> npt.NDArray[np.bool_]:
        return np.frombuffer(self._table.conjugate, dtype=np.bool_)

    @functools.cached_property
    def plain(self) -> npt.NDArray[np.bool_]:
        return np.frombuffer(self._table.plain, dtype=np.bool_)

    @functools.cached_property
    def nbytes(self) -> npt.NDArray[np.uint64]:
        return np.frombuffer(self._table.nbytes, dtype=np.uint64)

    @functools.cached_property
    def addresses(self) -> Addresses:
        return np.frombuffer(self._table.addresses, dtype=np.uint64)

    def match(self, tensors: list[torch.Tensor]) -> Addresses | None:
        addresses = self._table.match(tensors)
        return None if addresses is None else np.frombuffer(addresses, dtype=np.uint64)


class _PythonTensors:
    def __init__(self, tensors: list[torch.Tensor]) -> None:
        rows = [_describe(tensor) for tensor in tensors]
        self._layouts = [row[1:] for row in rows]
        self.dtypes = [row[1] for row in rows]
        self.devices = [row[2] for row in rows]
        self.shapes = [row[3] for row in rows]
        self.contiguous, self.negative, self.conjugate = (
            np.array([row[column] for row in rows], dtype=np.bool_) for column in (4, 5, 6)
        )
        self.plain = np.zeros(len(rows), dtype=np.bool_)
        self.nbytes = np.array([tensor.nbytes for tensor in tensors], dtype=np.uint64)
        self.addresses = np.array([row[0] for row in rows], dtype=np.uint64)

    def match(self, tensors: list[torch.Tensor]) -> Addresses | None:
        rows = [_describe(tensor) for tensor in tensors]
        if [row[1:] for row in rows] != self._layouts:
            return None
        return np.array([row[0] for row in rows], dtype=np.uint64)


def read_tensors(tensors: list[torch.Tensor]) -> Tensors:
    """RuntimeError, NotImplementedError, ValueError: one has no such attributes."""
    return _NativeTensors(tensors) if native else _PythonTensors(tensors)


def _table() -> object | None:
    return getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)


def _make_reader(table: object | None, classes: Sequence[type[torch.Tensor]]) -> _core.TensorReader:
    return _core.TensorReader(
        table=table,
        classes=classes,
        is_negative=torch.Tensor.is_neg,
        is_conjugate=torch.Tensor.is_conj,
        describe=_describe,
    )


_reader = _make_reader(_table(), (torch.Tensor, torch.nn.Parameter))


def _make_rules() -> _core.WalkRules:
    return _core.WalkRules(
        kinds=_state.KINDS,
        kind_of=_state.kind_of,
        open_container=_state.open_container,
        open_leaf=_state.open_leaf,
        add_leaf=_state.add_leaf,
        stored_value=_state.stored_value,
        too_deep=_state.refuse_depth,
        depth_max=_state.DEPTH_MAX,
        long_min=_state.LONG_MIN,
    )


_rules = _make_rules()
