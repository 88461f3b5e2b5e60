"""Tensors on a GPU: copied into the lease by a side stream, while the trainer's own stream goes on.

A slot is registered as pinned memory once per mapping, else copies from the device would be staged through a hidden
buffer and block. The checksum pass and the seal follow the copy's event, in a thread of their own. Nothing here ever
synchronises the whole device.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import threading
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from safepoint._plan import SavePlan, Table
from safepoint.errors import DeadlineExceeded, SafepointError

if TYPE_CHECKING:
    from safepoint._core import Lease, SealResult, Transfer

_log = logging.getLogger("safepoint")
_lock = threading.Lock()
_registered: dict[int, tuple[int, int]] = {}  # Number of a slot's mapping -> address and bytes.
_streams: dict[torch.device, torch.cuda.Stream] = {}
_warned = False


def _untyped_cuda() -> Any:
    """torch.cuda, of which some functions have no types."""
    return torch.cuda


def register_slot(mapping: int, address: int, capacity: int) -> None:
    """Pins a slot for device copies, once per mapping.

    Where the system refuses (limit on locked memory), copies work but block; told once.
    """
    global _warned
    with _lock:
        if mapping in _registered:
            return
        runtime: Any = _untyped_cuda().cudart()
        # What lay here before is not mapped any more, and to CUDA these addresses still mean its memory.
        for old, (begin, size) in list(_registered.items()):
            if begin < address + capacity and address < begin + size:
                del _registered[old]
                runtime.cudaHostUnregister(begin)
        status = int(runtime.cudaHostRegister(address, capacity, 0))
        if status == 0:
            _registered[mapping] = address, capacity
        elif not _warned:
            _warned = True
            _log.warning(
                "the slot cannot be registered as pinned memory (CUDA error %d): device copies will block", status
            )


def unregister_slots(mappings: Iterable[int]) -> None:
    """Lets go of mappings that are about to end, or have ended: CUDA would take a later one at the same address for
    them.
    """
    with _lock:
        for mapping in mappings:
            known = _registered.pop(mapping, None)
            if known is not None:
                runtime: Any = _untyped_cuda().cudart()
                runtime.cudaHostUnregister(known[0])


def slot_view(address: int, length: int) -> torch.Tensor:
    """The mapped bytes as a tensor. The caller sees to it that the mapping outlives it."""
    return torch.frombuffer((ctypes.c_uint8 * length).from_address(address), dtype=torch.uint8)


def start_device_copies(base: torch.Tensor, jobs: Sequence[tuple[torch.Tensor, int, int]]) -> list[torch.cuda.Event]:
    """Queues (tensor, offset, bytes) into `base` behind what the trainer's streams have queued so far; one event per
    device. After an error nothing that was queued is under way any more.
    """
    events: list[torch.cuda.Event] = []
    try:
        _queue_copies(base, jobs, events)
    except BaseException:
        for stream in _streams.values():
            stream.synchronize()
        raise
    return events


def _queue_copies(
    base: torch.Tensor, jobs: Sequence[tuple[torch.Tensor, int, int]], events: list[torch.cuda.Event]
) -> None:
    by_device: dict[torch.device, list[tuple[torch.Tensor, int, int]]] = {}
    for job in jobs:
        by_device.setdefault(job[0].device, []).append(job)
    for device, queued in by_device.items():
        stream = _streams.get(device)
        if stream is None:
            stream = _streams[device] = _untyped_cuda().Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream), torch.no_grad():
            for tensor, offset, size in queued:
                base[offset : offset + size].view(tensor.dtype).view(tensor.shape).copy_(tensor, non_blocking=True)
            event = _untyped_cuda().Event()
            event.record(stream)
        events.append(event)


class DeviceTransfer:
    """A transfer whose bytes come from a device; same waiting methods as `_core.Transfer`.

    Keeps the tensors until they are copied.
    """

    def __init__(
        self,
        lease: Lease,
        plan: SavePlan,
        header: bytes,
        segments: Table,
        jobs: Sequence[tuple[torch.Tensor, int, int]],
        hold: bool,
    ) -> None:
        register_slot(lease.mapping, lease.address, lease.capacity)
        self._lease = lease
        self._jobs = list(jobs)
        self._base = slot_view(lease.address, lease.length)
        self._inner: Transfer | None = None
        self._error: SafepointError | None = None
        self._started = threading.Event()
        self._events = start_device_copies(self._base, self._jobs)
        # Not a daemon thread: the interpreter must not end under a call into the extension.
        self._thread = threading.Thread(
            target=self._finish, args=(lease, plan, header, segments, hold), name="safepoint-device-copy"
        )
        try:
            self._thread.start()
        except BaseException:
            self._wait_for_devices()
            raise

    def _wait_for_devices(self) -> None:
        """Returns, or raises the first error, when no device writes into the slot any more."""
        failures = []
        for event in self._events:
            try:
                event.synchronize()
            except Exception as error:
                failures.append(error)
        if failures:
            raise failures[0]

    def _finish(self, lease: Lease, plan: SavePlan, header: bytes, segments: Table, hold: bool) -> None:
        try:
            self._wait_for_devices()
            self._inner = lease.start_in_place(
                header, segments.data, static_offset=plan.room, structure=plan.structure, hold=hold
            )
        except Exception as error:
            # Raised where somebody waits; as one of ours, because those who wait must be able to go on training.
            failure = SafepointError(f"the copy from the device failed: {error}")
            self._error = error if isinstance(error, SafepointError) else failure
            with contextlib.suppress(SafepointError):  # The first error is the one to tell.
                lease.abort(str(failure))
        finally:
            self._jobs = []
            self._started.set()

    def _transfer(self, timeout: float | None) -> Transfer:
        if not self._started.wait(timeout):
            raise DeadlineExceeded("the copy from the device has not ended yet")
        if self._error is not None:
            raise self._error
        assert self._inner is not None
        return self._inner

    def abort(self, reason: str) -> None:
        """As `Lease.abort`, when no device writes into the slot any more."""
        with contextlib.suppress(Exception):  # The error of a copy is told by the waiting methods.
            self._wait_for_devices()
        self._lease.abort(reason)

    def wait_copied(self, timeout: float | None) -> None:
        self._transfer(timeout).wait_copied(timeout)

    def wait_sealed(self, timeout: float | None) -> SealResult:
        return self._transfer(timeout).wait_sealed(timeout)

    def release(self) -> None:
        self._transfer(None).release()

    @property
    def copied(self) -> bool:
        return self._inner is not None and self._inner.copied

    @property
    def sealed(self) -> bool:
        return self._inner is not None and self._inner.sealed

    @property
    def copy_seconds(self) -> float:
        return self._inner.copy_seconds if self._inner is not None else 0.0
