"""Starts ranks and services of one run, waits for what they tell, and ends every process that it has started."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from bench.scenarios import expected_bytes
from bench.system import ROOT, Place, Service, System, find, site_folder

_LOOK_SECONDS = 0.05  # Between two looks at the ranks' files; memory is sampled then, too.


class Failed(Exception):
    """A run that gave no result; the text says why."""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def shared_bytes() -> int:
    """Memory of all shared mappings and tmpfs files of this machine."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("Shmem:"):
            return int(line.split()[1]) * 1024
    raise Failed("no Shmem in /proc/meminfo")


def available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise Failed("no MemAvailable in /proc/meminfo")


def _session_bytes(sessions: set[int]) -> int:
    """Private memory of all processes of these sessions."""
    total = 0
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        with contextlib.suppress(OSError, IndexError, ValueError):
            if os.getsid(int(entry)) in sessions:
                pages = Path(f"/proc/{entry}/statm").read_text().split()
                total += (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE")
    return total


class Group:
    """The ranks of one phase: each has a session of its own, so that its helpers die with it."""

    def __init__(self, run: Run, phase: str, number: int, extra: dict[str, Any]) -> None:
        self.out = run.folder / f"{phase}{number}"
        self.out.mkdir()
        self.processes: list[subprocess.Popen[bytes]] = []
        port = free_port()
        for rank, place in enumerate(run.places):
            cores = run.cores[rank]
            config = {
                "phase": phase,
                "system": run.system.name,
                "place": place.__dict__,
                "out": str(self.out),
                "threads": run.threads,
                **extra,
            }
            path = self.out / f"config-{rank}.json"
            path.write_text(json.dumps(config))
            self.processes.append(_start_rank(run.system, place, path, cores, port, self.out / f"log-{rank}"))

    def go(self) -> None:
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(b"\n")
            process.stdin.flush()

    def wait(self, what: str, seconds: float, sample: Any = None) -> list[dict[str, Any]]:
        """The files `what` of all ranks. Failed: a rank ended before, or the time is over."""
        paths = [self.out / f"{what}-{rank}.json" for rank in range(len(self.processes))]
        deadline = time.monotonic() + seconds
        while not all(path.exists() for path in paths):
            if any(process.poll() is not None for process in self.processes):
                time.sleep(0.5)  # The other rank may still write down why.
                raise Failed(f"a rank ended: {self.last_words()}")
            if time.monotonic() > deadline:
                raise Failed(f"no {what} within {seconds:.0f} s: {self.last_words()}")
            if sample is not None:
                sample()
            time.sleep(_LOOK_SECONDS)
        return [json.loads(path.read_text()) for path in paths]

    def last_words(self) -> str:
        logs = [(self.out / f"log-{rank}").read_text()[-1500:] for rank in range(len(self.processes))]
        return "\n".join(f"[rank {rank}] {text}" for rank, text in enumerate(logs) if text)

    def kill(self) -> None:
        """SIGKILL to every rank and what it has started."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.wait()
            if process.stdin is not None:
                process.stdin.close()


def _start_rank(
    system: type[System], place: Place, config: Path, cores: Sequence[int], port: int, log: Path
) -> subprocess.Popen[bytes]:
    paths = [str(ROOT)] + ([str(site_folder(system.site))] if system.site else [])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "RANK": str(place.rank),
        "WORLD_SIZE": str(place.ranks),
        "LOCAL_RANK": str(place.rank),
        "LOCAL_WORLD_SIZE": str(place.ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        **system.environment(place),
    }
    output: IO[bytes] = log.open("wb")
    with output:
        return subprocess.Popen(
            ["taskset", "-c", ",".join(map(str, cores)), sys.executable, "-m", "bench.rank", str(config)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


class Run:
    """Folders and services of one measurement of one system; a context manager that leaves nothing behind."""

    def __init__(
        self, system: str, ranks: int, state_bytes: int, *, one_core: bool = False, share_cores: bool = False
    ) -> None:
        """With several ranks each has one core, unless they share all of them."""
        self.system = find(system)
        cores = sorted(os.sched_getaffinity(0))
        if one_core:
            self.cores = [[cores[0]]] * ranks
        elif ranks == 1 or share_cores:
            self.cores = [cores] * ranks
        else:
            self.cores = [[cores[rank % len(cores)]] for rank in range(ranks)]
        self.threads = len(cores) if ranks == 1 and not one_core else 1  # Of torch, in each rank.
        name = f"bench-{uuid.uuid4().hex[:12]}"
        self.folder = Path(tempfile.mkdtemp(prefix=name))
        self.memory = Path("/dev/shm") / name
        self.memory.mkdir()
        self.places = [
            Place(rank, ranks, name, str(self.folder), str(self.memory), state_bytes) for rank in range(ranks)
        ]
        self.groups: list[Group] = []
        self.services: list[Service] = []
        self._shared_before = shared_bytes()

    def __enter__(self) -> Run:
        try:
            self.services = self.system.services(self.places[0])
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self, phase: str, **extra: Any) -> Group:
        group = Group(self, phase, len(self.groups), extra)
        self.groups.append(group)
        return group

    def beyond(self, trainers: int) -> int:
        """Memory now, of all that this run has started, less `trainers`: what the ranks had with their states.

        Counts everybody's shared memory since the start: true on a machine that does nothing else.
        """
        sessions = {process.pid for group in self.groups for process in group.processes}
        sessions |= {service.pid for service in self.services if os.getsid(service.pid) == service.pid}
        return shared_bytes() - self._shared_before + _session_bytes(sessions) - trainers

    def held(self) -> int | None:
        """By the services' own account."""
        amounts = [service.memory() for service in self.services]
        known = [amount for amount in amounts if amount is not None]
        return sum(known) if known else None

    def close(self) -> None:
        for group in self.groups:
            group.kill()
        for service in self.services:
            service.stop()
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.rmtree(self.memory, ignore_errors=True)
        for left in self.memory.parent.glob(f"{self.memory.name}*"):
            left.unlink()  # Segments that a peer named after the run.


def state_bytes(scenario: str, ranks: int, scale: float) -> int:
    """Of one rank: the job's state is split over its ranks."""
    return expected_bytes(scenario, scale / ranks)
