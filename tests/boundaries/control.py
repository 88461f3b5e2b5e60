"""The control file that the recorder (recorder.cc) shares with all processes of one run."""

from __future__ import annotations

import ctypes
import mmap
import time
from dataclasses import dataclass
from pathlib import Path

EVENTS_MAX = 4096
TARGETS = {"trainer": 1, "worker": 2, "both": 3}


class _Event(ctypes.Structure):
    _fields_ = [
        ("ready", ctypes.c_uint32),
        ("after", ctypes.c_uint32),
        ("process", ctypes.c_char * 12),
        ("label", ctypes.c_char * 60),
    ]


class _Control(ctypes.Structure):
    _fields_ = [
        ("window", ctypes.c_uint32),
        ("armed", ctypes.c_uint32),
        ("at_occurrence", ctypes.c_uint32),
        ("at_after", ctypes.c_uint32),
        ("targets", ctypes.c_uint32),
        ("fired", ctypes.c_uint32),
        ("struck", ctypes.c_uint32),
        ("workers", ctypes.c_uint32),
        ("worker_pid", ctypes.c_int32),
        ("trainer_pid", ctypes.c_int32),
        ("events", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
        ("at_process", ctypes.c_char * 12),
        ("at_label", ctypes.c_char * 60),
        ("log", _Event * EVENTS_MAX),
    ]


@dataclass(frozen=True, order=True)
class EventKey:
    """One event of a run: the how-manieth of its kind in its process."""

    process: str
    label: str
    occurrence: int


@dataclass(frozen=True)
class Point:
    """Where to strike, and whom: a key of TARGETS."""

    event: EventKey
    after: bool
    target: str

    def __str__(self) -> str:
        side = "after" if self.after else "before"
        return f"kill {self.target} {side} {self.event.process} {self.event.label} ({self.event.occurrence})"


class Control:
    """Owned by the process that plays one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("wb") as file:
            file.truncate(ctypes.sizeof(_Control))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), ctypes.sizeof(_Control))
        self.raw = _Control.from_buffer(self._map)

    def arm(self, point: Point) -> None:
        self.raw.at_process = point.event.process.encode()
        self.raw.at_label = point.event.label.encode()
        self.raw.at_occurrence = point.event.occurrence
        self.raw.at_after = int(point.after)
        self.raw.targets = TARGETS[point.target]
        self.raw.armed = 1

    def open_window(self) -> None:
        self.raw.events = 0
        self.raw.window += 1

    def close_window(self) -> None:
        self.raw.window += 1

    def events(self) -> list[tuple[EventKey, bool]]:
        """What was logged since the window was opened, in order; true: after the event."""
        counts: dict[tuple[str, str], int] = {}
        found: list[tuple[EventKey, bool]] = []
        assert self.raw.events <= EVENTS_MAX
        for event in self.raw.log[: self.raw.events]:
            kind = (event.process.decode(), event.label.decode())
            if not event.after:
                counts[kind] = counts.get(kind, 0) + 1
            found.append((EventKey(*kind, counts.get(kind, 0)), bool(event.after)))
        return found

    def wait_for(self, key: EventKey, seconds: float = 10.0) -> bool:
        """Until the event was logged, or the point was struck, after which it may never come."""
        deadline = time.monotonic() + seconds
        while (key, False) not in self.events():
            if self.raw.fired or time.monotonic() > deadline:
                return False
            time.sleep(0.0005)
        return True
