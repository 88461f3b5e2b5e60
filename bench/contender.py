"""A process that moves bytes when it is told to, and what that costs: one side of every comparison of stores.

The process reads lines, each names what to do, and answers each with a line of seconds and of processor seconds, its
own and no others'. So contenders that need other packages take turns in one run.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from bench.launch import Failed
from bench.ours import anonymous_bytes
from bench.system import ROOT, site_folder

_LOOK_SECONDS = 0.005  # Between two looks at a process's memory. One costs some 20 us.
_WAIT_SECONDS = 150.0  # For one answer.
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Sample:
    """`cpu`: seconds; `memory`: by how much the private memory grew at most, in bytes."""

    seconds: float
    cpu: float
    memory: int


def cpu_seconds(pid: int) -> float:
    """Of all threads of a process, in steps of 10 ms."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


class Watch:
    """While it is entered: `cpu` and `memory` of a process, as in Sample."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self.cpu = 0.0
        self.memory = 0

    def __enter__(self) -> Watch:
        self._cpu, self._memory = cpu_seconds(self._pid), anonymous_bytes(self._pid)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # It has ended: whoever asked it will say so.
            self.cpu = cpu_seconds(self._pid) - self._cpu

    def _look(self) -> None:
        while not self._over.wait(_LOOK_SECONDS):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                self.memory = max(self.memory, anonymous_bytes(self._pid) - self._memory)


class Contender:
    """Started by its command; what it says besides answers goes into `log`."""

    def __init__(self, command: Sequence[str], log: Path, environment: dict[str, str] | None = None) -> None:
        self._log = log
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **(environment or {})},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )

    def ask(self, what: str) -> Sample:
        assert self._process.stdin is not None and self._process.stdout is not None
        with Watch(self._process.pid) as watch:
            with contextlib.suppress(BrokenPipeError):  # Then there is no answer, either.
                self._process.stdin.write(f"{what}\n".encode())
                self._process.stdin.flush()
            readable, _, _ = select.select([self._process.stdout], [], [], _WAIT_SECONDS)
            answer = self._process.stdout.readline().split() if readable else []
        if len(answer) != 2:
            raise Failed(f"no answer to {what!r}: {self._log.read_text()[-1500:].strip()}")
        return Sample(float(answer[0]), float(answer[1]), watch.memory)

    def wait_until_ready(self) -> None:
        """It answers nothing before, and an empty line at once: so that nobody is measured while another one starts."""
        self.ask("")

    def stop(self) -> None:
        """SIGKILL, also to what it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()


def python(module: str, arguments: Sequence[str], site: str | None, log: Path) -> Contender:
    """`site`: of a peer with packages of its own."""
    paths = [str(ROOT)] + ([str(site_folder(site))] if site else [])
    return Contender([sys.executable, "-m", module, *arguments], log, {"PYTHONPATH": os.pathsep.join(paths)})
