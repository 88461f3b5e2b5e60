"""A second implementation of the socket protocol (docs/formats/socket.md), as small as a hostile client needs it."""

from __future__ import annotations

import array
import os
import socket
import struct
from dataclasses import dataclass

MAGIC = 0x31465053
HEADER = struct.Struct("<IHHQHHI")
TYPES = {
    name: number
    for number, name in enumerate(
        [
            "hello",
            "open_generation",
            "prepare_slots",
            "reserve",
            "fetch_extents",
            "seal",
            "abort",
            "renew",
            "wait",
            "latest",
            "list_steps",
            "list_namespaces",
            "open_read",
            "shard_info",
            "unpin",
            "pin_step",
            "report_corrupt",
            "status",
            "bye",
        ],
        start=1,
    )
}
(
    OK,
    INVALID,
    NOT_FOUND,
    UNAVAILABLE,
    INCOMPLETE,
    CORRUPT,
    FENCED,
    NO_SPACE,
    DENIED,
    LOST,
    DEADLINE,
    LIMIT,
    PROTOCOL,
    CLOSED,
) = range(14)


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<I", len(raw)) + raw


def frame(kind: str | int, body: bytes = b"", request_id: int = 1, version: int = 1, status: int = 0) -> bytes:
    number = TYPES[kind] if isinstance(kind, str) else kind
    return HEADER.pack(MAGIC, version, number, request_id, status, 0, len(body)) + body


@dataclass
class Reply:
    type: int
    request_id: int
    status: int
    body: bytes
    fds: list[int]

    def text(self) -> str:
        return self.body.decode()

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)


@dataclass
class Lease:
    lease: int
    slot: int
    extents: int
    attempt: bytes


class Peer:
    """One connection. ``hello=False`` leaves the handshake to the test."""

    def __init__(self, path: str, *, hello: bool = True, session: bytes | None = None, timeout: float = 20.0) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(timeout)
        self.socket.connect(path)
        self.session = session or os.urandom(16)
        self.next_id = 1
        if hello:
            reply = self.hello()
            assert reply.status == OK, reply

    def hello(self, low: int = 1, high: int = 1) -> Reply:
        return self.call("hello", struct.pack("<HH", low, high) + self.session + text("raw"))

    def send(self, data: bytes, fds: list[int] | None = None) -> None:
        extra = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.socket.sendmsg([data], extra)

    def receive(self) -> Reply | None:
        """None: the daemon closed the connection."""
        try:
            data, ancillary, _, _ = self.socket.recvmsg(1 << 17, socket.CMSG_SPACE(4 * 256))
        except ConnectionResetError:
            return None
        if not data:
            return None
        fds = array.array("i")
        for level, kind, raw in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(raw[: len(raw) - len(raw) % 4])
        magic, _, number, request_id, status, _, length = HEADER.unpack_from(data)
        assert magic == MAGIC and length == len(data) - HEADER.size
        return Reply(number, request_id, status, data[HEADER.size :], list(fds))

    def call(self, kind: str, body: bytes = b"") -> Reply:
        self.next_id += 1
        self.send(frame(kind, body, self.next_id))
        reply = self.receive()
        assert reply is not None and reply.request_id == self.next_id, reply
        return reply

    def close(self) -> None:
        self.socket.close()

    # --- the requests that hostile tests need in their legal form
    def open_generation(self, ns: str, nonce: bytes, world_size: int = 1, rank: int = 0) -> int:
        reply = self.call("open_generation", text(ns) + nonce + struct.pack("<IIB", world_size, rank, 0) + bytes(16))
        assert reply.status == OK, reply
        generation: int = struct.unpack_from("<Q", reply.body)[0]
        return generation

    def reserve(
        self,
        ns: str,
        generation: int,
        nonce: bytes,
        step: int,
        length: int,
        world_size: int = 1,
        rank: int = 0,
        try_number: int = 0,
    ) -> Lease | Reply:
        body = (
            text(ns)
            + struct.pack("<Q", generation)
            + nonce
            + struct.pack("<QIIIQQ", step, try_number, world_size, rank, length, 5_000_000_000)
        )
        reply = self.call("reserve", body)
        if reply.status != OK:
            return reply
        lease, slot, extents = struct.unpack_from("<QQI", reply.body)
        return Lease(lease, slot, extents, reply.body[20:36])

    def fetch_writable(self, slot: int, first: int = 0) -> Reply:
        return self.call("fetch_extents", struct.pack("<BQQII", 0, slot, 0, 0, first))
