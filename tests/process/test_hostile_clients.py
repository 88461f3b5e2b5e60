"""I-26, I-38, I-40: a client that dies, hangs, scribbles, truncates, punches or sends garbage harms only its own
shards."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import random
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import wire
from conftest import Daemon, eventually

import safepoint

NS = "hostile"


def healthy(daemon: Daemon, ns: str = "bystander") -> None:
    """A well-behaved client saves and restores as if nothing had happened, and the worker is still the first one."""
    client = daemon.client()
    assert client.daemon.incarnation == 1
    client.close()
    save_and_restore(daemon, ns)


def save_and_restore(daemon: Daemon, ns: str) -> None:
    os.environ["SAFEPOINT_SOCKET"] = daemon.socket
    checkpointer = safepoint.Checkpointer(ns, rank=0, world_size=1)
    try:
        value = torch.arange(100_000, dtype=torch.float32)
        step = 1 + max((i.step for i in checkpointer.steps()), default=0)
        checkpointer.save(step, {"w": value}).wait("memory", timeout=20)
        target = torch.zeros_like(value)
        info = checkpointer.restore({"w": target})
        assert info is not None and info.step == step and torch.equal(target, value)
    finally:
        checkpointer.close()


def own_lease(daemon: Daemon, length: int = 5 << 20) -> tuple[wire.Peer, wire.Lease, list[int], bytes, int]:
    peer = wire.Peer(daemon.socket)
    nonce = os.urandom(16)
    generation = peer.open_generation(NS, nonce)
    lease = peer.reserve(NS, generation, nonce, 1, length)
    assert isinstance(lease, wire.Lease)
    fetched = peer.fetch_writable(lease.slot)
    assert fetched.status == wire.OK and len(fetched.fds) == lease.extents == 2
    return peer, lease, fetched.fds, nonce, generation


def test_garbage_closes_only_its_own_connection(daemon: Daemon) -> None:
    chance = random.Random(7)
    for case in range(300):
        peer = wire.Peer(daemon.socket, hello=bool(case % 2))
        if case % 3 == 0:
            data = chance.randbytes(chance.randrange(1, 3000))
        else:  # A well-formed frame of every type around a garbage body.
            data = wire.frame(
                chance.randrange(0, 25), chance.randbytes(chance.randrange(0, 400)), status=chance.choice((0, 0, 3, 99))
            )
        peer.send(data)
        reply = peer.receive()
        assert (
            reply is None
            or reply.status != wire.OK
            or wire.HEADER.unpack_from(data)[2] in (wire.TYPES["status"], wire.TYPES["bye"])
        )
        peer.close()
    healthy(daemon)


def test_every_truncation_of_a_legal_request_is_refused(daemon: Daemon) -> None:
    body = wire.text(NS) + os.urandom(16) + struct.pack("<IIB", 1, 0, 0) + bytes(16)
    for cut in range(len(body)):
        peer = wire.Peer(daemon.socket)
        peer.send(wire.frame("open_generation", body[:cut]))
        reply = peer.receive()
        assert reply is not None and reply.status == wire.PROTOCOL
        assert peer.receive() is None  # And no second chance.
        peer.close()
    healthy(daemon)


def test_another_protocol_version_is_refused_and_nothing_touched(daemon: Daemon) -> None:
    """I-35."""
    before = daemon.status()["namespaces"]
    peer = wire.Peer(daemon.socket, hello=False)
    reply = peer.hello(low=2, high=9)
    assert reply.status == wire.PROTOCOL and "version 1" in reply.text() and "2 to 9" in reply.text()
    assert peer.receive() is None
    peer = wire.Peer(daemon.socket, hello=False)
    peer.send(wire.frame("hello", b"whatever a later version says", version=7))
    answer = peer.receive()
    assert answer is not None and answer.status == wire.PROTOCOL
    assert daemon.status()["namespaces"] == before


def test_requests_before_hello_are_refused(daemon: Daemon) -> None:
    for kind in wire.TYPES:
        if kind == "hello":
            continue
        peer = wire.Peer(daemon.socket, hello=False)
        peer.send(wire.frame(kind))
        reply = peer.receive()
        assert reply is not None and reply.status == wire.PROTOCOL, kind
        peer.close()


def test_descriptors_from_a_client_are_closed_and_the_client_dropped(daemon: Daemon) -> None:
    """T-8: no descriptor of ours leaks."""
    worker = daemon.worker_pid()
    before = len(os.listdir(f"/proc/{worker}/fd"))
    for _ in range(20):
        peer = wire.Peer(daemon.socket)
        with open("/dev/null") as null:
            peer.send(wire.frame("status"), [null.fileno()] * 100)
        refusal = peer.receive()
        assert refusal is None or (refusal.status == wire.PROTOCOL and peer.receive() is None)
        peer.close()
    eventually(lambda: len(os.listdir(f"/proc/{worker}/fd")) <= before, "descriptors back at the baseline")
    healthy(daemon)


def test_client_that_reads_no_replies_is_dropped_and_others_are_served(daemon: Daemon) -> None:
    """F87."""
    peer = wire.Peer(daemon.socket)
    peer.socket.setblocking(False)
    sent = 0
    with pytest.raises((BrokenPipeError, ConnectionResetError, BlockingIOError)):
        while sent < 200_000:
            peer.send(wire.frame("status", request_id=sent))
            sent += 1
    healthy(daemon)
    peer.close()
    eventually(lambda: daemon.status()["connections"] <= 2, "the mute connection is gone")


def test_silent_connection_is_closed_after_the_handshake_time(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon("--handshake=1s")
    peer = wire.Peer(daemon.socket, hello=False)
    reply = peer.receive()  # Blocks until the daemon closes it (or the socket's own time-out fails the test).
    assert reply is None
    healthy(daemon)


def test_too_many_connections_of_one_uid_are_refused(start_daemon: Callable[..., Daemon]) -> None:
    """F86, I-40."""
    daemon = start_daemon("--connections-per-uid-max=8")
    peers = [wire.Peer(daemon.socket) for _ in range(8)]
    extra = wire.Peer(daemon.socket, hello=False)
    reply = extra.receive()
    assert reply is not None and reply.status == wire.LIMIT
    peers.pop().close()

    def room() -> bool:
        peer = wire.Peer(daemon.socket, hello=False)
        peer.send(wire.frame("hello", struct.pack("<HH", 1, 1) + peer.session + wire.text("raw")))
        reply = peer.receive()
        peer.close()
        return reply is not None and reply.status == wire.OK

    eventually(room, "room again")


def test_truncation_growth_and_resealing_of_extents_are_impossible(daemon: Daemon) -> None:
    """F7: a truncated extent would kill readers with SIGBUS."""
    _peer, _, fds, _, _ = own_lease(daemon)
    for fd in fds:
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 4096)
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 1 << 30)
        with pytest.raises(PermissionError):
            fcntl.fcntl(fd, 1033, 0x8)  # F_ADD_SEALS, F_SEAL_WRITE
        assert os.fstat(fd).st_mode & 0o777 == 0o600
    healthy(daemon)


def seal_body(
    lease: wire.Lease, length: int, root: bytes, *, header: int = 4096 * 2, static: int = 4096, crc: int = 0
) -> bytes:
    return struct.pack("<QQQQ", lease.lease, length, header, static) + root + bytes(32) + struct.pack("<I", crc)


def test_seal_with_a_wrong_checksum_list_is_refused_and_closes_the_attempt(daemon: Daemon) -> None:
    """F8, I-2."""
    peer, lease, _, nonce, generation = own_lease(daemon)
    reply = peer.call("seal", seal_body(lease, 5 << 20, os.urandom(32)))
    assert reply.status == wire.CORRUPT
    again = peer.call("seal", seal_body(lease, 5 << 20, os.urandom(32)))
    assert again.status in (wire.CLOSED, wire.FENCED)
    refused = peer.reserve(NS, generation, nonce, 1, 5 << 20)
    assert isinstance(refused, wire.Reply) and refused.status == wire.CLOSED  # This try is over; the next one may.
    assert isinstance(peer.reserve(NS, generation, nonce, 1, 5 << 20, try_number=1), wire.Lease)
    healthy(daemon)


@pytest.mark.parametrize(
    "length,header,static",
    [
        (0, 0, 0),
        (1 << 40, 8192, 4096),
        (9 << 20, 8192, 4096),
        (4096, 8192, 4096),
        (5 << 20, 8192, 8192),
        (5 << 20, 1 << 60, 0),
        ((1 << 64) - 1, 8192, 4096),
    ],
)
def test_seal_with_lengths_that_do_not_fit_is_refused(daemon: Daemon, length: int, header: int, static: int) -> None:
    peer, lease, _, _, _ = own_lease(daemon)
    reply = peer.call("seal", seal_body(lease, length, os.urandom(32), header=header, static=static))
    assert reply.status == wire.INVALID
    healthy(daemon)


def test_seal_and_abort_of_somebody_elses_lease_are_refused(daemon: Daemon) -> None:
    _, lease, _, _, _ = own_lease(daemon)
    other = wire.Peer(daemon.socket)
    assert other.call("seal", seal_body(lease, 5 << 20, os.urandom(32))).status == wire.DENIED
    assert other.call("abort", struct.pack("<Q", lease.lease) + wire.text("")).status == wire.DENIED
    assert other.call("renew", struct.pack("<Q", lease.lease) + wire.text("")).status == wire.DENIED
    assert other.fetch_writable(lease.slot).status == wire.DENIED
    healthy(daemon)


def test_session_of_another_process_cannot_be_taken(daemon: Daemon) -> None:
    peer = wire.Peer(daemon.socket)
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import wire; "
        f"p = wire.Peer({daemon.socket!r}, hello=False, session=bytes.fromhex({peer.session.hex()!r})); "
        "sys.exit(p.hello().status)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == wire.DENIED


def test_writer_that_scribbles_after_its_seal_is_found_by_checksum(daemon: Daemon) -> None:
    """F6, I-9, I-12: never a silent change; `verify` names the block; the step before is the latest again."""
    os.environ["SAFEPOINT_SOCKET"] = daemon.socket
    checkpointer = safepoint.Checkpointer("scribbler", rank=0, world_size=1)
    for step in (1, 2):
        checkpointer.save(step, {"w": torch.full((2_000_000,), float(step))}).wait("memory", timeout=20)
    maps = Path("/proc/self/maps").read_text().splitlines()
    extents = [line for line in maps if "memfd:" in line and "safepoint" in line and " rw-s " in line]
    assert extents, "the writer's slots are mapped"
    for (
        line
    ) in extents:  # Through the mapping that the writer legitimately keeps: the last byte of every extent's first MiB.
        begin = int(line.split("-")[0], 16)
        address = begin + (1 << 20) - 1
        ctypes.c_uint8.from_address(address).value ^= 0xFF
    with pytest.raises(safepoint.Corrupt) as caught:
        checkpointer.restore({"w": torch.zeros(2_000_000)}, step=2)
    assert caught.value.rank == 0 and caught.value.block is not None
    state = daemon.status()
    assert state["totals"]["quarantined"] >= 1
    with pytest.raises((safepoint.Corrupt, safepoint.Lost)):  # Both steps were scribbled over; none is served.
        checkpointer.restore({"w": torch.zeros(2_000_000)})
    with pytest.raises(safepoint.Lost):
        checkpointer.latest()
    checkpointer.close()
    healthy(daemon)


def test_punched_hole_is_found_by_checksum_and_others_are_unaffected(daemon: Daemon) -> None:
    """F7: zeros come back from a hole; they are never served."""
    save_and_restore(daemon, "victim")
    client = daemon.client()
    peer = wire.Peer(daemon.socket)
    nonce = os.urandom(16)
    generation = peer.open_generation("puncher", nonce)
    lease = peer.reserve("puncher", generation, nonce, 1, 3 << 20)
    assert isinstance(lease, wire.Lease)
    fd = peer.fetch_writable(lease.slot).fds[0]
    os.pwrite(fd, os.urandom(4096), 0)
    libc_fallocate = 0x01 | 0x02  # KEEP_SIZE | PUNCH_HOLE
    assert (
        ctypes.CDLL(None, use_errno=True).fallocate(fd, libc_fallocate, ctypes.c_long(0), ctypes.c_long(1 << 20)) == 0
    )
    assert os.pread(fd, 4096, 0) == bytes(4096)
    assert peer.call("seal", seal_body(lease, 2 << 20, os.urandom(32))).status == wire.CORRUPT
    assert client.latest("victim").step == 1
    client.close()
    healthy(daemon)


def test_writer_that_dies_with_an_open_lease_frees_it(daemon: Daemon) -> None:
    """F1, I-28: the attempt is closed, the pool is back at its baseline."""
    code = f"""
import os, sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
import wire
p = wire.Peer({daemon.socket!r}); n = os.urandom(16)
g = p.open_generation("dying", n)
lease = p.reserve("dying", g, n, 1, 5 << 20)
print(lease.lease, flush=True); time.sleep(600)
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline().strip().isdigit()
    assert daemon.status()["totals"]["open_leases"] == 1
    child.send_signal(signal.SIGKILL)
    child.wait()
    eventually(
        lambda: daemon.status()["totals"]["open_leases"] == 0 and daemon.status()["pool"]["leased"] == 0,
        "the lease is free",
    )
    assert daemon.status()["pool"]["free"] == daemon.status()["pool"]["bytes"]
    healthy(daemon)


def test_stopped_writer_loses_its_lease_and_its_late_seal_is_fenced(start_daemon: Callable[..., Daemon]) -> None:
    """F5, I-10: its extents are nobody else's while it can still write; it gets them back when it gives up."""
    daemon = start_daemon("--lease=1s")
    peer, lease, fds, _, _ = own_lease(daemon)
    eventually(lambda: daemon.status()["pool"]["zombie"] == 8 << 20, "the lease has expired")
    os.pwrite(fds[0], b"late", 0)
    late = peer.call("seal", seal_body(lease, 5 << 20, os.urandom(32)))
    assert late.status == wire.FENCED and "expired" in late.text()
    assert peer.call("abort", struct.pack("<Q", lease.lease) + wire.text("")).status == wire.OK
    assert daemon.status()["pool"]["zombie"] == 0 and daemon.status()["pool"]["idle"] == 8 << 20
    healthy(daemon)


def test_ten_thousand_reservations_leave_no_trace(daemon: Daemon) -> None:
    """F9, I-28."""
    peer = wire.Peer(daemon.socket)
    nonce = os.urandom(16)
    generation = peer.open_generation(NS, nonce)
    for step in range(10_000):
        lease = peer.reserve(NS, generation, nonce, step, 1 << 20)
        assert isinstance(lease, wire.Lease), lease
        assert peer.call("abort", struct.pack("<Q", lease.lease) + wire.text("again")).status == wire.OK
    state = daemon.status()
    assert state["pool"]["bytes"] == 4 << 20 and state["totals"]["open_leases"] == 0
    peer.close()
    healthy(daemon)


def test_evil_twin_mutates_its_extent_during_seals(daemon: Daemon) -> None:
    """T-9: the daemon copies the list once; whatever it saw, it answers and lives."""
    peer, lease, fds, nonce, generation = own_lease(daemon)
    view = mmap.mmap(fds[1], 4 << 20)
    stop = threading.Event()

    def mutate() -> None:
        chance = random.Random(1)
        while not stop.is_set():
            at = chance.randrange((1 << 20), (1 << 20) + 4096)
            view[at : at + 8] = chance.randbytes(8)

    twin = threading.Thread(target=mutate)
    twin.start()
    try:
        for number in range(1, 200):
            reply = peer.call("seal", seal_body(lease, 5 << 20, os.urandom(32)))
            assert reply.status in (wire.CORRUPT, wire.CLOSED)
            again = peer.reserve(NS, generation, nonce, 1, 5 << 20, try_number=number)
            assert isinstance(again, wire.Lease), again
            lease = again
    finally:
        stop.set()
        twin.join()
    healthy(daemon)


def test_tenants_see_nothing_of_each_other(daemon: Daemon, tmp_path: Path) -> None:
    """I-38: a client of another uid cannot list, read or name what uid 0 has, and errors do not tell."""
    save_and_restore(daemon, "secret")
    os.chmod(daemon.folder, 0o755)
    for parent in Path(daemon.folder).parents:
        if parent.owner() == "root" and parent != Path("/"):
            os.chmod(parent, os.stat(parent).st_mode | 0o055)
    code = f"""
import os, struct, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import wire
os.setgid(65534); os.setuid(65534)
p = wire.Peer({daemon.socket!r})
def ns(n): return wire.text(n) + bytes([1]) + struct.pack("<I", 0)
there, never = p.call("latest", ns("secret")), p.call("latest", ns("nothere"))
assert there.status == never.status
assert there.text().replace("secret", "x") == never.text().replace("nothere", "x"), (there, never)
assert struct.unpack_from("<I", p.call("list_namespaces", ns("")).body)[0] == 0
assert b"secret" not in p.call("status").body
n = os.urandom(16); g = p.open_generation("secret", n)
assert g == 1  # Its own namespace of that name.
lease = p.reserve("secret", g, n, 1, 3 << 20)
fd = p.fetch_writable(lease.slot).fds[0]
assert not any(os.pread(fd, 1 << 20, i << 20).strip(bytes(1)) for i in range(4)), "another tenant's bytes"
"""
    subprocess.run([sys.executable, "-S", "-c", code], check=True, timeout=60)
    client = daemon.client()
    assert client.latest("secret").step == 1
    client.close()
    healthy(daemon)


def test_secrets_of_the_environment_stay_out_of_logs_and_status(
    start_daemon: Callable[..., Daemon], monkeypatch: pytest.MonkeyPatch
) -> None:
    """I-41: a canary in environment and tensors shows up nowhere."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-7c1f")
    daemon = start_daemon("--log-level=debug")
    os.environ["SAFEPOINT_SOCKET"] = daemon.socket
    checkpointer = safepoint.Checkpointer("canary", rank=0, world_size=1)
    checkpointer.save(1, {"note": "canary-7c1f", "w": torch.ones(4)}).wait("memory", timeout=20)
    client = daemon.client()
    assert "canary-7c1f" not in client.status()
    client.close()
    checkpointer.close()
    daemon.stop()
    assert daemon.events("attempt_complete")  # The log is there ...
    assert "canary-7c1f" not in daemon.log.read_text() + (daemon.folder / "stderr").read_text()
