from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator

import pytest
from fake_core import Client, FakeDaemon

from safepoint import _connect, _core, _engine, api, errors


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    """A daemon in this process. Checkpointers made in the test talk to it and are closed after it."""
    daemon = FakeDaemon()
    monkeypatch.setattr(_connect, "open_client", lambda name, **_: Client(daemon))
    monkeypatch.setattr(_engine, "_histories", {})
    before = set(api._live)
    yield daemon
    if daemon.hold is not None:
        daemon.hold.set()
    for checkpointer in set(api._live) - before:
        checkpointer.close()


@pytest.fixture
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A daemon for one test, with a small pool; its socket's path."""
    folder = tmp_path_factory.mktemp("daemon")
    path = str(folder / "s.sock")
    arguments = [
        "--socket",
        path,
        "--state-dir",
        str(folder / "state"),
        "--pool",
        "256MiB",
        "--extent",
        "1MiB",
        "--http",
        "off",
    ]
    (folder / "state").mkdir(mode=0o700)
    process = subprocess.Popen([_connect.daemon_path({}), *arguments, "--log-file", str(folder / "log")])
    end = time.monotonic() + 30
    while True:
        try:
            _core.Client(path).close()
            break
        except errors.Unavailable:
            assert process.poll() is None and time.monotonic() < end, (folder / "log").read_text()
    yield path
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0


@pytest.fixture
def namespace(daemon: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    monkeypatch.setenv("SAFEPOINT_SOCKET", daemon)
    return "".join(c if c.isalnum() else "-" for c in request.node.name)[:100]
