"""The daemon's log: evidence of what was acknowledged (I-42), and a pipe whose reader is gone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BINARY, Daemon, eventually
from log_check import check

import safepoint
from safepoint import _core


def events(daemon: Daemon) -> list[dict[str, Any]]:
    return [json.loads(line) for line in daemon.log.read_text().splitlines()]


@pytest.fixture
def history(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Two launches of two ranks, a failed save, a restore, a pin."""
    monkeypatch.setenv("SAFEPOINT_SOCKET", daemon.socket)
    for launch in range(2):
        monkeypatch.setenv("SAFEPOINT_LAUNCH_ID", f"{os.urandom(4).hex()}-{launch}")
        monkeypatch.setattr(safepoint._launch, "_nonces", {})
        monkeypatch.setattr(safepoint._engine, "_histories", {})
        ranks = [safepoint.Checkpointer("evidence", rank=rank, world_size=2) for rank in range(2)]
        for step in range(launch * 10, launch * 10 + 4):
            for rank, each in enumerate(ranks):
                save = each.save(step, {"w": torch.full((1000,), float(step + rank))})
            save.wait("memory", timeout=20)
        lease = ranks[0]._engine.save(99, {"w": torch.zeros(10)}, hold=True)
        lease.refuse("on purpose")
        for each in ranks:
            each.restore({"w": torch.zeros(1000)})
        client = daemon.client()
        newest = client.list_steps("evidence")[0]
        client.pin_step("evidence", newest.attempt, True)
        client.close()
        for each in ranks:
            each.close()
    return events(daemon)


def test_the_log_alone_shows_that_all_was_allowed(history: list[dict[str, Any]]) -> None:
    assert check(history) == []
    names = [event["event"] for event in history]
    assert names.count("generation_opened") == 2 and names.count("attempt_complete") == 8
    assert names.count("shard_sealed") == 16 and names.count("lease_granted") == 18
    assert {"attempt_retired", "attempt_closed", "read_pinned", "read_unpinned", "step_pinned"} <= set(names)
    for event in history:
        if event["event"] == "shard_sealed":
            assert len(event["record"]) == len(event["block_root"]) == 64 and int(event["bytes"]) > 4000


@pytest.mark.parametrize(
    ("lie", "told"),
    [
        (lambda e: e["event"] != "shard_sealed" or e["step"] != "2" or e["rank"] != "1", "of 2 had sealed"),
        (lambda e: e["event"] != "generation_opened" or e["generation"] != "2", "was never opened"),
        (lambda e: e["event"] != "lease_granted" or e["step"] != "1", "had no lease"),
        (lambda e: e["event"] != "attempt_complete", "never complete"),
    ],
)
def test_the_checker_notices_what_is_missing(
    history: list[dict[str, Any]], lie: Callable[[Any], bool], told: str
) -> None:
    assert any(told in problem for problem in check(event for event in history if lie(event)))


def test_the_checker_notices_what_is_false(history: list[dict[str, Any]]) -> None:
    sealed = next(event for event in history if event["event"] == "shard_sealed")
    assert any("sealed twice" in problem for problem in check([*history[: history.index(sealed) + 1], sealed]))
    assert any("superseded" in problem for problem in check([*history, {**sealed, "attempt": "f" * 32}]))
    shorter = [{**event, "bytes": "1"} if event is sealed else event for event in history]
    assert any("bytes" in problem for problem in check(shorter))


def test_evidence_is_not_rationed(start_daemon: Callable[..., Daemon], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines that a user causes are limited; those of what it was told are not."""
    daemon = start_daemon("--log-lines-per-uid=1")
    monkeypatch.setenv("SAFEPOINT_SOCKET", daemon.socket)
    with safepoint.Checkpointer("rationed", rank=0, world_size=1) as c:
        for step in range(30):
            c.save(step, {"w": torch.zeros(10)}).wait(timeout=20)
    found = events(daemon)
    assert sum(event["event"] == "attempt_complete" for event in found) == 30
    assert check(found) == []


def test_a_log_that_nobody_reads_any_more_ends_nobody(tmp_path: Path) -> None:
    """The worker died of SIGPIPE at its first line, and so did each of its successors."""
    read_end, write_end = os.pipe()
    socket = str(tmp_path / "d.sock")
    flags = [
        f"--socket={socket}",
        f"--state-dir={tmp_path}/state",
        "--pool=64MiB",
        "--extent=4MiB",
        "--pool-prefault=0",
    ]
    keeper = subprocess.Popen(
        [str(BINARY), *flags, "--ledger=1MiB", "--http=off"],
        stdin=subprocess.DEVNULL,
        stdout=write_end,
        stderr=write_end,
    )
    os.close(write_end)
    try:
        eventually(lambda: os.path.exists(socket), "the daemon listens")
        client = _core.Client(socket, client_name="test", deadline=20.0)
        os.close(read_end)
        os.kill(client.daemon.pid, 0)
        children = Path(f"/proc/{keeper.pid}/task/{keeper.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGKILL)
        for number in range(3):  # Each of them is a line in the log.
            client.open_generation(f"job{number}", os.urandom(16), 1, 0, deadline=20.0)
        assert client.daemon.incarnation == 2 and keeper.poll() is None
        client.close()
    finally:
        keeper.terminate()
        assert keeper.wait(timeout=20) == 0
