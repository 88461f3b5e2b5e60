"""SIGKILL rounds: worker, one trainer, all of them, at random moments, with stamped payloads and full verification.

    python tests/process/kill_rounds.py --rounds 10000 --seed 1

Each round forks a launch of two trainers. They restore, check every byte of the stamp, then save step after step. The
parent kills at a random
moment, and at the end of the round everybody. Judged after each round (reliability, section 4):
LOST_WORK: a restore is older than the newest step a trainer saw acknowledged; WRONG_BYTES: a stamp does not match;
SILENT_DIVERGENCE: the two ranks
restored different steps; FALSE_COMPLETE: a listed step cannot be read; LEAK: leases or extents are left when everybody
is dead; STALL: nothing
happens for 60 s. Prints one line of counts; exit 0 only if every round passed. (I-1, I-2, I-4, I-5, I-6, I-7, I-8,
I-25, I-28, I-31; F1, F2, F4, F13, F14)
"""

from __future__ import annotations

import argparse
import json
import os
import random
import selectors
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

import safepoint

sys.path.insert(0, str(Path(__file__).parent))
from conftest import Daemon
from log_check import check

WORLD = 2
NAMESPACE = "rounds"
BLOCK = 4096


def stamp(step: int, rank: int, size: int) -> np.ndarray:
    """Every 4 KiB block encodes namespace, step, rank and its own index, and fills up with a value derived from
    them."""
    blocks = size // BLOCK
    index = np.arange(blocks, dtype=np.uint64)[:, None]
    column = np.arange(BLOCK // 8, dtype=np.uint64)[None, :]
    with np.errstate(over="ignore"):
        seed = np.uint64(hash_text(NAMESPACE)) ^ np.uint64(step * 1_000_003 + rank)
        return ((index * np.uint64(0x9E3779B97F4A7C15)) ^ (column * np.uint64(0xC2B2AE3D27D4EB4F)) ^ seed).reshape(-1)


def hash_text(value: str) -> int:
    return int.from_bytes(value.encode()[:8].ljust(8, b"\0"), "little")


def trainer(rank: int, launch: str, socket: str, size: int, report: int) -> None:
    """In a forked child; never returns."""

    def say(*words: object) -> None:
        os.write(report, (" ".join(map(str, words)) + "\n").encode())

    try:
        os.environ.update(SAFEPOINT_SOCKET=socket, SAFEPOINT_START="0", SAFEPOINT_LAUNCH_ID=launch)
        checkpointer = safepoint.Checkpointer(NAMESPACE, rank=rank, world_size=WORLD)
        payload = torch.zeros(size // 8, dtype=torch.int64)
        state = {f"w{rank}": payload}
        info = checkpointer.restore(state)
        step = 0 if info is None else info.step
        if info is not None and not np.array_equal(payload.numpy().view(np.uint64), stamp(step, rank, size)):
            say("wrong_bytes", step)
        say("restored", step if info is not None else -1)
        while True:
            step += 1
            payload.numpy().view(np.uint64)[:] = stamp(step, rank, size)
            try:
                save = checkpointer.save(step, state)
                say("saved", step)
                save.wait("memory", timeout=20.0)
                say("acked", step)
            except (safepoint.Closed, safepoint.Incomplete) as error:
                # The other rank died. A launch that lost a rank ends.
                say("closed", step, type(error).__name__)
                time.sleep(600)
    except BaseException as error:  # Reported, judged by the parent.
        say("error", type(error).__name__, str(error).replace("\n", " ")[:300])
    finally:
        os._exit(0)


@dataclass
class Launch:
    pids: list[int] = field(default_factory=list)
    pipes: list[int] = field(default_factory=list)
    buffers: list[bytes] = field(default_factory=list)
    restored: dict[int, int] = field(default_factory=dict)
    begun: int = 0
    acked: int = -1
    problems: list[str] = field(default_factory=list)

    def take(self, rank: int, data: bytes) -> None:
        self.buffers[rank] += data
        *lines, self.buffers[rank] = self.buffers[rank].split(b"\n")
        for line in lines:
            word, *rest = line.decode().split(" ")
            if word == "restored":
                self.restored[rank] = int(rest[0])
            elif word == "saved":
                self.begun = max(self.begun, int(rest[0]))
            elif word == "acked":
                self.acked = max(self.acked, int(rest[0]))
            elif word == "wrong_bytes":
                self.problems.append(f"WRONG_BYTES rank {rank} step {rest[0]}")
            elif word == "error":
                self.problems.append(f"ERROR rank {rank}: " + " ".join(rest))


def run_launch(number: int, socket: str, size: int) -> Launch:
    launch = Launch()
    for rank in range(WORLD):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            trainer(rank, f"launch-{os.getppid()}-{number}", socket, size, write)
        os.close(write)
        launch.pids.append(pid)
        launch.pipes.append(read)
        launch.buffers.append(b"")
    return launch


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def play(
    daemon: Daemon, chance: random.Random, number: int, size: int, newest_acked: int, counts: dict[str, int]
) -> tuple[int, list[str]]:
    """One round; returns the newest acknowledged step and what went wrong."""
    launch = run_launch(number, daemon.socket, size)
    alive = set(range(WORLD))
    plan = chance.choice(("worker", "one", "all", "worker+one", "worker+all", "worker,worker"))
    counts[plan] = counts.get(plan, 0) + 1
    moment: float | None = None
    end: float | None = None
    stall = time.monotonic() + 60
    selector = selectors.DefaultSelector()
    for rank, pipe in enumerate(launch.pipes):
        selector.register(pipe, selectors.EVENT_READ, rank)
    worker_kills = 0
    while True:
        now = time.monotonic()
        if moment is None and len(launch.restored) == WORLD:
            moment = now + chance.uniform(0.0, 0.08)
        if moment is not None and end is None and now >= moment:
            if "worker" in plan:
                daemon.kill_worker()
                worker_kills += 1
            if plan.endswith("one"):
                victim = chance.choice(sorted(alive))
                kill(launch.pids[victim])
                alive.discard(victim)
            if plan.endswith("all"):
                for rank in sorted(alive):
                    kill(launch.pids[rank])
                alive.clear()
            if plan == "worker,worker" and worker_kills < 2:
                moment = now + chance.uniform(0.0, 0.03)
            else:
                end = now + (chance.uniform(0.02, 0.12) if alive else 0.0)
        if end is not None and now >= end:
            break
        if launch.problems or now > stall:
            if now > stall:
                launch.problems.append(f"STALL plan {plan} restored {launch.restored}")
            break
        for key, _ in selector.select(timeout=0.002):
            data = os.read(key.fd, 65536)
            if data:
                launch.take(key.data, data)
            else:
                selector.unregister(key.fd)
    for rank in sorted(alive):
        kill(launch.pids[rank])
    for rank, pipe in enumerate(launch.pipes):
        while data := os.read(pipe, 65536):
            launch.take(rank, data)
        os.close(pipe)
    problems = launch.problems
    if len(set(launch.restored.values())) > 1:
        problems.append(f"SILENT_DIVERGENCE {launch.restored}")
    for rank, step in launch.restored.items():
        if step < newest_acked:
            problems.append(f"LOST_WORK rank {rank} restored {step}, acknowledged was {newest_acked}")
    counts["acked"] = counts.get("acked", 0) + max(0, launch.acked - max(launch.restored.values(), default=0))
    counts["restores"] = counts.get("restores", 0) + sum(s >= 0 for s in launch.restored.values())
    # What was restored was acknowledged by that very fact.
    return max(newest_acked, launch.acked, *launch.restored.values(), -1), [
        f"round {number} ({plan}): {p}" for p in problems
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--size", type=int, default=3 << 20, help="bytes per rank, a multiple of 4096")
    args = parser.parse_args()
    seed = args.seed if args.seed is not None else int(time.time())
    chance = random.Random(seed)
    torch.set_num_threads(1)
    problems: list[str] = []
    counts: dict[str, int] = {}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        daemon = Daemon(Path(folder) / "d", "--pool=96MiB", "--pool-prefault=96MiB")
        try:
            newest = -1
            for number in range(args.rounds):
                newest, found = play(daemon, chance, number, args.size, newest, counts)
                problems += found
                if len(problems) > 20:
                    break
            deadline = time.monotonic() + 20
            while True:  # Quiescence: everybody is dead.
                state = daemon.status()
                quiet = (
                    state["totals"]["open_leases"] == 0
                    and state["pool"]["leased"] == 0
                    and state["pool"]["zombie"] == 0
                )
                if quiet or time.monotonic() > deadline:
                    break
                time.sleep(0.02)
            if not quiet:
                problems.append(f"LEAK {json.dumps(state)}")
            client = daemon.client()
            steps = client.list_steps(NAMESPACE)
            complete = [i for i in steps if i.state == "complete"]
            if state["pool"]["sealed"] != sum(i.world_size for i in complete) * (4 << 20) * -(
                -(args.size + (1 << 16)) // (4 << 20)
            ):
                problems.append(f"LEAK sealed bytes {state['pool']['sealed']} for {len(complete)} steps")
            for info in complete:
                with client.open_read(NAMESPACE, attempt=info.attempt) as pin:
                    for rank in range(WORLD):
                        reader = pin.shard(rank)
                        if bad := reader.verify(0, reader.blocks):
                            problems.append(f"FALSE_COMPLETE step {info.step} rank {rank} blocks {bad}")
            client.close()
        finally:
            daemon.stop()
        with daemon.log.open() as log:
            problems += [f"EVIDENCE {wrong}" for wrong in check(map(json.loads, log))]
    for problem in problems:
        print(problem)
    print(
        f"seed {seed}: {args.rounds} rounds, {counts}, newest acknowledged step {newest}, "
        f"{len(problems)} problems, {time.monotonic() - began:.0f} s"
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
