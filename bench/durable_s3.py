"""The durable tier in an S3 store, against a server on loopback (bench/sink.py), beside other clients.

`client`: only the clients, and a server that keeps nothing. `whole`: from tensors to a step in the store and back, and
a server that keeps everything. The yardstick of both is aws-c-s3 alone: requests of 16 MiB from mapped memory, without
checksums, fragments of 256 KiB (a process has one size of fragment, so it is one of its own).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

import safepoint
from bench import contender
from bench.contender import Contender, Sample, Watch
from bench.durable_directory import WAIT_SECONDS, rotated, worker
from bench.launch import Failed
from bench.ours import EXTENT, Daemon
from bench.peers import not_installed
from bench.peers.stores import MEMORY_SERVER
from bench.scenarios import State, build, change, clear, digest, expected_bytes, size_of
from bench.sink import BUCKET, PROGRAMS, Sink, not_built

RANKS = 8
_FRAGMENT_KIB = "256"  # Of the yardstick.
# What is asked of whom, in one turn of each kind; the first of a kind is the yardstick.
CLIENT = {
    "upload1": [("client", "raw_put1"), ("ours", "put1"), ("obstore", "put1")],
    "upload8": [("client", "raw_put8"), ("ours", "put8"), ("obstore", "put8")],
    "download1": [("client", "raw_get1"), ("ours", "get1"), ("ours", "check1"), ("obstore", "get1")],
    "download8": [("client", "raw_get8"), ("ours", "get8"), ("ours", "check8"), ("obstore", "get8")],
}
WHOLE = {
    "save": [
        ("client", "raw_put1"),
        ("safepoint", "save"),
        ("safepoint8", "save"),
        ("obstore", "put1"),
        ("connector", "save"),
        ("aws", "save"),
    ],
    "load": [
        ("client", "raw_get1"),
        ("safepoint", "load"),
        ("safepoint8", "load"),
        ("obstore", "get1"),
        ("connector", "load"),
    ],
}
_SITES = {"obstore": "obstore", "connector": "s3torchconnector", "aws": "aws"}

Results = dict[str, Any]  # By "NAME WHAT": a list of samples, or why there is none.


def _eighth(rank: int, scale: float) -> State:
    """Of one tensor."""
    elements = expected_bytes("large", scale) // RANKS // 4
    return State({f"model{rank}": {"weight": torch.full((elements,), rank / 7)}, "step": 0})


class _Job:
    """`ranks` ranks of this process, and a daemon that drains what they save to `url`."""

    def __init__(self, folder: Path, url: str, ranks: int, scale: float) -> None:
        self._url = url
        self._states = [build("large", 0, scale)] if ranks == 1 else [_eighth(rank, scale) for rank in range(ranks)]
        size = sum(size_of(state)[0] for state in self._states)
        self._daemon = Daemon(folder, (3 * size // EXTENT + 4 * ranks + 8) * EXTENT, {"store": url, "retain": "1"})
        self._worker = worker(self._daemon.pid)
        self._step = 0
        self._threads = ThreadPoolExecutor(ranks)
        os.environ["SAFEPOINT_SOCKET"] = self._daemon.socket
        # A name of its own: a process goes on with the history of a name, wherever that was saved.
        name = f"bench-{ranks}"
        self._ranks = [safepoint.Checkpointer(name, rank=rank, world_size=ranks) for rank in range(ranks)]

    def _on_all(self, work: Callable[[int], None]) -> float:
        began = time.perf_counter()
        list(self._threads.map(work, range(len(self._ranks))))
        return time.perf_counter() - began

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)  # Not for one that nothing will come of.
        for checkpointer in self._ranks:
            checkpointer.close()
        self._daemon.stop()

    def ask(self, what: str) -> Sample:
        return {"save": self._save, "load": self._load}[what]()

    def _save(self) -> Sample:
        """Until the step is durable, from the first rank's call on. Processor and memory are the daemon's worker's."""
        self._step += 1
        for state in self._states:
            change(state, self._step)
        self._expected = [digest(state) for state in self._states]

        def save(rank: int) -> None:
            saved = self._ranks[rank].save(self._step, self._states[rank].tree, durable=True)
            saved.wait("durable", timeout=WAIT_SECONDS)

        with Watch(self._worker) as watch:
            seconds = self._on_all(save)
        return Sample(seconds, watch.cpu, watch.memory)

    def _load(self) -> Sample:
        """By this process, without the daemon."""
        for state in self._states:
            clear(state)

        def load(rank: int) -> None:
            safepoint.load_into(self._url, self._states[rank].tree, rank=rank, world_size=len(self._states))

        with Watch(os.getpid()) as watch:
            seconds = self._on_all(load)
        if [digest(state) for state in self._states] != self._expected:
            raise Failed("what was restored is not what was saved")
        return Sample(seconds, watch.cpu, watch.memory)


class _Field:
    """Contenders by name, with why the others are missing."""

    def __init__(self, results: Results) -> None:
        self._results = results
        self._contenders: dict[str, Contender | _Job] = {}
        self._missing: dict[str, str] = {}

    def add(self, name: str, start: Callable[[], Contender | _Job]) -> None:
        why = not_installed(_SITES[name]) if name in _SITES else None
        if why is None:
            self._contenders[name] = start()
        else:
            self._missing[name] = why

    def wait_until_ready(self) -> None:
        for one in self._contenders.values():
            if isinstance(one, Contender):
                one.wait_until_ready()

    def ask(self, name: str, what: str) -> None:
        """One that fails is not asked again."""
        key = f"{name} {what}"
        if name in self._missing:
            self._results[key] = self._missing[name]
            return
        try:
            self._results.setdefault(key, []).append(asdict(self._contenders[name].ask(what)))
        except (Failed, safepoint.SafepointError) as error:
            self._missing[name] = f"failed: {str(error).splitlines()[-1][:160]}"
            self._results[key] = self._missing[name]

    def stop(self) -> None:
        for one in self._contenders.values():
            if isinstance(one, _Job):
                one.close()
            else:
                one.stop()


@contextlib.contextmanager
def _folder(out: Path) -> Any:
    folder = out / "durable-bench"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    before = dict(os.environ)
    try:
        yield folder
    finally:
        os.environ.clear()
        os.environ.update(before)
        shutil.rmtree(folder, ignore_errors=True)


def _program(sink: Sink, name: str, scale: float, *more: str) -> list[str]:
    return [str(PROGRAMS / "s3_bench"), sink.url(name), str(expected_bytes("large", scale) >> 20), *more]


def _peer(name: str, scale: float, folder: Path, *more: str) -> Contender:
    arguments = [name, f"s3://{BUCKET}/{name}", str(scale), *more]
    return contender.python("bench.peers.stores", arguments, _SITES[name], folder / f"{name}-log")


def client(scale: float, rounds: int, out: Path, *, tls: bool) -> Results:
    """The first sample of each is the first of its process; `rounds` more follow."""
    results: Results = {}
    if why := not_built():
        return {f"{name} {what}": why for kind in CLIENT.values() for name, what in kind}
    with _folder(out) as folder:
        sink = Sink(folder / "sink", 64 << 20, discard=True, tls=tls)
        field = _Field(results)
        try:
            os.environ.update(sink.environment())
            yardstick = _program(sink, "client", scale, _FRAGMENT_KIB)
            field.add("client", partial(Contender, yardstick, folder / "client-log"))
            field.add("ours", partial(Contender, _program(sink, "ours", scale), folder / "ours-log"))
            field.add("obstore", partial(_peer, "obstore", scale, folder, "0"))
            field.wait_until_ready()
            for number in range(rounds + 1):
                for kind in CLIENT.values():
                    for name, what in rotated(kind, number):
                        field.ask(name, what)
        finally:
            field.stop()
            sink.stop()
    return results


def whole(scale: float, rounds: int, out: Path) -> Results:
    results: Results = {}
    if why := not_built():
        return {f"{name} {what}": why for kind in WHOLE.values() for name, what in kind}
    with _folder(out) as folder, contextlib.ExitStack() as services:
        size = expected_bytes("large", scale)
        sink = Sink(folder / "sink", 2 * size + (256 << 20))
        services.callback(sink.stop)
        os.environ.update(sink.environment())
        os.environ["SAFEPOINT_LAUNCH_ID"] = str(folder)  # Of the ranks that are threads of this process.
        field = _Field(results)
        services.callback(field.stop)
        if not_installed("aws") is None:
            from bench.peers.aws import Server

            server = Server(folder)
            services.callback(server.stop)
            os.environ[MEMORY_SERVER] = str(server.port)
        yardstick = _program(sink, "client", scale, _FRAGMENT_KIB)
        field.add("client", partial(Contender, yardstick, folder / "client-log"))
        for name, ranks in (("safepoint", 1), ("safepoint8", RANKS)):
            field.add(name, partial(_Job, folder / name, sink.url(name), ranks, scale))
        for name in _SITES:
            field.add(name, partial(_peer, name, scale, folder))
        field.wait_until_ready()
        loads = dict(WHOLE["load"])
        for number in range(rounds + 1):
            for name, what in rotated(WHOLE["save"], number):
                field.ask(name, what)
                if name in loads:
                    field.ask(name, loads[name])
                sink.clear("client/raw" if name == "client" else f"{name}/")  # What the client reads stays.
    return results
