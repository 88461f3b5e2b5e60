"""One run: a fresh daemon, a scenario with at most one kill in it, a resumed launch, and what was seen of it."""

from __future__ import annotations

import collections
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torchless  # noqa: F401
from control import Control, EventKey, Point
from grader import Observation, Restored
from trainer import WORLD, Reply, Trainer

from safepoint import _core
from safepoint.errors import SafepointError

Left = dict[str, Any]

EXTENT = 1 << 20
SHARD_EXTENTS = 2
BINARY = Path(_core.__file__).parent / "bin" / "safepointd"
SETTLE_S = 8.0  # Within this after the last process of a launch is gone, nothing of it may be left.
QUIET_S = 0.2  # A recording ends when nothing happened for so long.
FIRE_S = 3.0  # An armed event that did not come by then, after its scenario is through, does not come.
KILL_TOLD_S = 1.0  # From the death of a rank to the recorder's word for it.
ENDED_BY_OTHERS = ("Closed", "Incomplete")  # What a rank may be told when the other one is dead.


class Daemon:
    """Keeper and worker under the recorder, with their files in `folder`."""

    def __init__(self, folder: Path, binary: Path, retain: int, pool: int, prefault: int) -> None:
        self.folder = folder
        self.socket = str(folder / "d.sock")
        self.state = folder / "state"
        settings = {
            "socket": self.socket,
            "state-dir": str(self.state),
            "pool": str(pool),
            "pool-prefault": str(prefault),
            "extent": str(EXTENT),
            "ledger": "1MiB",
            "http": "off",
            "log-file": str(folder / "log"),
            "lock-memory": "off",
            "retain": str(retain),
        }
        self.process = subprocess.Popen(
            [str(binary), *(f"--{name}={value}" for name, value in settings.items())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=(folder / "stderr").open("w"),
        )
        self.connect(20.0).close()

    def connect(self, seconds: float = 8.0) -> _core.Client:
        """Raises SafepointError when the daemon cannot be reached within the time."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                return _core.Client(self.socket, client_name="watcher", deadline=seconds)
            except SafepointError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.005)  # Between two looks at a process that is starting.

    def children(self) -> list[int]:
        pid = self.process.pid
        if self.process.poll() is not None:
            return []
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def kill_worker(self) -> None:
        """Returns when it is dead."""
        [pid] = self.children()
        watch = os.pidfd_open(pid)
        os.kill(pid, signal.SIGKILL)
        select.select([watch], [], [])
        os.close(watch)

    def signal_worker(self, number: int) -> None:
        for pid in self.children():
            os.kill(pid, number)

    def events(self, level: str) -> list[str]:
        """Names of the events logged with this severity."""
        lines = (self.folder / "log").read_text().splitlines() if (self.folder / "log").exists() else []
        found = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
        return [str(line.get("event")) for line in found if line.get("level") == level]

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@dataclass(frozen=True)
class Scenario:
    """`prepare` goes before the window, `play` is in it, `finish` comes after it."""

    name: str
    title: str
    retain: int
    prior: tuple[int, ...]  # Steps that an earlier launch, dead by now, has saved.
    prefault: bool
    prepare: Callable[[Run], None]
    play: Callable[[Run], None]
    finish: Callable[[Run], None]

    @property
    def pool(self) -> int:
        """Room for what is retained and one step in the making, and for nothing else."""
        return (self.retain + 1) * WORLD * SHARD_EXTENTS * EXTENT


@dataclass
class Result:
    scenario: str
    point: Point | None
    seen: Observation
    events: list[tuple[EventKey, bool]]
    left: Left  # In the end, after everything settled.
    fired: bool
    void: bool  # The point came, but a target was dead already: nothing to grade.
    seconds: float


class Run:
    def __init__(
        self,
        scenario: Scenario,
        folder: Path,
        baseline: Left | None = None,
        binary: Path = BINARY,
        sabotage: str | None = None,
    ) -> None:
        """`baseline`: what a run without a kill leaves. `sabotage`: a key of SABOTAGES."""
        folder.mkdir(parents=True)
        self.scenario = scenario
        self.baseline = baseline
        self.sabotage = sabotage
        self.stale_copies = False
        self.listed = False
        self.extra: Trainer | None = None
        self.seen = Observation(prior=list(scenario.prior), retain=scenario.retain)
        self.control = Control(folder / "control")
        os.environ["BOUNDARY_CONTROL"] = str(self.control.path)
        try:
            self.daemon = Daemon(
                folder, binary, scenario.retain, scenario.pool, scenario.pool if scenario.prefault else 0
            )
        finally:
            del os.environ["BOUNDARY_CONTROL"]
        self.trainers: list[Trainer] = []
        self.out: set[int] = set()  # Ranks that have stopped: dead, or told that their attempt is closed.
        self.step = max(scenario.prior, default=0) + 1
        self.victim = 0  # The rank that a strike at the trainer hits.
        self.worker_kills = 0  # By the scenario itself.
        self.rank_kills = 0

    # --- commands of a launch
    def launch(self, name: str, recorded: bool) -> None:
        nonce = name.encode().ljust(16, b".")
        self.out = set()
        self.trainers = [
            Trainer(rank, nonce, self.daemon.socket, self.control.path if recorded else None) for rank in range(WORLD)
        ]

    def end_launch(self) -> None:
        for trainer in self.trainers:
            trainer.end()
        self.trainers = []

    @property
    def struck(self) -> bool:
        return bool(self.control.raw.fired)

    @property
    def rank_killed(self) -> bool:
        return self.rank_kills > 0 or bool(self.control.raw.struck & 1)

    def rank_is_dead(self) -> bool:
        """As `rank_killed`, but for the moment in which a rank is dead, others have heard of it, and the recorder has
        not said so yet."""
        end = time.monotonic() + KILL_TOLD_S
        while not self.rank_killed and time.monotonic() < end:
            time.sleep(0.005)
        return self.rank_killed

    def post(self, rank: int, command: str, /, **arguments: object) -> None:
        if rank not in self.out:
            self.trainers[rank].post(command, **arguments)

    def reply(self, rank: int, command: str, also: tuple[str, ...] = (), never_was: bool = False) -> Any:
        """The value, or None when the rank has stopped. `also`: errors that a dead rank causes in the other one.

        `never_was`: that there never was a step is an answer, too, and is None.
        """
        if rank in self.out:
            return None
        answer: Reply = self.trainers[rank].reply()
        if "ok" in answer:
            return answer["ok"]
        if never_was and answer.get("error") == "NotFound":
            return None
        self.out.add(rank)
        who = f"rank {rank} {command}"
        if "stall" in answer:
            self.seen.stalled.append(f"{who}: no answer")
        elif "dead" in answer:
            if rank != self.victim or not self.struck:
                self.seen.needs_human.append(f"{who}: the process died")
        elif not (answer["error"] in (*ENDED_BY_OTHERS, *also) and self.rank_is_dead()):
            text = f"{who}: {answer['error']}: {answer['text']}"
            where = {
                "DeadlineExceeded": self.seen.stalled,
                "Unavailable": self.seen.stalled,
                "Corrupt": self.seen.unreadable,
                "Lost": self.seen.lost,
            }
            where.get(answer["error"], self.seen.needs_human).append(text)
        return None

    def do(self, rank: int, command: str, /, **arguments: object) -> Any:
        self.post(rank, command, **arguments)
        return self.reply(rank, command)

    def both(self, command: str, /, **arguments: object) -> None:
        for rank in range(WORLD):
            self.do(rank, command, **arguments)

    def saved(self, step: int, complete: bool) -> None:
        if complete:
            self.seen.completed = max(self.seen.completed, step)

    def wait_memory(self, rank: int, post: bool = True) -> None:
        if post:
            # The daemon cannot know of a rank that died before it said anything: then there is only the deadline.
            self.post(rank, "wait", seconds=0.3 if self.rank_killed else None)
        self.saved(self.step, self.reply(rank, "wait", also=("DeadlineExceeded",)) is not None)

    def save_whole(self, step: int) -> bool:
        """Without boundaries to look at; the trainers are connected. Whether it reached level memory."""
        self.both("open")
        self.both("reserve", step=step)
        for half in (1, 2):
            self.both("copy", half=half, stale=self.stale_copies)
        self.both("seal")
        return all(self.do(rank, "wait", seconds=None) is not None for rank in range(WORLD))

    # --- the whole run
    def play(self, point: Point | None) -> Result:
        begun = time.monotonic()
        try:
            self._prior()
            self.scenario.prepare(self)
            if point:
                self.control.arm(point)
            self.control.open_window()
            self.scenario.play(self)
            self._settle(point)
            self.control.close_window()
            self.scenario.finish(self)
            events = self.control.events()
            manifest = [after for key, after in events if key.label == "commits Manifest to the ledger"]
            self.saved(self.step, True in manifest)
            self.end_launch()
            if self.sabotage:
                SABOTAGES[self.sabotage](self)
            self._resume()
            self.daemon.signal_worker(signal.SIGCONT)
            left = self._silence()
        except (SafepointError, AssertionError, OSError) as error:
            self.seen.needs_human.append(f"watcher: {type(error).__name__}: {error}")
            events, left = self.control.events(), {}
        finally:
            self.end_launch()
            if self.extra:
                self.extra.end()
            self.daemon.stop()
        fired = self.struck
        void = fired and self.control.raw.struck != self.control.raw.targets
        return Result(self.scenario.name, point, self.seen, events, left, fired, void, time.monotonic() - begun)

    def _prior(self) -> None:
        if not self.scenario.prior:
            return
        self.launch("earlier", recorded=False)
        self.both("connect")
        self.control.open_window()
        saved = [self.save_whole(step) for step in self.scenario.prior]
        # Each seal is checked, and the marker is written once: then no work of this launch is left for the window.
        checks = len(self.scenario.prior) * WORLD + 1
        saved.append(self.control.wait_for(EventKey("worker 1", "ends a check", checks)))
        self.control.close_window()
        self.end_launch()
        watcher = self.daemon.connect()
        self._wait_until(lambda: json.loads(watcher.status())["sessions"] == 1, "the earlier launch is still known")
        watcher.close()
        self.seen.prior = list(self.scenario.prior[-self.scenario.retain :])
        assert all(saved), self.seen

    def _settle(self, point: Point | None) -> None:
        """The worker may have work left that no trainer waits for: a marker, a retirement."""
        deadline = time.monotonic() + FIRE_S
        if point:
            while not self.struck and time.monotonic() < deadline:
                time.sleep(0.002)
            return
        self._quiet(lambda: self.control.raw.events)

    def _resume(self) -> None:
        """A new launch restores the newest step and saves the next one; everything that is listed is read."""
        self.launch("resumed", recorded=False)
        self.both("connect")
        for rank in range(WORLD):
            restored = self._restore(rank)
            if rank not in self.out:
                self.seen.restored[rank] = restored
        at = max([r.step for r in self.seen.restored.values() if r], default=0)
        if not self.out and self.save_whole(at + 1):
            self.seen.resumed = at + 1
        self._read_all()
        for rank in range(WORLD):
            self.do(rank, "bye")
        self.end_launch()

    def _restore(self, rank: int) -> Restored | None:
        self.post(rank, "open_read")
        info = self.reply(rank, "open_read", never_was=True)
        if not info:
            return None
        for other in range(WORLD):
            self.seen.wrong += self.do(rank, "verify", rank=other) or []
        self.do(rank, "unpin")
        return Restored(info["generation"], info["step"], info["attempt"])

    def _read_all(self) -> None:
        listed = self.do(0, "listed")
        self.listed = listed is not None
        for info in listed or []:
            if info["state"] != "complete":
                continue
            self.seen.listed.append(info["step"])
            if self.do(0, "open_read", attempt=info["attempt"]) is None:
                self.seen.unreadable.append(f"step {info['step']} is listed and cannot be opened")
                return
            for rank in range(WORLD):
                self.seen.wrong += self.do(0, "verify", rank=rank) or []
            self.do(0, "unpin")

    # --- what is left
    def _silence(self) -> Left:
        """Waits until nothing of the launches is left; what remains then goes into the observation."""
        if (code := self.daemon.process.poll()) is not None:
            self.seen.needs_human.append(f"the keeper ended with {code}")
            return {}
        watcher = self.daemon.connect()  # The only connection from here on, so that it counts the same everywhere.
        deadline = time.monotonic() + SETTLE_S
        while (leaked := self._leaked(watcher)) and time.monotonic() < deadline:
            time.sleep(0.01)
        self.seen.leaked += leaked
        struck = 1 if self.control.raw.struck & 2 else 0
        errors = collections.Counter(self.daemon.events("error"))
        # Killed before it was a program of its own, it "was not started" and is not counted as an incarnation.
        unborn = errors.pop("worker_not_started", 0)
        starts = json.loads(watcher.status())["incarnation"]
        if unborn > struck or starts != 1 + self.worker_kills + struck - unborn:
            self.seen.needs_human.append(
                f"{starts} workers were started and {unborn} were not, for {self.worker_kills + struck} kills"
            )
        if errors:
            self.seen.needs_human.append(f"errors in the daemon's log: {sorted(errors)}")
        self.seen.marker = any((self.daemon.state / "markers").iterdir())
        left = self._left(watcher)
        watcher.close()
        return left

    def _leaked(self, watcher: _core.Client) -> list[str]:
        state = json.loads(watcher.status())
        sealed = len(self.seen.listed) * WORLD * SHARD_EXTENTS * EXTENT
        wanted = {"leased": 0, "zombie": 0, "pending": 0, "idle": 0, "creating": 0}
        if self.listed:
            wanted["sealed"] = sealed
        pool = state["pool"]
        found = [f"pool {key}: {pool[key]} bytes, not {value}" for key, value in wanted.items() if pool[key] != value]
        counts = {"connections": 1, "sessions": 1, "read_pins": 0}
        found += [f"{state[key]} {key}, not {value}" for key, value in counts.items() if state[key] != value]
        if open_leases := state["totals"]["open_leases"]:
            found.append(f"{open_leases} open leases")
        if self.baseline is not None:
            left = self._left(watcher)
            found += [
                f"{key}: {left[key]}, without a kill {value}"
                for key, value in self.baseline.items()
                if left[key] != value
            ]
        return found

    def _left(self, watcher: _core.Client) -> Left:
        """What could leak and no status tells."""
        extents = json.loads(watcher.status())["pool"]["bytes"] // EXTENT
        [worker] = self.daemon.children()
        return {
            "keeper descriptors": _descriptors(self.daemon.process.pid) - extents,
            "worker descriptors": _descriptors(worker) - extents,
            "worker threads": len(os.listdir(f"/proc/{worker}/task")),
            "files": sorted(_shape(path, self.daemon.folder) for path in self.daemon.folder.rglob("*")),
        }

    def _quiet(self, look: Callable[[], object]) -> None:
        """Until `look` gives the same for QUIET_S."""
        deadline = time.monotonic() + FIRE_S
        value, since = look(), time.monotonic()
        while time.monotonic() < min(deadline, since + QUIET_S):
            time.sleep(0.005)
            if (new := look()) != value:
                value, since = new, time.monotonic()

    def _wait_until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + SETTLE_S
        while not condition():
            assert time.monotonic() < deadline, what
            time.sleep(0.002)


def _descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def _shape(path: Path, folder: Path) -> str:
    """The path, with every name that is a hash called so."""
    name = str(path.relative_to(folder))
    return "state/markers/HASH" if path.parent.name == "markers" and len(path.name) == 64 else name


# --- the scenarios


def _nothing(_run: Run) -> None:
    pass


def _new_launch(run: Run) -> None:
    run.launch("victim", recorded=True)
    run.control.raw.trainer_pid = run.trainers[run.victim].pid


def _save(run: Run) -> None:
    run.both("connect")
    run.both("open")
    run.both("reserve", step=run.step)
    for half in (1, 2):
        run.both("copy", half=half)
    run.saved(run.step, run.do(0, "seal") is True)
    # Rank 0 waits while rank 1 completes the step.
    run.post(0, "wait", seconds=None)
    if 0 not in run.out:
        run.control.wait_for(EventKey("worker 1", "receives Wait", 1))
    run.saved(run.step, run.do(1, "seal") is True)
    run.wait_memory(0, post=False)
    run.wait_memory(1)


def _restore(run: Run) -> None:
    run.both("connect")
    got = [run.do(rank, "open_read") for rank in range(WORLD)]
    if all(got) and got[0] != got[1]:
        run.seen.diverged.append(f"ranks of one launch restore different attempts: {got}")
    for rank in range(WORLD):
        for shard in (rank, 1 - rank):
            run.do(rank, "header", rank=shard)
            for part in range(2):
                run.do(rank, "read", part=part, parts=2)
            run.seen.wrong += run.do(rank, "judge", rank=shard) or []
    run.both("unpin")
    run.both("bye")


def _before_restart(run: Run) -> None:
    """Rank 0 has an open lease with half of its bytes, rank 1 holds a step for reading."""
    _new_launch(run)
    run.both("connect")
    run.both("open")
    run.do(0, "reserve", step=run.step)
    run.do(0, "copy", half=1)
    run.do(1, "open_read")
    run.do(1, "header", rank=1)


def _restart(run: Run) -> None:
    run.daemon.kill_worker()
    run.worker_kills += 1
    run.do(0, "copy", half=2)
    run.do(0, "seal")
    run.do(1, "header", rank=0)
    run.do(1, "read", part=0, parts=1)
    run.seen.wrong += run.do(1, "judge", rank=0) or []
    run.do(1, "unpin")


def _after_restart(run: Run) -> None:
    """The save that the restart interrupted goes on."""
    run.do(1, "reserve", step=run.step)
    for half in (1, 2):
        run.do(1, "copy", half=half)
    run.saved(run.step, run.do(1, "seal") is True)
    for rank in range(WORLD):
        run.wait_memory(rank)


def _before_death(run: Run) -> None:
    """Rank 1 has sealed, rank 0 has half of its bytes; rank 1 is the trainer that can be struck."""
    run.victim = 1
    _new_launch(run)
    run.both("connect")
    run.both("open")
    run.both("reserve", step=run.step)
    for half in (1, 2):
        run.do(1, "copy", half=half)
    run.do(1, "seal")
    run.do(0, "copy", half=1)


def _death(run: Run) -> None:
    """Rank 0 dies while rank 1 waits, which is told so; the step is closed."""
    run.post(1, "wait", seconds=None)
    run.control.wait_for(EventKey("worker 1", "receives Wait", 1))
    run.trainers[0].end()
    run.out.add(0)
    run.rank_kills += 1
    if run.reply(1, "wait") is not None:
        run.seen.unreadable.append(f"step {run.step} was called complete without rank 0")


SCENARIOS = (
    Scenario("first save", "2 ranks, new namespace, empty pool", 2, (), False, _new_launch, _save, _nothing),
    Scenario("save", "2 ranks, full pool, extents recycled", 1, (1, 2), True, _new_launch, _save, _nothing),
    Scenario("restore", "2 ranks read both shards", 2, (1, 2), True, _new_launch, _restore, _nothing),
    Scenario(
        "worker restart", "open lease, read pin, 2 steps", 2, (1, 2), True, _before_restart, _restart, _after_restart
    ),
    Scenario("rank's death", "rank 1 has sealed, rank 0 dies", 2, (1, 2), True, _before_death, _death, _nothing),
)


# --- what the watcher must notice in a real run: each a damage done between the launch and the one that resumes


def _kill_keeper(run: Run) -> None:
    run.daemon.process.kill()
    run.daemon.process.wait()


def _remove_marker(run: Run) -> None:
    for marker in (run.daemon.state / "markers").iterdir():
        marker.unlink()


def _copy_stale(run: Run) -> None:
    run.stale_copies = True


def _flip_bits(run: Run) -> None:
    """One in every extent."""
    folder = Path(f"/proc/{run.daemon.process.pid}/fd")
    for path in folder.iterdir():
        if "safepoint-extent" in os.readlink(path):
            with path.open("r+b") as extent:
                extent.seek(5 * 4096)
                byte = extent.read(1)[0]
                extent.seek(5 * 4096)
                extent.write(bytes([byte ^ 1]))


def _roll_back(run: Run) -> None:
    """An operator's step back, of which the watcher knows nothing."""
    operator = Trainer(0, b"operator".ljust(16, b"."), run.daemon.socket)
    operator.call("connect")
    oldest = operator.call("listed")["ok"][-1]
    operator.call("open", parent=oldest["attempt"])
    operator.end()


def _keep_pin(run: Run) -> None:
    run.extra = Trainer(0, b"extra".ljust(16, b"."), run.daemon.socket)
    run.extra.call("connect")
    run.extra.call("open_read")


def _stop_worker(run: Run) -> None:
    run.daemon.signal_worker(signal.SIGSTOP)


SABOTAGES: dict[str, Callable[[Run], None]] = {
    "HARD_FAIL": _kill_keeper,
    "SILENT_DIVERGENCE": _remove_marker,
    "WRONG_BYTES": _copy_stale,
    "FALSE_COMPLETE": _flip_bits,
    "LOST_WORK": _roll_back,
    "LEAK": _keep_pin,
    "STALL": _stop_worker,
}
