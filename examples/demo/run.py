"""The main job: train, kill in the cruellest ways, resume from memory, end with the very same bits.

    python examples/demo/run.py [--out DIR] [--seed N]

1. An uninterrupted run, without safepoint, gives the reference digest of weights and optimizer state.
2. The same training with saves into a daemon's shared memory. On the way
   (a) one trainer gets SIGKILL at a random moment;
   (b) all trainers get SIGKILL;
   (c) the daemon's worker gets SIGKILL while a trainer, frozen in the middle of its copy, holds an open lease, and
   then that trainer, too;
   (d) the worker alone gets SIGKILL: the job must not even notice.
   torchrun restarts the job after (a), (b) and (c).
3. Exit 0 only if every resume came from memory, at the newest step that the daemon had acknowledged, (c) hit an open
lease, (d) cost no restart,
   and the final digests are equal.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from processes import RANKS, Daemon, DemoFailed, Job, console, log_time
from rich.table import Table


@dataclass
class Kill:
    name: str
    what: str
    time: float = 0.0
    pids: list[int] = field(default_factory=list)
    latest_acknowledged: int = -1  # Newest complete step in the daemon's log when the job resumed.
    open_leases: int = 0  # Open leases that the restarted worker found.
    resumed_step: int = -1
    reached_step: int = -1  # Last optimizer step before the kill.
    restore_seconds: float = 0.0
    resume_seconds: float = 0.0  # Kill to first new optimizer step.


def kill_now(job: Job, kill: Kill, pids: list[int]) -> None:
    kill.time = time.time()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    kill.pids += pids


def kill_worker_with_open_lease(daemon: Daemon, kill: Kill) -> None:
    """Waits for an open lease, freezes its owner in the middle of the copy, kills the worker, then the owner."""
    worker = daemon.worker_pid()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        held = daemon.status()["leases"]
        if not held:
            continue  # A status call takes about 0.1 ms; a copy takes several.
        owner = int(held[0]["pid"])
        os.kill(owner, signal.SIGSTOP)
        time.sleep(0.05)  # A seal that it had sent already is through by then.
        if any(
            int(lease["pid"]) == owner for lease in daemon.status()["leases"]
        ):  # Still open, and it cannot be sealed any more.
            kill.time = time.time()
            os.kill(worker, signal.SIGKILL)
            os.kill(owner, signal.SIGKILL)
            kill.pids += [worker, owner]
            return
        os.kill(owner, signal.SIGCONT)
    raise DemoFailed("no lease was open for 60 s")


def judge(job: Job, daemon: Daemon, kills: list[Kill]) -> None:
    """Fills in what each kill cost, and checks the promises."""
    completed = daemon.events("attempt_complete")
    readopted = daemon.events("readopted")
    rank0 = job.events(0)
    for kill in kills:
        after = [e for rank in range(RANKS) for e in job.events(rank) if e["time"] > kill.time]
        kill.reached_step = max(
            (e["step"] for e in rank0 if e["event"] == "step" and e["time"] <= kill.time), default=0
        )
        resumes = sorted((e for e in after if e["event"] in ("resume", "fresh")), key=lambda e: e["time"])[:RANKS]
        if len(resumes) < RANKS or any(e["event"] == "fresh" for e in resumes):
            raise DemoFailed(f"kill {kill.name}: not every rank resumed: {resumes}")
        if {e["source"] for e in resumes} != {"memory"}:
            raise DemoFailed(f"kill {kill.name}: resumed from {[e['source'] for e in resumes]}, not from memory")
        steps = {e["step"] for e in resumes}
        if len(steps) != 1:
            raise DemoFailed(f"kill {kill.name}: the ranks resumed at different steps {steps}")
        kill.resumed_step = steps.pop()
        kill.restore_seconds = max(e["seconds"] for e in resumes)
        first_resume = resumes[0]["time"]
        acknowledged = [int(e["step"]) for e in completed if log_time(e) < first_resume]
        kill.latest_acknowledged = acknowledged[-1]
        seen = [
            e["step"]
            for rank in range(RANKS)
            for e in job.events(rank)
            if e["event"] == "acknowledged" and e["time"] < kill.time
        ]
        if kill.resumed_step != kill.latest_acknowledged or (seen and kill.resumed_step < max(seen)):
            raise DemoFailed(
                f"kill {kill.name}: resumed at step {kill.resumed_step}; the newest acknowledged one was "
                f"{kill.latest_acknowledged}, a trainer had seen {max(seen, default=None)}"
            )
        steps_after = [e["time"] for e in after if e["event"] == "step" and e["time"] > resumes[-1]["time"]]
        kill.resume_seconds = min(steps_after) - kill.time
        if kill.name == "c":
            found = [e for e in readopted if log_time(e) > kill.time]
            kill.open_leases = int(found[0]["open_leases"]) if found else 0
            if kill.open_leases < 1:
                raise DemoFailed("kill c: the restarted worker found no open lease")


def summary(job: Job, kills: list[Kill], worker_kill: Kill, digest: str, reference: str, seconds: float) -> None:
    table = Table(title="safepoint demo: every resume", title_justify="left")
    for name in ("kill", "what", "source", "acknowledged", "resumed at", "steps lost", "restore", "time to resume"):
        table.add_column(name, justify="left" if name in ("kill", "what", "source") else "right")
    for k in kills:
        table.add_row(
            k.name,
            k.what,
            "memory",
            str(k.latest_acknowledged),
            str(k.resumed_step),
            str(k.reached_step - k.resumed_step),
            f"{k.restore_seconds * 1e3:.0f} ms",
            f"{k.resume_seconds:.1f} s",
        )
    table.add_row(worker_kill.name, worker_kill.what, "-", "-", "-", "0", "-", "no restart")
    console.print(table)
    events = [e for rank in range(RANKS) for e in job.events(rank)]
    blocked = sorted(e["blocked"] for e in events if e["event"] == "saved")
    saved = sorted(e["seconds"] for e in events if e["event"] == "acknowledged")
    failed = [e for e in events if e["event"] == "save_failed"]
    console.print(
        f"saves: {len(blocked)} returned after {blocked[len(blocked) // 2] * 1e3:.1f} ms (median; "
        f"worst {blocked[-1] * 1e3:.1f} ms), "
        f"{len(saved)} acknowledged after {saved[len(saved) // 2] * 1e3:.1f} ms (median), "
        f"{len(failed)} failed around kills"
    )
    for e in failed:
        console.print(f"  rank {e['rank']} step {e['step']}: {e['error']}", style="dim")
    console.print(f"kill c hit {next(k.open_leases for k in kills if k.name == 'c')} open lease(s)")
    console.print(
        f"weights and optimizer state: {digest[:16]}… "
        f"{'==' if digest == reference else '!='} {reference[:16]}… (uninterrupted)"
    )
    console.print(f"took {seconds:.0f} s")


def picture(path: Path, reference: Job, job: Job, kills: list[Kill], worker_kill: Kill) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(9, 7), sharex=False, height_ratios=(3, 2))
    events = job.events(0)
    begin = events[0]["time"]
    line = [(e["step"], e["loss"]) for e in reference.events(0) if e["event"] == "step"]
    top.plot(*zip(*line, strict=True), color="0.8", linewidth=6, label="uninterrupted")
    launches: list[list[dict[str, Any]]] = []
    for e in events:
        if e["event"] == "start":
            launches.append([])
        launches[-1].append(e)
    for number, launch in enumerate(launches):
        steps = [(e["step"], e["loss"]) for e in launch if e["event"] == "step"]
        times = [(e["time"] - begin, e["step"]) for e in launch if e["event"] == "step"]
        if steps:
            top.plot(
                *zip(*steps, strict=True),
                ".-",
                markersize=4,
                linewidth=1,
                color=f"C{number}",
                label=f"launch {number + 1}",
            )
            bottom.plot(*zip(*times, strict=True), ".-", markersize=3, linewidth=1, color=f"C{number}")
        for e in launch:
            if e["event"] == "resume":
                bottom.plot(e["time"] - begin, e["step"], marker="^", color=f"C{number}", markersize=10)
    for kill in kills:
        top.axvline(kill.reached_step, color="crimson", linestyle=":", linewidth=1)
        top.annotate(
            f"kill {kill.name}",
            (kill.reached_step, 0.97),
            xycoords=("data", "axes fraction"),
            color="crimson",
            fontsize=8,
            ha="right",
            va="top",
            rotation=90,
        )
        top.plot(kill.resumed_step, dict(line)[kill.resumed_step], marker="^", color="black", markersize=8)
        bottom.plot(kill.time - begin, kill.reached_step, marker="X", color="crimson", markersize=10)
    bottom.axvline(worker_kill.time - begin, color="darkorange", linestyle=":", linewidth=1)
    bottom.annotate(
        "worker killed",
        (worker_kill.time - begin, 1),
        color="darkorange",
        fontsize=8,
        ha="right",
        rotation=90,
        va="bottom",
    )
    top.set(
        xlabel="step",
        ylabel="loss (rank 0)",
        title="Killed three times, resumed from memory (▲), bit-identical at the end",
    )
    top.legend(fontsize=8)
    bottom.set(xlabel="seconds since start", ylabel="step")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/demo"))
    parser.add_argument(
        "--seed", type=int, default=None, help="of the random moments (default: from the clock, printed)"
    )
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    began = time.monotonic()
    seed = args.seed if args.seed is not None else int(time.time())
    chance = random.Random(seed)
    out: Path = args.out.resolve()
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    console.print(f"seed {seed}; folder {out}")

    reference = Job(out / "reference", [f"--steps={args.steps}", "--save-every=0"], {})
    daemon = job = None
    try:
        with console.status("uninterrupted run, for the reference"):
            reference_digest = reference.finish(300)
        console.print(f"reference: {args.steps} steps, digest {reference_digest[:16]}…")
        daemon = Daemon(out / "daemon", "--pool=320MiB")
        environment = {"SAFEPOINT_SOCKET": str(daemon.socket), "SAFEPOINT_START": "0"}
        job = Job(out / "job", [f"--steps={args.steps}", "--save-every=4"], environment)
        kills = [
            Kill("a", "SIGKILL of one trainer"),
            Kill("b", "SIGKILL of all trainers"),
            Kill("c", "SIGKILL of the worker, lease open, and its writer"),
        ]
        fifth = args.steps // 5
        for kill, at in zip(kills, (fifth, 2 * fifth, 3 * fifth), strict=True):
            with console.status(f"training to step {at}, then kill {kill.name}: {kill.what}"):
                job.wait_for_step(at)
                launches = job.launches()
                if kill.name == "c":
                    kill_worker_with_open_lease(daemon, kill)
                else:
                    time.sleep(chance.uniform(0.0, 0.8))  # A random moment within the next few steps.
                    pids = job.pids()
                    kill_now(job, kill, [chance.choice(pids)] if kill.name == "a" else pids)
                console.print(f"kill {kill.name}: {kill.what}: pids {kill.pids}")
                job.wait_for_launch(launches + 1)
        worker_kill = Kill("d", "SIGKILL of the worker alone")
        with console.status("kill d: the worker alone"):
            job.wait_for_step(4 * fifth)
            launches = job.launches()
            kill_now(job, worker_kill, [daemon.worker_pid()])
        with console.status("to the end"):
            digest = job.finish(300)
        if job.launches() != launches:
            raise DemoFailed("kill d: the job was restarted, though only the worker was killed")
        judge(job, daemon, kills)
        picture(out / "demo.png", reference, job, kills, worker_kill)
        summary(job, kills, worker_kill, digest, reference_digest, time.monotonic() - began)
        if digest != reference_digest:
            raise DemoFailed("the interrupted run did not end with the bits of the uninterrupted one")
        report = {
            "seed": seed,
            "seconds": time.monotonic() - began,
            "kills": [vars(k) for k in kills],
            "digest": digest,
        }
        (out / "demo.json").write_text(json.dumps(report, indent=1))
        console.print(f"[green]passed[/green]; picture: {out / 'demo.png'}")
        return 0
    except DemoFailed as failure:
        console.print("failed", style="red", end=": ")
        console.print(str(failure), markup=False, highlight=False)
        return 1
    finally:
        for each in (job, reference):
            if each is not None:
                each.stop()
        if daemon is not None:
            daemon.stop()


if __name__ == "__main__":
    sys.exit(main())
