"""I-29, F19: a worker that does not answer. Whoever waits hears it within the deadline, and nobody too early."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from conftest import Daemon

import safepoint
from safepoint import _engine

Made = Callable[..., safepoint.Checkpointer]


@contextmanager
def stopped(daemon: Daemon) -> Iterator[None]:
    pid = daemon.worker_pid()
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.fixture
def ranks(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> Iterator[Made]:
    """Makes two ranks, whose calls have so many seconds."""
    monkeypatch.setenv("SAFEPOINT_SOCKET", daemon.socket)
    monkeypatch.setenv("SAFEPOINT_LAUNCH_ID", os.urandom(8).hex())
    made: list[safepoint.Checkpointer] = []

    def make(seconds: float) -> list[safepoint.Checkpointer]:
        monkeypatch.setattr(_engine, "CALL_SECONDS", seconds)
        # A name of its own for each test: how often a step was saved is remembered as long as this process lives.
        name = f"stalled-{os.urandom(4).hex()}"
        made.extend(safepoint.Checkpointer(name, rank=rank, world_size=2) for rank in range(2))
        return made

    yield make
    for checkpointer in made:
        checkpointer.close()


def state(value: float) -> dict[str, object]:
    return {"w": torch.full((1000,), value)}


def test_a_seal_that_gets_no_answer_ends(daemon: Daemon, ranks: Made, caplog: pytest.LogCaptureFixture) -> None:
    """The seal's own deadline looked like "still running": waiting for it span for ever."""
    first, second = ranks(2.0)
    for each in (second, first):
        save = each.save(0, state(0.0))
    save.wait(timeout=20)
    save = first._engine.save(1, state(1.0), hold=True)
    with stopped(daemon):
        save.confirm()
        begin = time.monotonic()
        with pytest.raises(safepoint.Unavailable, match="whether the shard was sealed is unknown"):
            save.wait(timeout=None)
        assert time.monotonic() - begin < 15
        assert save.poll()
    for each in (first, second):
        each.save(2, state(2.0))
    assert second._engine.save(3, state(3.0)) and first.save(3, state(3.0)).wait(timeout=20) == "memory"


def test_closing_is_bounded(daemon: Daemon, ranks: Made) -> None:
    """It took three times what it promises."""
    first, _ = ranks(30.0)
    first.save(1, state(1.0)).wait_sealed(timeout=20)
    with stopped(daemon):
        begin = time.monotonic()
        first.close()
        assert time.monotonic() - begin < 18


def test_a_wait_outlives_a_worker_that_stalls(daemon: Daemon, ranks: Made) -> None:
    """The client's timeout is what the worker has to come back, not the second that one question takes."""
    first, second = ranks(30.0)
    save = first.save(1, state(1.0))
    save.wait_sealed(timeout=20)
    asked = threading.Event()

    def wait() -> str:
        asked.set()
        return save.wait(timeout=40)

    with ThreadPoolExecutor(1) as pool:
        reached = pool.submit(wait)
        asked.wait()
        with stopped(daemon), pytest.raises(TimeoutError):
            reached.result(4.0)  # Longer than a question and its grace.
        second.save(1, state(1.0))
        assert reached.result(20.0) == "memory"


def test_a_wait_that_never_reaches_anybody_says_so(daemon: Daemon, ranks: Made) -> None:
    first, _ = ranks(2.0)
    save = first.save(1, state(1.0))
    save.wait_sealed(timeout=20)
    with stopped(daemon):
        begin = time.monotonic()
        with pytest.raises(safepoint.Unavailable):
            save.wait(timeout=None)
        assert 1.0 < time.monotonic() - begin < 15
        with pytest.raises(safepoint.Unavailable):
            assert save.level == "unknown"
