"""A stand-in for `safepoint._core`: the same contract in one process, without daemon, extension or checksums.

Only for tests of what the Python side decides. `FakeDaemon` is the node; several clients may share one. Its knobs:
`hold` stops copies until it is set, `fail_copy` and `fail_seal` make transfers fail, `corrupt` names (rank, block) that
reads refuse; with `store` (a URL) it has a durable tier, which every step reaches as soon as it is complete and was
asked for.
"""

from __future__ import annotations

import ctypes
import hashlib
import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from safepoint import errors

BLOCK = 1 << 20


@dataclass
class AttemptInfo:
    attempt: bytes
    nonce: bytes
    generation: int
    step: int
    try_number: int
    world_size: int
    sealed_ranks: int = 0
    bytes: int = 0
    state: str = "open"
    level: str = "none"
    pinned: bool = False
    reason: str = ""


@dataclass
class Generation:
    generation: int
    parent: bytes | None
    parent_step: int | None
    nonce: bytes
    world_size: int
    fresh: bool


@dataclass
class DaemonInfo:
    retain: int = 2
    pid: int = 1
    private: bool = True
    store: str = ""


@dataclass
class Namespace:
    generations: list[Generation] = field(default_factory=list)
    attempts: dict[bytes, AttemptInfo] = field(default_factory=dict)
    shards: dict[tuple[bytes, int], bytes] = field(default_factory=dict)
    structures: dict[tuple[bytes, int], tuple[int, bytes]] = field(default_factory=dict)
    agreed: dict[tuple[bytes, int], bytes] = field(default_factory=dict)
    was_complete: bool = False


class FakeDaemon:
    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.spaces: dict[str, Namespace] = {}
        self.hold: threading.Event | None = None
        self.fail_copy: errors.SafepointError | None = None
        self.fail_seal: errors.SafepointError | None = None
        self.pool_bytes = 1 << 34
        self.corrupt: set[tuple[int, int]] = set()
        self.reported: list[tuple[int, int]] = []
        self.prepared: list[tuple[int, int]] = []
        self.aborted: list[str] = []
        self.reads: list[tuple[int, int]] = []  # (rank, number of segments)
        self.requests = 0
        self.fail_reserve: list[errors.SafepointError] = []
        self.store = ""
        self.wanted: list[bytes] = []  # Attempts that are to be durable, each time one was asked for.

    def space(self, ns: str) -> Namespace:
        return self.spaces.setdefault(ns, Namespace())

    def complete(self, ns: str) -> list[AttemptInfo]:
        found = [a for a in self.space(ns).attempts.values() if a.state == "complete"]
        return sorted(found, key=lambda a: (a.generation, a.step, a.try_number), reverse=True)


class SealResult:
    def __init__(self, record: bytes, complete: bool) -> None:
        self.record, self.complete = record, complete


class Transfer:
    def __init__(
        self, lease: Lease, header: bytes, segments: np.ndarray[Any, Any], static_offset: int, structure: bytes
    ) -> None:
        self._lease = lease
        self._args = (header, segments, static_offset, structure)
        self._copied, self._sealed = threading.Event(), threading.Event()
        self._error: errors.SafepointError | None = None
        self.copy_seconds = 0.0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        lease, daemon = self._lease, self._lease.daemon
        header, segments, static_offset, structure = self._args
        if daemon.hold is not None:
            daemon.hold.wait()
        if daemon.fail_copy is not None:
            self._error = daemon.fail_copy
            self._copied.set()
            self._sealed.set()
            return
        memory = lease.memory
        ctypes.memmove(lease.address, header, len(header))
        for source, offset, size in segments.tolist():
            ctypes.memmove(lease.address + offset, source, size)
        self.copy_seconds = 1e-6
        self._copied.set()
        if daemon.fail_seal is not None:
            self._error = daemon.fail_seal
            self._sealed.set()
            return
        with daemon.changed:
            space = daemon.space(lease.ns)
            space.shards[(lease.attempt, lease.rank)] = memory.raw[: lease.length]
            space.structures[(lease.attempt, lease.rank)] = (static_offset, structure)
            info = space.attempts[lease.attempt]
            info.sealed_ranks += 1
            info.bytes += lease.length
            if info.sealed_ranks == info.world_size:
                info.state, info.level = "complete", "memory"
                space.was_complete = True
            daemon.changed.notify_all()
        self._sealed.set()

    def wait_copied(self, timeout: float | None) -> None:
        if not self._copied.wait(timeout):
            raise errors.DeadlineExceeded("still copying")
        if self._lease.daemon.fail_copy is not None and self._error is not None:
            raise self._error

    def wait_sealed(self, timeout: float | None) -> SealResult:
        if not self._sealed.wait(timeout):
            raise errors.DeadlineExceeded("still running")
        if self._error is not None:
            raise self._error
        return SealResult(b"r" * 32, True)

    @property
    def copied(self) -> bool:
        return self._copied.is_set()

    @property
    def sealed(self) -> bool:
        return self._sealed.is_set() and self._error is None


class Lease:
    def __init__(self, daemon: FakeDaemon, ns: str, rank: int, attempt: bytes, length: int) -> None:
        self.daemon, self.ns, self.rank, self.attempt, self.length = daemon, ns, rank, attempt, length
        self.memory = ctypes.create_string_buffer(b"\xee" * length, length)
        self.address = ctypes.addressof(self.memory)
        self.capacity, self.slot = length, 0

    def start(
        self,
        header: bytes,
        segments: Any,
        *,
        static_offset: int,
        structure: bytes,
        threads: int = 0,
        hold: bool = False,
    ) -> Transfer:
        assert not hold, "held saves are tested with the real extension"
        table = np.array(np.frombuffer(segments, dtype=np.uint64).reshape(-1, 3))
        end = len(header)
        for _, offset, size in table.tolist():
            assert offset == end and size > 0, "header and segments must tile the shard"
            end += size
        assert end == self.length, (end, self.length)
        assert hashlib.sha256(header[static_offset:]).digest() == structure
        return Transfer(self, header, table, static_offset, structure)

    def abort(self, reason: str) -> None:
        self.daemon.aborted.append(reason)


class ShardReader:
    def __init__(self, pin: ReadPin, rank: int) -> None:
        self._daemon = pin.daemon
        self.rank = rank
        self.from_store = False
        self._data = pin.daemon.space(pin.ns).shards[(pin.info.attempt, rank)]
        self.static_offset, self.structure = pin.daemon.space(pin.ns).structures[(pin.info.attempt, rank)]
        self.length = len(self._data)
        self.header_bytes = 8 + int.from_bytes(self._data[:8], "little")
        self.blocks = -(-self.length // BLOCK)

    def _check(self, offset: int, size: int, modified: bool) -> None:
        for block in range(offset // BLOCK, (offset + size - 1) // BLOCK + 1):
            if (self.rank, block) in self._daemon.corrupt:
                error = errors.Corrupt(f"shard of rank {self.rank}, block {block}")
                error.rank, error.block, error.state_modified = self.rank, block, modified
                raise error

    def header(self) -> bytes:
        self._check(0, self.header_bytes, False)
        return self._data[: self.header_bytes]

    def read(self, segments: Any, *, threads: int = 0) -> int:
        table = np.frombuffer(segments, dtype=np.uint64).reshape(-1, 3).tolist()
        self._daemon.reads.append((self.rank, len(table)))
        for offset, size, target in table:
            self._check(offset, size, True)
            ctypes.memmove(target, self._data[offset : offset + size], size)
        return sum(size for _, size, _ in table)

    def read_bytes(self, offset: int, size: int) -> bytes:
        self._check(offset, size, False)
        return self._data[offset : offset + size]

    def verify(self, first_block: int, count: int) -> list[int]:
        return [b for b in range(first_block, first_block + count) if (self.rank, b) in self._daemon.corrupt]


class ReadPin:
    def __init__(self, daemon: FakeDaemon, ns: str, info: AttemptInfo) -> None:
        self.daemon, self.ns, self.info = daemon, ns, info

    def shard(self, rank: int) -> ShardReader:
        return ShardReader(self, rank)

    def report_corrupt(self, rank: int, block: int) -> bool:
        self.daemon.reported.append((rank, block))
        return True

    def close(self) -> None:
        pass

    def __enter__(self) -> ReadPin:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()


class Client:
    def __init__(self, daemon: FakeDaemon) -> None:
        self._daemon = daemon
        self.daemon = DaemonInfo(store=daemon.store)
        self.socket_path = "/fake"
        self.started_daemon = False
        self.closed = False

    def open_generation(
        self,
        ns: str,
        nonce: bytes,
        world_size: int,
        rank: int,
        *,
        parent: bytes | None = None,
        fresh: bool = False,
        deadline: float,
    ) -> Generation:
        with self._daemon.changed:
            space = self._daemon.space(ns)
            for g in space.generations:
                if g.nonce == nonce:
                    if g is not space.generations[-1]:
                        raise errors.Fenced("a later launch")
                    assert g.world_size == world_size
                    return g
            if parent is None and not fresh and (done := self._daemon.complete(ns)):
                parent = done[0].attempt
            step = space.attempts[parent].step if parent is not None else None
            space.generations.append(Generation(len(space.generations) + 1, parent, step, nonce, world_size, fresh))
            return space.generations[-1]

    def prepare_slots(self, ns: str, length: int, count: int, *, deadline: float) -> int:
        self._daemon.prepared.append((length, count))
        return count

    def reserve(
        self,
        ns: str,
        generation: int,
        nonce: bytes,
        step: int,
        try_number: int,
        world_size: int,
        rank: int,
        length: int,
        *,
        deadline: float,
    ) -> Lease:
        self._daemon.requests += 1
        if self._daemon.fail_reserve:
            raise self._daemon.fail_reserve.pop()
        if length > self._daemon.pool_bytes:
            raise errors.NoSpace(f"{length} bytes do not fit into {self._daemon.pool_bytes}")
        with self._daemon.changed:
            space = self._daemon.space(ns)
            current = space.generations[-1]
            if (current.generation, current.nonce) != (generation, nonce):
                raise errors.Fenced("a later launch")
            key = f"{ns}/{generation}/{step}/{try_number}".encode()
            attempt = hashlib.sha256(key).digest()[:16]
            if (attempt, rank) in space.shards:
                raise errors.Closed("sealed already")
            space.attempts.setdefault(attempt, AttemptInfo(attempt, nonce, generation, step, try_number, world_size))
            return Lease(self._daemon, ns, rank, attempt, length)

    def make_durable(self, ns: str, attempt: bytes) -> None:
        self._daemon.requests += 1
        assert self._daemon.store, "the engine looks first whether there is a durable tier"
        assert self._daemon.space(ns).attempts[attempt].state == "open", (
            "asked before the seal, so that nothing is missed"
        )
        self._daemon.wanted.append(attempt)

    def wait(self, ns: str, attempt: bytes, level: str, *, timeout: float | None) -> str:
        if level == "replicated" or (level == "durable" and not self._daemon.store):
            raise errors.Unavailable(f"this node has no tier for level {level}")
        if level == "durable" and attempt not in self._daemon.wanted:
            raise errors.InvalidArgument("nobody asked for durable=True")
        with self._daemon.changed:
            info = self._daemon.space(ns).attempts[attempt]
            if not self._daemon.changed.wait_for(lambda: info.state == "complete", timeout):
                raise errors.DeadlineExceeded("not complete")
            if attempt in self._daemon.wanted:
                info.level = "durable"
            return info.level

    def latest(self, ns: str, level: str = "memory") -> AttemptInfo:
        found = self._daemon.complete(ns)
        if found:
            return found[0]
        raise (errors.Lost if self._daemon.space(ns).was_complete else errors.NotFound)(f"namespace {ns}")

    def list_steps(self, ns: str) -> list[AttemptInfo]:
        return sorted(self._daemon.space(ns).attempts.values(), key=lambda a: -a.step)

    def open_read(
        self,
        ns: str,
        *,
        step: int | None = None,
        attempt: bytes | None = None,
        nonce: bytes | None = None,
        sequence: int = 0,
    ) -> ReadPin:
        with self._daemon.changed:
            space = self._daemon.space(ns)
            group = (nonce or b"", sequence)
            if nonce is not None and group in space.agreed:
                return ReadPin(self._daemon, ns, space.attempts[space.agreed[group]])
            if step is not None:
                found = [a for a in self._daemon.complete(ns) if a.step == step]
                if not found:
                    raise errors.NotFound(f"step {step}")
                info = found[0]
            else:
                info = self.latest(ns)
            space.agreed[group] = info.attempt
            return ReadPin(self._daemon, ns, info)

    def close(self, *, timeout: float | None = None) -> None:
        self.closed = True
