"""Fails the N-th call, then all from the N-th on, N = 1, 2, ... until clean (F50, F51; docs/internals/faults.md).

    python tests/faults/fail_nth.py                       # everything; how long it takes: see there
    python tests/faults/fail_nth.py --scenario save --role trainer --function alloc
    python tests/faults/fail_nth.py --sample 3            # every case, but of each only the first, middle and last call
    python tests/faults/fail_nth.py --profile             # only how often each function is called

One run: a scenario (save, restore, worker restart, daemon start) is played by real processes while one function fails
in one of them. Judged after each run, with nothing failing any more:

HANG            the trainer did not end within its deadline
TRAINER_KILLED  the trainer ended by a signal or an abort: the library must never do that
VIOLATION       what the trainer itself saw: an exception, an error without a message, wrong bytes, a client that stays
                spoilt, descriptors, threads or mappings that are left
DAEMON_GONE     the keeper ended, or did not serve; at start it may end, with a message and a non-zero exit code
LOST_WORK       an acknowledged step is not listed, or the newest listed one is older
WRONG_BYTES     a listed step does not verify byte for byte
LEAK            leases, slots or descriptors are left when everybody has gone

Prints a line per case and a table; exit 0 only when every run passed.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import mmap
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "release"
LIBRARY = BUILD / "tests" / "faults" / "libfail_nth.so"
TRAINER = BUILD / "tests" / "faults" / "fault_trainer"
DAEMON = BUILD / "src" / "node" / "safepointd"

ROLES = {"trainer": 1, "worker": 2, "keeper": 3}
SCENARIOS = ("save", "restore", "restart", "start")
MODES = ("once", "on")
HANG_S = 60.0
SHORT = -1

# What each call may plausibly answer. Those with a "!" pass by: "from then on" they would mean a broken kernel.
ERRORS: dict[str, tuple[str, ...]] = {
    "alloc": ("ENOMEM",),
    "memfd_create": ("ENOMEM", "EMFILE", "ENFILE"),
    "ftruncate": ("!EINTR", "ENOMEM", "EIO"),
    "fallocate": ("!EINTR", "ENOSPC"),
    "mmap": ("ENOMEM", "EAGAIN"),
    "munmap": ("ENOMEM",),
    "madvise": ("ENOMEM", "EINVAL", "!EINTR", "EFAULT"),
    "mlock": ("ENOMEM", "EAGAIN"),
    "fcntl": ("EMFILE", "EPERM"),
    "socket": ("EMFILE", "ENFILE", "ENOBUFS", "ENOMEM"),
    "socketpair": ("EMFILE", "ENFILE"),
    "connect": ("ECONNREFUSED", "!EINTR", "!EAGAIN"),
    "bind": ("EADDRINUSE", "EACCES", "ENOSPC"),
    "listen": ("EADDRINUSE",),
    "accept4": ("EMFILE", "ENFILE", "!EINTR", "!ECONNABORTED", "ENOMEM"),
    "accept": ("EMFILE", "!ECONNABORTED"),
    "sendmsg": ("ENOBUFS", "EPIPE", "!EINTR", "!EAGAIN", "ETOOMANYREFS", "ENOMEM"),
    "recvmsg": ("ECONNRESET", "!EINTR", "!EAGAIN", "ENOMEM", "ENOBUFS"),
    "read": ("EIO", "!EINTR", "!SHORT"),
    "write": ("ENOSPC", "EIO", "!EINTR", "!SHORT"),
    "pread": ("EIO", "!EINTR", "!SHORT", "ENOMEM"),
    "pwrite": ("ENOSPC", "EIO", "!EINTR", "!SHORT"),
    "epoll_create1": ("EMFILE", "ENFILE", "ENOMEM"),
    "epoll_ctl": ("ENOMEM", "ENOSPC"),
    "epoll_wait": ("!EINTR",),
    "poll": ("!EINTR", "ENOMEM"),
    "ppoll": ("!EINTR", "ENOMEM"),
    "eventfd": ("EMFILE", "ENFILE", "ENOMEM"),
    "signalfd": ("EMFILE", "ENFILE", "ENOMEM"),
    "timerfd_create": ("EMFILE",),
    "timerfd_settime": ("ENOMEM",),
    "syscall": ("EMFILE", "ENOMEM", "ENOSYS"),
    "open": ("EMFILE", "ENFILE", "EACCES", "!EINTR", "ENOSPC", "EIO"),
    "close": ("!EINTR", "EIO"),
    "fsync": ("EIO", "ENOSPC", "!EINTR"),
    "fchmod": ("EIO", "EROFS"),
    "chmod": ("EIO", "EROFS"),
    "stat": ("EIO", "EACCES"),
    "fstat": ("EIO", "ENOMEM"),
    "lstat": ("EIO", "EACCES"),
    "rename": ("EIO", "ENOSPC"),
    "unlink": ("EIO", "EROFS"),
    "mkdir": ("EIO", "ENOSPC", "EACCES"),
    "flock": ("ENOLCK", "!EINTR"),
    "fork": ("EAGAIN", "ENOMEM"),
    "execve": ("ENOMEM", "EIO"),
    "waitpid": ("!EINTR",),
    "kill": ("EPERM",),
    "dup2": ("!EINTR", "EMFILE"),
    "pipe2": ("EMFILE", "ENFILE"),
    "setsid": ("EPERM",),
    "prctl": ("EINVAL",),
    "pthread_create": ("EAGAIN",),
    "getrandom": ("!EINTR",),
    "getsockopt": ("ENOMEM", "EMFILE", "ESRCH"),
    "setsockopt": ("ENOMEM",),
    "getrlimit": ("EPERM",),
    "setrlimit": ("EPERM",),
    "ioctl": ("ENOTTY",),
    "sched_getaffinity": ("EINVAL",),
}


@dataclass(frozen=True)
class Case:
    scenario: str
    role: str
    function: str
    mode: str
    error: str

    def __str__(self) -> str:
        return f"{self.scenario}/{self.role}/{self.function}/{self.mode}/{self.error}"


def all_cases() -> Iterator[Case]:
    for scenario in SCENARIOS:
        for role in ROLES:
            for function, errors in ERRORS.items():
                for error in errors:
                    for mode in MODES:
                        if not (error.startswith("!") and mode == "on"):
                            yield Case(scenario, role, function, mode, error.lstrip("!"))


@dataclass
class Verdict:
    injected: int
    problems: list[str]
    site: list[int] = field(default_factory=list)
    seconds: float = 0.0


def build() -> None:
    """The library, the trainer and a daemon of the same build; quick when nothing has changed."""
    cmake = Path(sys.executable).with_name("cmake")
    program = str(cmake) if cmake.exists() else "cmake"
    jobs = os.environ.get("JOBS", "2")
    subprocess.run([program, "--preset", "release"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    subprocess.run([program, "--build", str(BUILD), "--target", "faults", "-j", jobs], cwd=ROOT, check=True)


class Control:
    """The block that the library and the trainer map, too (fail_nth.h)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.layout = json.loads(subprocess.run([TRAINER, "layout"], check=True, capture_output=True).stdout)
        self.functions: list[str] = self.layout["functions"]
        path.write_bytes(struct.pack("<I", self.layout["magic"]).ljust(self.layout["size"], b"\0"))
        with path.open("r+b") as file:
            self.memory = mmap.mmap(file.fileno(), self.layout["size"])

    def put(self, name: str, value: int) -> None:
        wide = name in ("n", "calls", "injected")
        struct.pack_into("<q" if wide else "<i", self.memory, self.layout[name], value)

    def get(self, name: str) -> int:
        value: int = struct.unpack_from("<q", self.memory, self.layout[name])[0]
        return value

    def choose(self, case: Case, n: int) -> None:
        self.put("armed", 0)
        for name in ("calls", "injected"):
            self.put(name, 0)
        self.put("role", ROLES[case.role])
        self.put("function", self.functions.index(case.function))
        self.put("error", SHORT if case.error == "SHORT" else getattr(errno, case.error))
        self.put("from_then_on", int(case.mode == "on"))
        self.put("n", n)

    def arm(self, on: bool) -> None:
        self.put("armed", int(on))

    def profile(self, role: str) -> dict[str, int]:
        count = len(self.functions)
        values = struct.unpack_from(f"<{count}Q", self.memory, self.layout["profile"] + 8 * count * ROLES[role])
        return {name: value for name, value in zip(self.functions, values, strict=True) if value}

    def site(self) -> list[int]:
        depth = self.layout["depth"]
        return [at for at in struct.unpack_from(f"<{depth}Q", self.memory, self.layout["site"]) if at]


def tail(path: Path) -> str:
    return path.read_text(errors="replace")[-1500:] if path.exists() else ""


class Node:
    """A small daemon, restarted only when it is gone or was spoilt on purpose."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700, parents=True)
        self.folder = folder
        self.socket = str(folder / "d.sock")
        self.stderr = folder / "stderr"
        self.acked: list[int] = []  # What trainers were told, oldest first; this daemon's steps only.
        self.descriptors: dict[str, int] = {}
        with self.stderr.open("w") as stderr:
            self.process = subprocess.Popen(
                [str(DAEMON), *self.flags(folder)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
            )

    @staticmethod
    def flags(folder: Path) -> list[str]:
        settings = {
            "socket": folder / "d.sock",
            "state-dir": folder / "state",
            "pool": "64MiB",
            "extent": "1MiB",
            "pool-prefault": "0",
            "ledger": "1MiB",
            "http": "127.0.0.1:0",
            "lock-memory": "best-effort",
            "grace": "2s",
            "retain": "2",
            # A session that cannot be watched, for want of a descriptor, ends so long after its process fell silent.
            "lease": "2s",
        }
        return [f"--{name}={value}" for name, value in settings.items()]

    def worker(self) -> int:
        keeper = self.process.pid
        children = Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()
        return int(children[0]) if children else 0

    def count_descriptors(self, who: str) -> int:
        pid = self.process.pid if who == "keeper" else self.worker()
        try:
            return len(os.listdir(f"/proc/{pid}/fd"))
        except FileNotFoundError:
            return 0

    def stop(self) -> int | None:
        """None: it had to be killed."""
        if self.process.poll() is None:
            self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(timeout=15)
        self.process.kill()
        self.process.wait()
        return None


class Campaign:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.control = Control(folder / "control")
        self.environment = os.environ | {"LD_PRELOAD": str(LIBRARY), "SP_FAIL_NTH": str(self.control.path)}
        self.clean = {k: v for k, v in os.environ.items() if k not in ("LD_PRELOAD", "SP_FAIL_NTH")}
        self.node: Node | None = None
        self.number = 0
        self.step = 0

    def close(self) -> None:
        if self.node is not None:
            self.node.stop()
            self.node = None

    def fresh_node(self) -> Node:
        self.close()
        self.number += 1
        self.node = Node(self.folder / f"n{self.number % 8}", self.environment)
        return self.node

    def trainer(self, scenario: str, *words: object, faults: bool, daemon: Sequence[str] = ()) -> tuple[int, list[str]]:
        """Exit status (None: it hung and was killed) and its events."""
        self.step += 10
        command = [str(TRAINER), scenario, str(words[0]), str(self.step), *map(str, words[1:]), *daemon]
        process = subprocess.Popen(
            command,
            env=self.environment if faults else self.clean,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        try:
            output, complaint = process.communicate(timeout=HANG_S)
        except subprocess.TimeoutExpired:
            process.kill()
            output, complaint = process.communicate()
            return -1000, [*output.splitlines(), complaint]
        return process.returncode, [*output.splitlines(), *(f"stderr {line}" for line in complaint.splitlines())]

    def run(self, case: Case, n: int) -> Verdict:
        began = time.monotonic()
        self.control.choose(case, n)
        problems = self.play_start(case) if case.scenario == "start" else self.play(case)
        injected = self.control.get("injected")
        if problems:
            self.close()
        return Verdict(injected, problems, self.control.site(), time.monotonic() - began)

    # --- one run
    def play(self, case: Case) -> list[str]:
        node = self.node
        fresh = node is None or node.process.poll() is not None or (case.role == "keeper" and case.scenario == "save")
        if fresh or node is None:
            node = self.fresh_node()
            problems = self.check(node)
            if problems:
                return ["without faults: " + problem for problem in problems]
        foreign = case.role != "trainer"
        deadline = 400 if case.mode == "on" else 2000
        status, events = self.trainer(
            case.scenario, node.socket, node.process.pid, deadline, int(foreign and case.mode == "on"), faults=True
        )
        self.control.arm(False)
        problems = judge_trainer(status, events)
        node.acked += [int(line.split()[1]) for line in events if line.startswith("acked ")]
        if node.process.poll() is not None:
            return [*problems, f"DAEMON_GONE exit {node.process.returncode}: {tail(node.stderr)}"]
        return problems + self.check(node)

    def play_start(self, case: Case) -> list[str]:
        if case.role == "trainer":
            return self.play_private(case)
        self.close()
        self.control.arm(True)
        node = self.fresh_node()
        patience = time.monotonic() + (0.6 if case.mode == "on" else 5.0)
        while node.process.poll() is None and time.monotonic() < patience and not self.serves(node):
            time.sleep(0.01)  # Between two looks at a process that is starting; nothing is judged by it.
        self.control.arm(False)
        if node.process.poll() is None:
            # A start that fails may take until now; one that does not serves in the end.
            problems = self.check(node)
            if node.process.poll() is None:
                return problems
        if node.process.returncode == 0 or not tail(node.stderr).strip():
            return [f"DAEMON_GONE at start without a word: exit {node.process.returncode}"]
        return []

    def serves(self, node: Node) -> bool:
        return "worker_serving" in tail(node.stderr)

    def play_private(self, case: Case) -> list[str]:
        """The trainer starts its own daemon."""
        self.number += 1
        folder = self.folder / f"p{self.number}"  # Never used again: a daemon may be late.
        folder.mkdir(mode=0o700)
        socket = str(folder / "d.sock")
        daemon = [str(DAEMON), *Node.flags(folder), "--private"]
        status, events = self.trainer("start", socket, 0, 2000, 0, faults=True, daemon=daemon)
        self.control.arm(False)
        problems = judge_trainer(status, events)
        log = Path(socket + ".log")
        if problems:
            problems.append("its daemon: " + tail(log))
        # A trainer that gave up may leave a daemon that is still starting: its process is there already.
        for pid in processes_of(socket):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)
        return problems

    def node_check(self) -> list[str]:
        assert self.node is not None
        return self.check(self.node)

    def check(self, node: Node) -> list[str]:
        """What a fresh client finds, and the daemon says, when nothing fails any more."""
        problems: list[str] = []
        if node.process.poll() is not None:
            return [f"DAEMON_GONE exit {node.process.returncode}: {tail(node.stderr)}"]
        code, events = self.trainer("check", node.socket, faults=False)
        if code != 0 or not events or "done" not in events:
            problems.append(f"check ended with {code}: {events[-5:]}")
        if node.process.poll() is not None:
            return [*problems, f"DAEMON_GONE exit {node.process.returncode}: {tail(node.stderr)}"]
        problems += ["VIOLATION " + line for line in events if line.startswith("violation")]
        if any("other bytes" in line for line in events):
            problems.append("WRONG_BYTES")
        listed = [int(line.split()[1]) for line in events if line.startswith("listed ")]
        for step in node.acked[-1:]:
            if not listed or max(listed) < step:
                problems.append(f"LOST_WORK acknowledged {step}, listed {listed}")
        acked = [int(line.split()[1]) for line in events if line.startswith("acked ")]
        node.acked = [*node.acked, *acked][-4:]
        problems += [f"{problem}; {events[-8:]}" for problem in self.leaks(node)] if not problems else []
        return problems

    def leaks(self, node: Node) -> list[str]:
        """Goodbyes are events of other processes: what is left is looked at until it is gone, or the deadline."""
        deadline = time.monotonic() + 10.0
        while True:
            left = []
            for who in ("keeper", "worker"):
                # One more for each extent that it holds.
                most = 40 + 64
                count = node.count_descriptors(who)
                if count > most:
                    left.append(f"LEAK {who} has {count} descriptors")
            status = self.status(node)
            pool = status.get("pool", {})
            if status.get("leases"):
                left.append(f"LEAK leases {status['leases']}")
            for name in ("leased", "zombie", "pending", "creating"):
                if pool.get(name):
                    left.append(f"LEAK {pool[name]} bytes {name}")
            if status.get("read_pins"):
                left.append(f"LEAK {status['read_pins']} pins")
            if status and pool.get("sealed", 0) > 3 * (6 << 20):
                left.append(f"LEAK {pool['sealed']} bytes sealed")
            if status.get("sessions", 1) > 1:
                left.append(f"LEAK {status['sessions']} sessions")
            if not left or time.monotonic() > deadline:
                return left
            time.sleep(0.02)  # Until the next look.

    def status(self, node: Node) -> dict[str, Any]:
        code, events = self.trainer("status", node.socket, faults=False)
        for line in events:
            if line.startswith("status "):
                found: dict[str, Any] = json.loads(line.removeprefix("status "))
                return found
        raise AssertionError(f"no status: {code} {events[-3:]}")


def processes_of(socket: str) -> list[int]:
    """Keepers and workers of the daemon that serves this socket, a name that no other process has ever heard."""
    wanted = f"--socket={socket}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                if wanted in (entry / "cmdline").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


def judge_trainer(status: int, events: list[str]) -> list[str]:
    problems = ["VIOLATION " + line for line in events if line.startswith("violation")]
    if status == -1000:
        problems.append(f"HANG {events[-3:]}")
    elif status < 0:
        problems.append(f"TRAINER_KILLED by signal {-status}: {events[-3:]}")
    elif status != 0 or "done" not in events:
        problems.append(f"TRAINER_KILLED exit {status}: {events[-3:]}")
    if problems:
        problems.append("its events: " + "; ".join(line for line in events if not line.startswith("ok "))[-1500:])
    return problems


@dataclass
class Row:
    """Of the table: one scenario and role."""

    functions: set[str] = field(default_factory=set)
    cases: int = 0
    runs: int = 0
    injected: int = 0
    failed: int = 0
    seconds: float = 0.0


def source_of(case: Case, site: list[int]) -> str:
    """The places in our own sources that the failing call came from."""
    program = TRAINER if case.role == "trainer" else DAEMON
    places = [hex(at - 1) for at in site]
    if not places:
        return ""
    found = subprocess.run(
        ["addr2line", "-Cfpe", program, *places], capture_output=True, text=True, check=False
    ).stdout.splitlines()
    return " <- ".join(line.split(" at ")[0][:90] for line in found if "std::" not in line.split("(")[0])[:900]


def profile(campaign: Campaign, scenario: str) -> dict[str, dict[str, int]]:
    """How often each function is called in a run in which nothing fails; also which cases need no run at all."""
    size = 8 * len(campaign.control.functions) * 4
    counts: dict[str, dict[str, int]] = {}
    for role in ROLES:
        start = campaign.control.layout["profile"]
        campaign.control.memory[start : start + size] = bytes(size)
        verdict = campaign.run(Case(scenario, role, "alloc", "once", "ENOMEM"), 1 << 60)
        assert not verdict.problems, (scenario, role, verdict.problems)
        counts[role] = campaign.control.profile(role)
    return counts


def until_clean(
    campaign: Campaign, case: Case, most: int, stride: int, row: Row, failures: list[str], stop_at: int
) -> tuple[int, int]:
    """Runs N = 1, 1 + stride, ... until nothing was left to fail; how many runs, how many failed."""
    n, runs, failed = 1, 0, 0
    while runs < most:
        verdict = campaign.run(case, n)
        runs += 1
        row.seconds += verdict.seconds
        if verdict.injected:
            row.injected += 1
        if verdict.problems:
            failed += 1
            where = source_of(case, verdict.site) if verdict.injected else ""
            failures.append(f"{case} N={n}: " + " | ".join(verdict.problems) + (f" | at {where}" if where else ""))
            print(failures[-1], flush=True)
            if failed >= stop_at:
                break
        if not verdict.injected:
            break
        n += stride
    row.runs += runs
    row.failed += failed
    return runs, failed


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--scenario", choices=SCENARIOS)
    parser.add_argument("--role", choices=list(ROLES))
    parser.add_argument("--function", choices=list(ERRORS))
    parser.add_argument("--mode", choices=MODES)
    parser.add_argument("--error")
    parser.add_argument("--n", type=int, help="only this run")
    parser.add_argument("--most", type=int, default=1_000_000, help="runs per case")
    parser.add_argument("--stride", type=int, default=1, help="every how many N")
    parser.add_argument("--sample", type=int, help="so many N per case, from the first call to the last; not --stride")
    parser.add_argument("--stop-at", type=int, default=20, help="failures of a case after which it is left")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    build()
    chosen = [
        case
        for case in all_cases()
        if arguments.scenario in (None, case.scenario)
        and arguments.role in (None, case.role)
        and arguments.function in (None, case.function)
        and arguments.mode in (None, case.mode)
        and arguments.error in (None, case.error)
    ]
    rows: dict[tuple[str, str], Row] = {}
    failures: list[str] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fail-nth-") as folder:
        campaign = Campaign(Path(folder))
        try:
            if arguments.n is not None:
                for case in chosen:
                    verdict = campaign.run(case, arguments.n)
                    print(case, arguments.n, verdict, source_of(case, verdict.site))
                    failures += verdict.problems
                return 1 if failures else 0
            for scenario in SCENARIOS:
                if not any(case.scenario == scenario for case in chosen):
                    continue
                counts = profile(campaign, scenario)
                for role, calls in counts.items():
                    print(f"{scenario}/{role}: " + " ".join(f"{name}={count}" for name, count in calls.items()))
                if arguments.profile:
                    continue
                for case in chosen:
                    if case.scenario != scenario or case.function not in counts[case.role]:
                        continue
                    row = rows.setdefault((scenario, case.role), Row())
                    row.functions.add(case.function)
                    row.cases += 1
                    most, stride = arguments.most, arguments.stride
                    if arguments.sample is not None:
                        count = counts[case.role][case.function]
                        most, stride = (
                            min(most, arguments.sample, count),
                            max(1, (count - 1) // max(1, arguments.sample - 1)),
                        )
                    runs, failed = until_clean(campaign, case, most, stride, row, failures, arguments.stop_at)
                    print(f"{case}: {runs} runs, {failed} failed", flush=True)
        finally:
            campaign.close()
    print(
        f"\n{'scenario':<10}{'role':<10}{'functions':>10}{'cases':>7}{'runs':>8}{'injected':>10}{'failed':>8}{'s':>8}"
    )
    for (scenario, role), row in rows.items():
        print(
            f"{scenario:<10}{role:<10}{len(row.functions):>10}{row.cases:>7}{row.runs:>8}{row.injected:>10}"
            f"{row.failed:>8}{row.seconds:>8.0f}"
        )
    print(f"{sum(r.runs for r in rows.values())} runs, {len(failures)} failed, {time.monotonic() - began:.0f} s")
    if arguments.json:
        table = [
            {"scenario": s, "role": r, **row.__dict__, "functions": sorted(row.functions)}
            for (s, r), row in rows.items()
        ]
        arguments.json.write_text(json.dumps({"rows": table, "failures": failures}, indent=1))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
