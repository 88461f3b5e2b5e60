"""Rank, world size, nonce, and which daemon to use."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path

import pytest
import torch.distributed

from safepoint import _connect, _launch, errors


def test_identity() -> None:
    assert _launch.identify(None, None, {}) == (0, 1)
    assert _launch.identify(2, 4, {}) == (2, 4)
    assert _launch.identify(None, None, {"RANK": "1", "WORLD_SIZE": "3", "SLURM_PROCID": "0"}) == (1, 3)
    assert _launch.identify(None, None, {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}) == (1, 2)
    assert _launch.identify(None, None, {"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}) == (0, 1)
    for rank, world_size, environment in (
        (1, None, {}),
        (2, 2, {}),
        (-1, 2, {}),
        (None, None, {"RANK": "x", "WORLD_SIZE": "1"}),
    ):
        with pytest.raises(errors.InvalidArgument):
            _launch.identify(rank, world_size, environment)


def test_scheduler_identity_changes_with_every_launch() -> None:
    torchrun = {"TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_RESTART_COUNT": "0", "MASTER_PORT": "1"}
    slurm = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}
    texts = [
        _launch.scheduler_identity(environment)
        for environment in (
            torchrun,
            {**torchrun, "TORCHELASTIC_RESTART_COUNT": "1"},
            {**torchrun, "MASTER_PORT": "2"},
            slurm,
            {**slurm, "SLURM_STEP_ID": "1"},
            {**slurm, "SLURM_RESTART_COUNT": "1"},
            {"SAFEPOINT_LAUNCH_ID": "x"},
        )
    ]
    assert None not in texts and len(set(texts)) == len(texts)
    assert _launch.scheduler_identity({"TORCHELASTIC_RUN_ID": "none"}) is None


def test_nonce_is_made_once_and_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    store = torch.distributed.HashStore()
    found: list[bytes] = []
    threads = [
        threading.Thread(target=lambda r=rank: found.append(_launch._nonce_from_store(store, r, 10.0, "p")))
        for rank in (2, 1, 0, 0)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(set(found)) == 1 and len(found[0]) == 16
    with pytest.raises(errors.DeadlineExceeded, match="rank 0"):
        _launch._nonce_from_store(torch.distributed.HashStore(), 1, 0.1, "p")
    monkeypatch.setattr(_launch, "_nonces", {})
    assert _launch.launch_nonce(0, 1, 1.0, {}) == _launch.launch_nonce(0, 1, 1.0, {})
    assert _launch.launch_nonce(0, 2, 1.0, {}) is None


def test_a_restart_in_the_same_store_is_another_launch() -> None:
    """torchrun's agent keeps its store over restarts."""
    store = torch.distributed.HashStore()
    first, second = ({"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": count} for count in "01")
    prefixes = [_launch.restart_prefix(environment) for environment in (first, second)]
    nonces = [_launch._nonce_from_store(store, rank, 1.0, prefix) for prefix in prefixes for rank in (0, 1)]
    assert nonces[0] == nonces[1] != nonces[2] == nonces[3]


@pytest.mark.parametrize("libuv", [False, True])
def test_who_waits_for_the_nonce_is_woken(libuv: bool) -> None:
    """Regression: torch's store without libuv left rank 1 waiting for its whole deadline, at the first save."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, 2, True, wait_for_workers=False, use_libuv=libuv)
    other = torch.distributed.TCPStore("127.0.0.1", store.port, 2, False, wait_for_workers=False, use_libuv=libuv)
    found: list[bytes] = []
    seconds: list[float] = []

    def wait() -> None:
        began = time.monotonic()
        found.append(_launch._nonce_from_store(other, 1, 10.0, "p"))
        seconds.append(time.monotonic() - began)

    waiter = threading.Thread(target=wait)
    waiter.start()
    time.sleep(0.3)  # The store does not tell that somebody waits. Too short a time would only prove less.
    nonce = _launch._nonce_from_store(store, 0, 10.0, "p")
    waiter.join()
    assert found == [nonce] and seconds[0] < 5.0


def test_structures_are_compared() -> None:
    def compare(prints: list[bytes]) -> list[bool]:
        store = torch.distributed.HashStore()
        result: dict[int, bool] = {}

        def run(rank: int) -> None:
            result[rank] = _launch.agree(store, "k", rank, len(prints), prints[rank], 10.0)

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(prints))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [result[rank] for rank in range(len(prints))]

    assert compare([b"a" * 16] * 3) == [True] * 3
    assert compare([b"a" * 16, b"b" * 16]) == [False] * 2
    assert not _launch.agree(torch.distributed.HashStore(), "k", 0, 2, b"a" * 16, 0.1)


def test_which_daemon(tmp_path: Path) -> None:
    node = str(tmp_path / "node.sock")
    base = {"XDG_RUNTIME_DIR": str(tmp_path), "XDG_STATE_HOME": str(tmp_path / "state")}
    assert _connect.find_endpoint({**base, "SAFEPOINT_SOCKET": "/s"}, node_socket=node) == _connect.Endpoint("/s")
    private = _connect.find_endpoint(base, node_socket=node)
    assert private.socket == str(tmp_path / "safepoint" / "safepointd.sock") and private.daemon is not None
    assert "--private" in private.arguments and private.arguments[private.arguments.index("--state-dir") + 1] == str(
        tmp_path / "state" / "safepoint"
    )
    assert (tmp_path / "safepoint").stat().st_mode & 0o777 == 0o700
    assert _connect.find_endpoint({**base, "SAFEPOINT_START": "0"}, node_socket=node).daemon is None
    (tmp_path / "safepoint").chmod(0o755)
    with pytest.raises(errors.Denied, match="0700"):
        _connect.find_endpoint(base, node_socket=node)
    Path(node).touch()
    assert _connect.find_endpoint(base, node_socket=node) == _connect.Endpoint(node)
    other = _connect.find_endpoint(
        {"TMPDIR": str(tmp_path), **{"XDG_STATE_HOME": base["XDG_STATE_HOME"]}}, node_socket=node + "x"
    )
    assert other.socket == str(tmp_path / f"safepoint-{os.getuid()}" / "safepointd.sock")


def test_a_link_is_no_private_directory(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "safepoint").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(errors.Denied):
        _connect.find_endpoint({"XDG_RUNTIME_DIR": str(tmp_path), "XDG_STATE_HOME": str(tmp_path)}, node_socket="/none")


def test_daemon_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safepoint

    path = tmp_path / "s.sock"
    monkeypatch.setenv("SAFEPOINT_SOCKET", str(path))
    with pytest.raises(errors.Unavailable, match=str(path)):
        safepoint.Checkpointer("job", rank=0, world_size=1)
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    with pytest.raises(errors.Unavailable, match=str(path)):
        safepoint.Checkpointer("job", rank=0, world_size=1)
    monkeypatch.delenv("SAFEPOINT_SOCKET")
    monkeypatch.setenv("SAFEPOINT_START", "0")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with pytest.raises(errors.Unavailable, match="SAFEPOINT_START=0"):
        safepoint.Checkpointer("job", rank=0, world_size=1)
