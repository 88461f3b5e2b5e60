"""A trainer as a child process that does one command after another, so that a scenario decides who acts when.

A launch is two of them, ranks 0 and 1. They use the extension module alone: a fork of a process without torch starts in
a few milliseconds.
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import json
import os
import selectors
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from stamps import DATA_BYTES, HEADER_PART, LENGTH, Stamp, Words

from safepoint import _core
from safepoint.errors import SafepointError

NAMESPACE = "boundaries"
WORLD = 2
CALL_S = 8.0  # Deadline of every call of the client.
REPLY_S = 15.0  # A command that has not answered by then never will.
PR_SET_PDEATHSIG = 1

Reply = dict[str, Any]


class Trainer:
    """The parent's end."""

    def __init__(self, rank: int, nonce: bytes, socket: str, control: Path | None = None) -> None:
        """With a control file its events are recorded, as those of "rank N"."""
        self.rank = rank
        down_read, self._down = os.pipe()
        self._up, up_write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._down)
            os.close(self._up)
            _child(rank, nonce, socket, control, down_read, up_write)
        os.close(down_read)
        os.close(up_write)
        self._buffer = b""
        self.alive = True

    def post(self, command: str, /, **arguments: object) -> None:
        if not self.alive:
            return
        try:
            os.write(self._down, (json.dumps([command, arguments]) + "\n").encode())
        except BrokenPipeError:
            self._reap()

    def reply(self, seconds: float = REPLY_S) -> Reply:
        """{"ok": ..}, {"error": class, "text": ..}, {"dead": true}, or {"stall": true}."""
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._up, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not self.alive:
                    return {"dead": True}
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    return {"stall": True}
                data = os.read(self._up, 1 << 16)
                if not data:
                    self._reap()
                self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: Reply = json.loads(line)
        return answer

    def call(self, command: str, /, **arguments: object) -> Reply:
        self.post(command, **arguments)
        return self.reply()

    def end(self) -> None:
        """SIGKILL, if it lives."""
        if self.alive:
            os.kill(self.pid, signal.SIGKILL)
            self._reap()
        for fd in (self._down, self._up):
            if fd >= 0:
                os.close(fd)
        self._down = self._up = -1

    def _reap(self) -> None:
        if self.alive:
            os.waitpid(self.pid, 0)
        self.alive = False


def _child(rank: int, nonce: bytes, socket: str, control: Path | None, commands: int, replies: int) -> NoReturn:
    try:
        libc = ctypes.CDLL(None)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        mark = _Marks(libc, control, rank)
        worker = _Worker(rank, nonce, socket, mark)
        for line in os.fdopen(commands):
            command, arguments = json.loads(line)
            try:
                answer: Reply = {"ok": getattr(worker, command)(**arguments)}
            except SafepointError as error:
                answer = {"error": type(error).__name__, "text": str(error)[:300]}
            os.write(replies, (json.dumps(answer) + "\n").encode())
    except BaseException as error:
        print(f"rank {rank}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


class _Marks:
    """Boundaries around what no call of the C library shows."""

    def __init__(self, libc: ctypes.CDLL, control: Path | None, rank: int) -> None:
        self._libc = libc if control else None
        if control:
            assert libc.boundary_join(str(control).encode(), f"rank {rank}".encode()) == 0

    def begin(self, label: str) -> None:
        if self._libc:
            self._libc.boundary_begin(label.encode())

    def end(self) -> None:
        if self._libc:
            self._libc.boundary_end()


class _Worker:
    """One method per command."""

    def __init__(self, rank: int, nonce: bytes, socket: str, mark: _Marks) -> None:
        self.rank, self.nonce, self.socket, self.mark = rank, nonce, socket, mark
        self.client: _core.Client
        self.generation = 0
        self.lease: _core.Lease
        self.stamp: Stamp
        self.pin: _core.ReadPin
        self.target: Words = np.zeros((DATA_BYTES // 4096, 512), dtype=np.uint64)

    # --- a save
    def connect(self) -> None:
        self.client = _core.Client(self.socket, client_name="boundaries", deadline=CALL_S)

    def open(self, parent: str | None = None) -> int:
        opened = self.client.open_generation(
            NAMESPACE, self.nonce, WORLD, self.rank, parent=bytes.fromhex(parent) if parent else None, deadline=CALL_S
        )
        self.generation = opened.generation
        return self.generation

    def reserve(self, step: int) -> None:
        self.lease = self.client.reserve(
            NAMESPACE, self.generation, self.nonce, step, 0, WORLD, self.rank, LENGTH, deadline=CALL_S
        )
        self.stamp = Stamp(NAMESPACE, self.generation, step, self.lease.attempt, self.rank)

    def copy(self, half: int, stale: bool = False) -> None:
        """`stale`: what a trainer's bug would do, bytes of another step under this one's name."""
        self.mark.begin(f"copies half {half} of its bytes")
        blocks = (dataclasses.replace(self.stamp, step=self.stamp.step - 1) if stale else self.stamp).blocks()
        part = blocks[: len(blocks) // 2] if half == 1 else blocks[len(blocks) // 2 :]
        offset = 2 * HEADER_PART + (0 if half == 1 else DATA_BYTES // 2)
        ctypes.memmove(self.lease.address + offset, part.ctypes.data, part.nbytes)
        self.mark.end()

    def seal(self) -> bool:
        """Whether the seal made the step complete."""
        header, static = self.stamp.header()
        nothing = np.zeros((0, 3), dtype=np.uint64)
        transfer = self.lease.start_in_place(
            header, nothing, static_offset=HEADER_PART, structure=hashlib.sha256(static).digest()
        )
        return transfer.wait_sealed(CALL_S).complete

    def wait(self, seconds: float | None) -> str:
        return self.client.wait(NAMESPACE, self.stamp.attempt, "memory", timeout=seconds or CALL_S)

    # --- a restore
    def open_read(self, attempt: str | None = None) -> Reply:
        self.pin = self.client.open_read(
            NAMESPACE, attempt=bytes.fromhex(attempt) if attempt else None, nonce=None if attempt else self.nonce
        )
        info = self.pin.info
        return {"step": info.step, "generation": info.generation, "attempt": info.attempt.hex()}

    def header(self, rank: int) -> None:
        self.reader = self.pin.shard(rank)
        self.read_header = self.reader.header()

    def read(self, part: int, parts: int) -> int:
        size = DATA_BYTES // parts
        segment = [2 * HEADER_PART + part * size, size, self.target.ctypes.data + part * size]
        return self.reader.read(np.array([segment], dtype=np.uint64))

    def judge(self, rank: int) -> list[str]:
        """What is wrong with the shard that header() and read() brought."""
        info = self.pin.info
        stamp = Stamp(NAMESPACE, info.generation, info.step, info.attempt, rank)
        return stamp.faults(self.read_header, self.target)

    def verify(self, rank: int) -> list[str]:
        self.target[:] = 0
        self.header(rank)
        self.read(0, 1)
        return self.judge(rank)

    def unpin(self) -> None:
        self.pin.close()

    def listed(self) -> list[Reply]:
        return [
            {"step": i.step, "generation": i.generation, "attempt": i.attempt.hex(), "state": i.state}
            for i in self.client.list_steps(NAMESPACE)
        ]

    def bye(self) -> None:
        self.client.close()
