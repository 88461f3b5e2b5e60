"""A real daemon, keeper and worker, per test."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import safepoint
from safepoint import _core

sys.path.insert(0, str(Path(__file__).parent))
BINARY = Path(safepoint.__file__).parent / "bin" / "safepointd"


class Daemon:
    """``safepointd`` on a socket in ``folder``."""

    def __init__(self, folder: Path, *flags: str, environment: Mapping[str, str] | None = None) -> None:
        folder.mkdir(mode=0o700, exist_ok=True)
        self.folder = folder
        self.socket = str(folder / "d.sock")
        self.log = folder / "daemon.jsonl"
        settings = {
            "--socket": self.socket,
            "--state-dir": str(folder / "state"),
            "--pool": "64MiB",
            "--extent": "4MiB",
            "--pool-prefault": "0",
            "--ledger": "1MiB",
            "--http": "off",
            "--log-file": str(self.log),
            "--lock-memory": "off",
        }
        for flag in flags:
            name, _, value = flag.partition("=")
            settings[name] = value
        command = [str(BINARY)] + [f"{name}={value}" for name, value in settings.items()]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=(folder / "stderr").open("w"),
            env=None if environment is None else {**os.environ, **environment},
        )
        self.client().close()

    def client(self, timeout: float = 20.0) -> _core.Client:
        deadline = time.monotonic() + timeout
        while True:
            try:
                return _core.Client(self.socket, client_name="test", deadline=5.0)
            except safepoint.Unavailable:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError((self.folder / "stderr").read_text()[-2000:]) from None
                time.sleep(0.02)  # Between two looks at a process that is starting; nothing is judged by it.

    def worker_pid(self) -> int:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
            if children:
                return int(children[0])
            time.sleep(0.01)
        raise AssertionError("the keeper has no worker")

    def kill_worker(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.worker_pid(), signal.SIGKILL)

    def status(self) -> dict[str, Any]:
        client = self.client()
        state: dict[str, Any] = json.loads(client.status())
        client.close()
        return state

    def events(self, name: str) -> list[dict[str, Any]]:
        if not self.log.exists():
            return []
        lines = [json.loads(line) for line in self.log.read_text().splitlines() if line.endswith("}")]
        return [line for line in lines if line.get("event") == name]

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(timeout=30)


def eventually(condition: Callable[[], bool], what: str, seconds: float = 20.0) -> None:
    """Waits for an event that another process brings about; fails at the deadline."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.01)


@pytest.fixture
def start_daemon(tmp_path: Path) -> Iterator[Callable[..., Daemon]]:
    daemons: list[Daemon] = []

    def start(*flags: str, **options: Any) -> Daemon:
        daemons.append(Daemon(tmp_path / f"daemon{len(daemons)}", *flags, **options))
        return daemons[-1]

    yield start
    for daemon in daemons:
        code = daemon.stop()
        stderr = (daemon.folder / "stderr").read_text()
        assert "CHECK failed" not in stderr, stderr
        assert code == 0 or code == -signal.SIGKILL, (code, stderr)


@pytest.fixture
def daemon(start_daemon: Callable[..., Daemon]) -> Daemon:
    return start_daemon()


@pytest.fixture
def open_job(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., safepoint.Checkpointer]]:
    """One rank of a job, on a daemon."""
    made: list[safepoint.Checkpointer] = []

    def make(daemon: Daemon, name: str = "", rank: int = 0, world_size: int = 1) -> safepoint.Checkpointer:
        monkeypatch.setenv("SAFEPOINT_SOCKET", daemon.socket)
        monkeypatch.setenv("SAFEPOINT_LAUNCH_ID", os.urandom(8).hex())
        made.append(safepoint.Checkpointer(name or f"job-{os.urandom(4).hex()}", rank=rank, world_size=world_size))
        return made[-1]

    yield make
    for checkpointer in made:
        checkpointer.close()
