"""Starting the copy of one save: makes the values that have no bytes of their own, protects what may change before the
copy ends.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import chain
from operator import methodcaller
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from safepoint import _torch
from safepoint._plan import SavePlan, Table, array_address
from safepoint._state import Flat
from safepoint._walk import Addresses, read_tensors

if TYPE_CHECKING:
    from safepoint._core import Lease, Transfer
    from safepoint._cuda import DeviceTransfer


class Guard:
    """What may be copied in the background, because only `step()` of these optimizers changes it, and that waits."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._optimizers = optimizers

    def covers(self, addresses: Addresses, sizes: Table) -> npt.NDArray[np.bool_]:
        """Which ranges (address, bytes) lie in the optimizers' tensors, as of now: states are made lazily.

        A longer range than that of a tensor at its address is not covered.
        """
        known = read_tensors(self._tensors())
        order = np.lexsort((known.nbytes, known.addresses))  # Of several at one address, the longest comes last.
        starts, ends = known.addresses[order], known.nbytes[order]
        if not len(starts):
            return np.zeros(len(addresses), dtype=np.bool_)
        last = np.searchsorted(starts, addresses, side="right").astype(np.intp) - 1
        covered: npt.NDArray[np.bool_] = (starts[last] == addresses) & (ends[last] >= sizes)
        return covered

    def _tensors(self) -> list[torch.Tensor]:
        """Without a call per tensor, where all are plain: every guarded save asks for them while the trainer waits."""
        found: list[Any] = []
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                found += group["params"]
            found += chain.from_iterable(map(methodcaller("values"), optimizer.state.values()))
        if set(map(type, found)) <= _PLAIN:
            return found
        return [_local(value) for value in found if isinstance(value, torch.Tensor)]


_PLAIN = {torch.Tensor, torch.nn.Parameter}


def _local(tensor: torch.Tensor) -> torch.Tensor:
    if type(tensor) in _PLAIN or not _torch.is_dtensor(tensor):
        return tensor
    return _torch.local_tensor(tensor)


def start_copy(
    lease: Lease, plan: SavePlan, flat: Flat, addresses: Addresses, header: bytes, guard: Guard | None, hold: bool
) -> tuple[Transfer | DeviceTransfer, list[Any]]:
    """Starts the copy; also returns what must stay alive until it ends. `addresses`: of `flat.tensors`.
    `hold`: it is sealed only when the transfer is released.

    With a guard, everything that it does not cover is copied before this returns.
    """
    keep: list[Any] = [flat]
    count = len(flat.tensors)
    sources = np.zeros(count + len(flat.arrays), dtype=np.uint64)
    sources[:count] = addresses
    for number in plan.copied:
        _replace(
            _torch.copyable(flat.tensors[number].detach().resolve_conj().resolve_neg()).clone(
                memory_format=torch.contiguous_format
            ),
            number,
            sources,
            keep,
        )
    exposed: frozenset[int] = frozenset()  # Tensors that may change before the copy ends.
    if guard is not None:
        rows = np.flatnonzero(plan.order < count)
        numbers = plan.order[rows]
        exposed = frozenset(numbers[~guard.covers(addresses[numbers], plan.sizes[rows])].tolist())
        for number in sorted(exposed.difference(plan.copied, plan.device)):
            _replace(_torch.copyable(flat.tensors[number].detach()).clone(), number, sources, keep)
    for number, array in enumerate(flat.arrays, count):
        address, owner = array_address(array)
        if guard is not None:
            owner = owner.copy()
            address = owner.ctypes.data
        keep.append(owner)
        sources[number] = address
    segments = plan.segments(sources)
    if not plan.device:
        return lease.start(header, segments.data, static_offset=plan.room, structure=plan.structure, hold=hold), keep
    from safepoint._cuda import DeviceTransfer

    on_device = np.isin(plan.order, np.array(plan.device, dtype=np.intp))
    jobs = list(_device_jobs(plan, flat, exposed, keep))
    return DeviceTransfer(lease, plan, header, segments[~on_device], jobs, hold), keep


def _replace(copy: torch.Tensor, number: int, sources: Addresses, keep: list[Any]) -> None:
    keep.append(copy)
    sources[number] = copy.data_ptr()


def _device_jobs(
    plan: SavePlan, flat: Flat, exposed: Collection[int], keep: list[Any]
) -> Iterator[tuple[torch.Tensor, int, int]]:
    """(tensor, shard offset, bytes)"""
    place = {number: row for row, number in enumerate(plan.order.tolist())}
    for number in plan.device:
        tensor = _torch.copyable(flat.tensors[number].detach())
        if number in exposed:
            tensor = tensor.clone()  # On its own device, in stream order: the values as of now.
            keep.append(tensor)
        row = place[number]
        yield tensor, int(plan.offsets[row]) + plan.header_bytes, int(plan.sizes[row])
