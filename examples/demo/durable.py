"""The durable tier: take its store away, kill its worker, lose all memory; resume from the store, with the same bits.

    python examples/demo/durable.py [--out DIR] [--s3]

The training of ``run.py``, with a save into memory every 10 steps, of which every fifth goes on to a store: a folder,
or with ``--s3`` the S3 gateway of Ceph, on this machine. An uninterrupted run gives the reference digest. Then

(a) the store goes away in the middle of a step's way to it, and comes back when more saves have been acknowledged;
(b) the daemon's worker gets SIGKILL in the middle of a step's way to the store: the next worker goes on with it;
(c) SIGKILL of everything: keeper, worker, torchrun, trainers. All memory is lost. A new daemon and a new torchrun: the
    job has to resume from the newest step in the store;
(d) the last step in the store is restored into 1, 2 and 3 ranks, without a daemon.

Exit 0 only if (a) and (b) hit a step that was on its way, failed no save and cost no restart, and those steps became
durable; (c) resumed from the newest durable step; the digests are equal; and every tensor of (d) has the bits that were
saved.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from base64 import b64encode
from collections.abc import Callable
from email.utils import formatdate
from hmac import digest as hmac
from pathlib import Path
from typing import Any, TypeVar

from processes import NAMESPACE, RANKS, Daemon, DemoFailed, Job, console, log_time
from rich.table import Table

import safepoint
from safepoint import _core

GATEWAY = Path(__file__).resolve().parents[2] / "tests" / "gateway" / "ceph_gateway.sh"
WORLD_SIZES = (1, 2, 3)
# So that a step's way to the store takes long enough to be met on it: two shards of 36 MB, one after the other.
BALLAST_MIB = 32
# Room for the two steps that are kept, two that wait for the store, and one being written.
DAEMON_FLAGS = ("--pool=480MiB", "--drain-threads=1")
T = TypeVar("T")


class FolderStore:
    """A directory that can go away and come back, as a network file system does."""

    away = "the store's directory is gone"
    environment: dict[str, str] = {}

    def __init__(self, out: Path) -> None:
        self.base = out / "store"
        self.elsewhere = out / "store-elsewhere"
        self.base.mkdir()
        self.url = f"file://{self.base}"

    def down(self) -> None:
        """What is in it is moved, and it is removed: whoever still holds it open has no store, either."""
        self.elsewhere.mkdir()
        for each in self.base.iterdir():
            each.rename(self.elsewhere / each.name)
        self.base.rmdir()

    def up(self) -> None:
        self.elsewhere.rename(self.base)

    def stop(self) -> None:
        pass


class GatewayStore:
    """A bucket behind an S3 gateway that can be killed and started again."""

    away = "the S3 gateway is killed"
    environment = {"AWS_ACCESS_KEY_ID": "testkey", "AWS_SECRET_ACCESS_KEY": "testsecret"}

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="sp-"))  # Short: sockets are made in it.
        endpoint = self.run("start", str(os.getpid()))
        self.make_bucket(endpoint, "demo")
        self.url = f"s3://demo/checkpoints?endpoint={endpoint}"
        os.environ.update(self.environment)  # For the steps that this process reads itself.

    def run(self, verb: str, *words: str) -> str:
        command = ["bash", str(GATEWAY), verb, str(self.folder / "ceph"), *words]
        # Its processes outlive it and keep what they were given as stderr: a file, which nobody waits for.
        with (self.folder / "script.err").open("a+") as errors:
            result = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, check=False, timeout=120)
            errors.seek(0)
            if result.returncode != 0:
                raise DemoFailed(f"the gateway: {verb}: {errors.read()[-500:]}")
        return result.stdout.strip()

    def make_bucket(self, endpoint: str, name: str) -> None:
        """As a user's tools would; safepoint makes none."""
        date = formatdate(usegmt=True)
        signed = hmac(self.environment["AWS_SECRET_ACCESS_KEY"].encode(), f"PUT\n\n\n{date}\n/{name}".encode(), "sha1")
        key = f"AWS {self.environment['AWS_ACCESS_KEY_ID']}:{b64encode(signed).decode()}"
        headers = {"Date": date, "Authorization": key}
        urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{name}", method="PUT", headers=headers), timeout=60)

    def down(self) -> None:
        self.run("down")

    def up(self) -> None:
        self.run("up")

    def stop(self) -> None:
        self.run("stop")
        shutil.rmtree(self.folder)


Store = FolderStore | GatewayStore


def whole_steps(store: Store) -> list[int]:
    """Asked of the store itself."""
    return sorted({name.step for name in _core.Store(store.url).steps(NAMESPACE)})


def until(what: str, job: Job, ask: Callable[[], T | None], seconds: float = 90.0) -> T:
    """Waits for something that other processes bring about."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (found := ask()) is not None:
            return found
        job.check_alive()
        time.sleep(0.02)
    raise DemoFailed(f"not within {seconds:.0f} s: {what}")


# --- the troubles


def freeze(pid: int) -> None:
    """SIGSTOP; returns when no thread of it runs any more."""
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + 20
    for thread in Path(f"/proc/{pid}/task").iterdir():
        while (thread / "stat").read_text().rpartition(")")[2].split()[0] != "T":
            if time.monotonic() > deadline:
                raise DemoFailed(f"thread {thread.name} of the worker does not stop")
            time.sleep(0.001)


def freeze_in_mid_drain(daemon: Daemon, store: Store, job: Job) -> tuple[int, dict[str, Any]]:
    """Waits until a part of a step's bytes has gone to the store, and freezes the worker there."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        drains = [d for d in daemon.status()["drains"] if 0 < d["bytes_done"] < d["bytes"] and d["failures"] == 0]
        if not drains:
            job.check_alive()
            time.sleep(0.002)
            continue
        worker = daemon.worker_pid()
        freeze(worker)
        if drains[0]["step"] not in whole_steps(store):  # Now it cannot become whole any more.
            return worker, drains[0]
        os.kill(worker, signal.SIGCONT)  # It was quicker. There are more steps.
    raise DemoFailed("no step was met on its way to the store within 120 s")


def of_attempt(daemon: Daemon, event: str, drain: dict[str, Any]) -> dict[str, Any] | None:
    return next((e for e in daemon.events(event) if e["attempt"] == drain["attempt"]), None)


def acknowledged(job: Job, level: str = "acknowledged", after: float = 0.0) -> list[int]:
    """Steps of which every rank was told, after that moment, that they reached the level."""
    told = [{e["step"] for e in job.events(r) if e["event"] == level and e["time"] > after} for r in range(RANKS)]
    return sorted(set.intersection(*told))


def store_outage(daemon: Daemon, store: Store, job: Job) -> dict[str, Any]:
    worker, drain = freeze_in_mid_drain(daemon, store, job)
    began = time.time()
    store.down()
    os.kill(worker, signal.SIGCONT)
    step = drain["step"]

    def trouble() -> str | None:
        waiting = next((d for d in daemon.status()["drains"] if d["step"] == step), None)
        if waiting is None:
            raise DemoFailed(f"kill a: step {step} is not on its way any more, although the store is away")
        return waiting["trouble"] or None

    said = until("kill a: the daemon notices that the store is away", job, trouble)
    seen = time.time()
    saves = until(
        "kill a: two saves are acknowledged while the store is away",
        job,
        lambda: found if len(found := acknowledged(job, after=seen)) >= 2 else None,
    )
    if of_attempt(daemon, "attempt_durable", drain) is not None:
        raise DemoFailed(f"kill a: step {step} is said to be durable, but the store is away")
    store.up()
    back = time.time()
    durable = until(f"kill a: step {step} is durable", job, lambda: of_attempt(daemon, "attempt_durable", drain))
    return {
        **drain,
        "time": began,
        "back": back,
        "trouble": said,
        "saves": saves,
        "durable_after": log_time(durable) - back,
        "launches": job.launches(),
    }


def kill_worker(daemon: Daemon, store: Store, job: Job) -> dict[str, Any]:
    worker, drain = freeze_in_mid_drain(daemon, store, job)
    at = time.time()
    os.kill(worker, signal.SIGKILL)
    step = drain["step"]
    durable = until(f"kill b: step {step} is durable", job, lambda: of_attempt(daemon, "attempt_durable", drain))
    shards = [log_time(e) > at for e in daemon.events("shard_stored") if e["attempt"] == drain["attempt"]]
    if log_time(durable) < at or len(shards) != RANKS or not any(shards):
        raise DemoFailed(f"kill b: the next worker did not go on where the killed one was: shards after it {shards}")
    return {
        **drain,
        "time": at,
        "shards_left": sum(shards),
        "durable_after": log_time(durable) - at,
        "launches": job.launches(),
    }


def kill_everything(daemon: Daemon, store: Store, job: Job, after_step: int) -> dict[str, Any]:
    """When a step is durable that is not older than `after_step`, and two newer ones are in memory alone."""

    def ready() -> bool | None:
        durable, memory = acknowledged(job, "durable")[-1:], acknowledged(job)[-2:]
        return True if durable and durable[0] >= after_step and memory[0] > durable[0] else None

    until("kill c: a durable step and two newer ones in memory", job, ready)
    killed = [daemon.process.pid, daemon.worker_pid()]
    at = time.time()
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    daemon.process.wait()
    killed += job.stop()
    steps = whole_steps(store)
    told = acknowledged(job, "durable")
    if told[-1] not in steps:
        raise DemoFailed(f"kill c: step {told[-1]} was acknowledged as durable, but the store has {steps}")
    reached = max(e["step"] for e in job.events(0) if e["event"] == "step")
    return {"time": at, "pids": killed, "durable": steps[-1], "memory": acknowledged(job)[-1], "reached": reached}


def judge_resume(daemon: Daemon, job: Job, kill: dict[str, Any]) -> None:
    after = [e for rank in range(RANKS) for e in job.events(rank) if e["time"] > kill["time"]]
    resumes = [e for e in after if e["event"] in ("resume", "fresh")]
    found = [(e["event"], e.get("source"), e.get("step")) for e in resumes]
    if found != [("resume", "durable", kill["durable"])] * RANKS:
        raise DemoFailed(f"kill c: not every rank resumed from the store at step {kill['durable']}: {found}")
    if not any(log_time(e) > kill["time"] for e in daemon.events("store_listed")):
        raise DemoFailed("kill c: the new daemon did not ask the store")
    kill["restore_seconds"] = max(e["seconds"] for e in resumes)
    began = max(e["time"] for e in resumes)
    kill["resume_seconds"] = min(e["time"] for e in after if e["event"] == "step" and e["time"] > began) - kill["time"]


def judge_saves(job: Job, launches: int, troubles: list[dict[str, Any]]) -> None:
    """(a) and (b) cost the job nothing."""
    failed = [e for rank in range(RANKS) for e in job.events(rank) if e["event"] == "save_failed"]
    if failed:
        raise DemoFailed(f"rank {failed[0]['rank']}, step {failed[0]['step']}: a save failed: {failed[0]['error']}")
    if any(trouble["launches"] != launches for trouble in troubles):
        raise DemoFailed("a trainer was restarted before kill c")


def restore_everywhere(store: Store, job: Job) -> dict[str, Any]:
    """(d): the last durable step, at 1, 2 and 3 ranks; each tensor against what the trainers had when they saved."""
    import torch
    import train

    saved = [[e for e in job.events(rank) if e["event"] == "state"][-1] for rank in range(RANKS)]
    first = next(e for e in job.events(0) if e["event"] == "state")
    step = int(saved[0]["step"])
    if step != whole_steps(store)[-1]:
        raise DemoFailed(f"the store has the steps {whole_steps(store)}, the last one saved was {step}")
    if saved[0]["fingerprints"]["ballast"] != first["fingerprints"]["ballast"]:
        raise DemoFailed("what training never touched is not what it was at the start")
    tensors = restores = 0
    for world_size in WORLD_SIZES:
        for rank in range(world_size):
            model, optimizer = train.new_state()
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=1)
            rng = safepoint.PerRank({"torch": torch.get_rng_state(), "python": random.getstate()})
            ballast = torch.zeros(BALLAST_MIB << 20, dtype=torch.uint8)
            state = {"model": model, "optimizer": optimizer, "schedule": schedule, "ballast": ballast, "rng": rng}
            info = safepoint.load_into(store.url, state, rank=rank, world_size=world_size)
            if (info.step, info.source) != (step, "durable"):
                raise DemoFailed(f"rank {rank} of {world_size} was given step {info.step} from {info.source}")
            # Random number generators are each rank's own: a rank that was none when it was saved has none there.
            expected = dict(saved[min(rank, RANKS - 1)]["fingerprints"])
            found = train.fingerprints(model, optimizer, ballast, rng.value)
            if rank >= RANKS:
                del expected["rng"], found["rng"]
            differ = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
            if differ:
                raise DemoFailed(f"step {step} restored at rank {rank} of {world_size}: {differ[:5]} differ")
            tensors, restores = tensors + len(found), restores + 1
    return {"step": step, "tensors": tensors, "restores": restores}


# --- what is shown


def record(daemon: Daemon, job: Job, troubles: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """When each saved step reached which level and how long it was there: all that the picture needs."""
    steps = [e for e in job.events(0) if e["event"] == "step"]
    lost = troubles["c"]["time"]
    attempts: dict[str, dict[str, Any]] = {}
    for e in daemon.events("attempt_complete"):
        attempts[e["attempt"]] = {"step": int(e["step"]), "memory": log_time(e)}
    for key, event in {
        "durable": "attempt_durable",
        "retired": "attempt_retired",
        "evicted": "attempt_evicted",
    }.items():
        for e in daemon.events(event):
            if e["attempt"] in attempts:
                attempts[e["attempt"]][key] = log_time(e)
    end = max(e.get("durable", e["memory"]) for e in [*attempts.values(), {"memory": steps[-1]["time"]}])
    end += 0.03 * (end - steps[0]["time"])  # So that the level of the last step can be seen.
    wished = {e["attempt"] for e in daemon.events("durable_wanted")}
    for name, attempt in attempts.items():
        attempt["wished"] = name in wished
        attempt["memory_until"] = min(
            attempt.get("retired", end), attempt.get("evicted", end), lost if attempt["memory"] < lost else end
        )
    return {
        "begin": steps[0]["time"],
        "end": end,
        "training": [(e["time"], e["step"]) for e in steps],
        "attempts": list(attempts.values()),
        "outage": (troubles["a"]["time"], troubles["a"]["back"]),
        "worker_killed": troubles["b"]["time"],
        "all_killed": lost,
        "resumed": troubles["c"]["durable"],
        "store": str(daemon.events("attempt_durable")[-1]["store"]).partition(":")[0],
    }


def picture(path: Path, told: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    colors = {
        "in memory": "tab:blue",
        "in memory, on its way to the store": "orange",
        "in memory and durable": "tab:green",
        "durable, gone from memory": "lightgreen",
    }
    figure, axes = pyplot.subplots(figsize=(10, 5.5))
    begin = told["begin"]

    def bar(step: int, since: float, until: float, color: str) -> None:
        if until > since:
            axes.barh(step, until - since, left=since - begin, height=6.5, color=colors[color])

    for attempt in told["attempts"]:
        step, memory, gone = attempt["step"], attempt["memory"], attempt["memory_until"]
        durable = attempt.get("durable", gone)
        bar(
            step, memory, min(durable, gone), "in memory, on its way to the store" if attempt["wished"] else "in memory"
        )
        if "durable" in attempt:
            bar(step, durable, gone, "in memory and durable")
            bar(step, max(durable, gone), told["end"], "durable, gone from memory")
    axes.plot(
        [t - begin for t, _ in told["training"]],
        [s for _, s in told["training"]],
        ".",
        markersize=1.5,
        color="0.45",
        zorder=3,
    )
    away, back = (t - begin for t in told["outage"])
    axes.axvspan(away, back, color="crimson", alpha=0.12, linewidth=0)
    top = axes.get_xaxis_transform()
    marks = [
        (away, "a: store away"),
        (told["worker_killed"] - begin, "b: worker killed"),
        (told["all_killed"] - begin, "c: all killed, memory lost"),
    ]
    for at, text in marks:
        axes.axvline(at, color="crimson", linestyle=":", linewidth=1.2)
        axes.text(at, 0.98, f"{text} ", color="crimson", fontsize=9, rotation=90, ha="right", va="top", transform=top)
    resumed = next(t for t, _ in told["training"] if t > told["all_killed"]) - begin
    axes.plot(resumed, told["resumed"], marker="^", color="black", markersize=9, zorder=4)
    axes.annotate(
        f"resumed from the store,\nstep {told['resumed']}",
        (resumed, told["resumed"]),
        xytext=(-6, 10),
        textcoords="offset points",
        fontsize=8,
        ha="right",
        va="bottom",
    )
    handles = [Patch(color=color, label=name) for name, color in colors.items()]
    axes.legend(handles=handles, fontsize=8, loc="lower right")
    axes.set(xlabel="seconds of training", ylabel="step", xlim=(0, told["end"] - begin))
    axes.set_title(f"Where each saved step is; the store is {told['store']}://")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def summary(job: Job, store: Store, troubles: dict[str, dict[str, Any]], restored: dict[str, Any]) -> None:
    a, b, c = troubles["a"], troubles["b"], troubles["c"]
    table = Table(title=f"safepoint demo, durable tier in {store.url}", title_justify="left", show_lines=True)
    for name in ("", "what happened", "what held"):
        table.add_column(name)

    def met(drain: dict[str, Any]) -> str:
        return f"step {drain['step']} on its way, {drain['bytes_done'] / 1e6:.0f} of {drain['bytes'] / 1e6:.0f} MB"

    table.add_row(
        "a",
        f"{store.away} for {a['back'] - a['time']:.1f} s ({met(a)})",
        f"{len(a['saves'])} saves acknowledged meanwhile; durable {a['durable_after']:.1f} s after it was back",
    )
    table.add_row(
        "b",
        f"SIGKILL of the worker ({met(b)})",
        f"{b['shards_left']} of {RANKS} shards were left, which the next worker stored; "
        f"durable {b['durable_after']:.1f} s later; no restart",
    )
    table.add_row(
        "c",
        f"SIGKILL of keeper, worker, torchrun, trainers at step {c['reached']}: all memory lost",
        f"resumed from the store at step {c['durable']}, its newest (restore {c['restore_seconds'] * 1e3:.0f} ms, "
        f"{c['resume_seconds']:.1f} s from the kill to the next step)",
    )
    table.add_row(
        "d",
        f"step {restored['step']} restored into {', '.join(map(str, WORLD_SIZES[:-1]))} and {WORLD_SIZES[-1]} ranks",
        f"{restored['tensors']} tensors in {restored['restores']} restores, every bit as saved",
    )
    console.print(table)
    events = [e for rank in range(RANKS) for e in job.events(rank)]
    for name, what in (("saved", "returned"), ("acknowledged", "in memory"), ("durable", "durable")):
        key = "blocked" if name == "saved" else "seconds"
        took = sorted(e[key] for e in events if e["event"] == name)
        console.print(
            f"{len(took)} saves {what} after {took[len(took) // 2] * 1e3:.1f} ms (median; worst {took[-1]:.2f} s)"
        )
    console.print(f"what the daemon said of the store in (a): {a['trouble']}", style="dim")


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/demo-durable"))
    parser.add_argument("--s3", action="store_true", help="the store is an S3 gateway (Ceph) instead of a folder")
    parser.add_argument("--steps", type=int, help="a multiple of --durable-every, at least four times it (S3: six)")
    parser.add_argument("--save-every", type=int, default=10)
    parser.add_argument("--durable-every", type=int, default=50)
    args = parser.parse_args(words)
    if args.steps is None:  # A store that is slower needs more training to be met by.
        args.steps = args.durable_every * (6 if args.s3 else 4)
    if min(args.save_every, args.durable_every) < 1 or args.durable_every % args.save_every:
        parser.error("--durable-every has to be a multiple of --save-every")
    if args.steps % args.durable_every or args.steps < 4 * args.durable_every:
        parser.error("--steps has to be a multiple of --durable-every, at least four times it")
    return args


def main() -> int:
    args = parse()
    began = time.monotonic()
    out: Path = args.out.resolve()
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    training = [f"--steps={args.steps}", "--batch=2"]
    saving = [
        f"--save-every={args.save_every}",
        f"--durable-every={args.durable_every}",
        f"--ballast-mib={BALLAST_MIB}",
    ]
    store: Store | None = None
    daemon = job = reference = None
    try:
        if args.s3:
            if subprocess.run(["bash", str(GATEWAY), "check"], check=False).returncode != 0:
                raise DemoFailed("the programs of Ceph are not installed: ceph-mon ceph-osd radosgw ceph-common")
            with console.status("starting an S3 gateway"):
                store = GatewayStore()
        else:
            store = FolderStore(out)
        console.print(f"folder {out}; store {store.url}")
        reference = Job(out / "reference", [*training, "--save-every=0"], {})
        with console.status("uninterrupted run, for the reference"):
            expected = reference.finish(300)
        console.print(f"reference: {args.steps} steps, digest {expected[:16]}…")

        flags = (*DAEMON_FLAGS, f"--store={store.url}")
        daemon = Daemon(out / "daemon", *flags, environment=store.environment)
        environment = {**store.environment, "SAFEPOINT_SOCKET": str(daemon.socket), "SAFEPOINT_START": "0"}
        job = Job(out / "job", [*training, *saving], environment)
        job.wait_for_launch(1)
        troubles = {}
        with console.status(f"a: {store.away}"):
            troubles["a"] = store_outage(daemon, store, job)
            console.print(f"a: {store.away} while step {troubles['a']['step']} was on its way, and came back")
        with console.status("b: SIGKILL of the worker"):
            troubles["b"] = kill_worker(daemon, store, job)
            console.print(f"b: SIGKILL of the worker while step {troubles['b']['step']} was on its way")
        with console.status("c: SIGKILL of everything"):
            troubles["c"] = kill_everything(daemon, store, job, troubles["b"]["step"])
            judge_saves(job, 1, [troubles["a"], troubles["b"]])
            console.print(f"c: SIGKILL of keeper, worker, torchrun and trainers: pids {troubles['c']['pids']}")
            daemon = Daemon(out / "daemon", *flags, environment=store.environment)
            job = Job(out / "job", [*training, *saving], environment)
            digest = job.finish(300)
            judge_resume(daemon, job, troubles["c"])
            judge_saves(job, 1, [])
        told = record(daemon, job, troubles)
        daemon.stop()
        with console.status("d: restored into other numbers of ranks"):
            restored = restore_everywhere(store, job)
        (out / "demo.json").write_text(json.dumps({**told, "troubles": troubles, "digest": digest}, indent=1))
        picture(out / "demo-durable.png", told)
        summary(job, store, troubles, restored)
        equal = "==" if digest == expected else "!="
        console.print(f"weights and optimizer state: {digest[:16]}… {equal} {expected[:16]}… (uninterrupted)")
        if digest != expected:
            raise DemoFailed("the interrupted run did not end with the bits of the uninterrupted one")
        console.print(f"took {time.monotonic() - began:.0f} s")
        console.print(f"[green]passed[/green]; picture: {out / 'demo-durable.png'}")
        return 0
    except (DemoFailed, safepoint.SafepointError) as failure:
        console.print("failed", style="red", end=": ")
        console.print(f"{type(failure).__name__}: {failure}", markup=False, highlight=False)
        return 1
    finally:
        for each in (job, reference, daemon, store):
            if each is not None:
                each.stop()


if __name__ == "__main__":
    sys.exit(main())
