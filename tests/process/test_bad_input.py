"""The issue's list of bad input, through the public API and a real daemon."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import Daemon, eventually

import safepoint


@pytest.fixture
def checkpointer(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., safepoint.Checkpointer]]:
    monkeypatch.setenv("SAFEPOINT_SOCKET", daemon.socket)
    monkeypatch.setenv("SAFEPOINT_START", "0")
    made: list[safepoint.Checkpointer] = []

    def make(ns: str = "bad", **arguments: object) -> safepoint.Checkpointer:
        made.append(safepoint.Checkpointer(ns, rank=0, world_size=1, **arguments))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for each in made:
        each.close()


def mib(count: int, value: float = 1.0) -> torch.Tensor:
    return torch.full((count << 18,), value)


def test_state_larger_than_the_pool_is_refused_at_the_first_save_with_the_numbers(
    checkpointer: Callable[..., safepoint.Checkpointer],
) -> None:
    """F46, I-27: before any byte."""
    with pytest.raises(safepoint.NoSpace, match=r"68 MiB does not fit: pool 64 MiB"):
        checkpointer().save(1, {"w": mib(65)})


def test_full_pool_is_refused_at_once_and_the_last_complete_step_kept(
    daemon: Daemon, checkpointer: Callable[..., safepoint.Checkpointer]
) -> None:
    """F46, I-14, I-29: two steps of 24 MiB are kept, a third does not fit into 64 MiB; training goes on."""
    ckpt = checkpointer()
    weights = mib(23)
    for step in (1, 2):
        weights.fill_(step)
        ckpt.save(step, {"w": weights}).wait("memory", timeout=20)
    began = time.monotonic()
    with pytest.raises(safepoint.NoSpace, match="raise the setting"):
        ckpt.save(3, {"w": weights})
    assert time.monotonic() - began < 2.0
    assert ckpt.latest().step == 2
    target = torch.zeros_like(weights)
    info = ckpt.restore({"w": target})
    assert info is not None and info.step == 2 and bool((target == 2).all())
    with pytest.raises(safepoint.NoSpace):  # And again: a refused save leaves nothing behind.
        ckpt.save(3, {"w": weights})
    small = ckpt.save(4, {"w": mib(2, 4.0)})  # A state that fits is saved.
    assert small.wait("memory", timeout=20) == "memory"


def test_absent_daemon_that_may_not_be_started_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    socket = str(tmp_path / "nobody.sock")
    monkeypatch.setenv("SAFEPOINT_SOCKET", socket)
    monkeypatch.setenv("SAFEPOINT_START", "0")
    with pytest.raises(safepoint.Unavailable, match=r"nobody.sock"):
        safepoint.Checkpointer("absent", rank=0, world_size=1).latest()


def test_older_of_two_jobs_in_one_namespace_is_fenced(
    daemon: Daemon, checkpointer: Callable[..., safepoint.Checkpointer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """F79, I-21: the second launch opens a higher generation; the first one is told at its next save, and what it
    saved stays readable."""
    import subprocess
    import sys

    old = checkpointer("twice")
    old.save(1, {"w": mib(1)}).wait("memory", timeout=20)
    code = (
        "import torch, safepoint; c = safepoint.Checkpointer('twice', rank=0, world_size=1); t = torch.zeros(1 << 18); "
        "assert c.restore({'w': t}).step == 1; c.save(2, {'w': t}).wait('memory', timeout=20); c.close()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    with pytest.raises(safepoint.Fenced, match="superseded by generation 2"):
        old.save(2, {"w": mib(1)}).wait("memory", timeout=20)
    assert [i.step for i in old.steps()] == [2, 1]


def test_keeper_killed_means_lost_not_a_fresh_start(
    start_daemon: Callable[..., Daemon], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F18, I-31: a new daemon on the same state directory knows that there were complete steps."""
    state = tmp_path / "state"
    first = start_daemon(f"--state-dir={state}")
    monkeypatch.setenv("SAFEPOINT_SOCKET", first.socket)
    ckpt = safepoint.Checkpointer("gone", rank=0, world_size=1)
    assert ckpt.restore({"w": mib(1)}) is None
    ckpt.save(1, {"w": mib(1)}).wait("memory", timeout=20)
    # The marker is written behind the acknowledgement: a save never waits for a disk.
    eventually(lambda: (state / "markers").is_dir() and any((state / "markers").iterdir()), "the marker is on disk")
    worker = first.worker_pid()
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.wait()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{worker}").exists() and "Z" not in Path(f"/proc/{worker}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline, "the worker outlived its keeper"
        time.sleep(0.01)
    second = start_daemon(f"--state-dir={state}")
    monkeypatch.setenv("SAFEPOINT_SOCKET", second.socket)
    again = safepoint.Checkpointer("gone", rank=0, world_size=1)
    with pytest.raises(safepoint.Lost, match="fresh=True"):
        again.restore({"w": mib(1)})
    assert safepoint.Checkpointer("never", rank=0, world_size=1).restore({"w": mib(1)}) is None
    assert again.restore({"w": mib(1)}, fresh=True) is None
    again.save(1, {"w": mib(1)}).wait("memory", timeout=20)
    assert again.latest().step == 1


def test_worker_killed_between_saves_and_during_them_loses_nothing(
    daemon: Daemon, checkpointer: Callable[..., safepoint.Checkpointer]
) -> None:
    """I-25, F13, F14: one trainer, twenty SIGKILLs of the worker; every save is acknowledged in the end, the job never
    restarts."""
    ckpt = checkpointer("survivor")
    weights = mib(3)
    for step in range(1, 21):
        weights.fill_(step)
        save = ckpt.save(step, {"w": weights})
        daemon.kill_worker()
        assert save.wait("memory", timeout=30) in ("memory", "none")
        target = torch.zeros_like(weights)
        info = ckpt.restore({"w": target})
        assert info is not None and info.step == step and bool((target == step).all())
    assert daemon.status()["incarnation"] > 10
