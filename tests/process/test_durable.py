"""The durable tier on a file system, with the real daemon: I-22 to I-24, F61, F64, F66, F68."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import Daemon, eventually
from safetensors import safe_open

import safepoint
from safepoint import _core, _stored, dcp

COMMAND = [sys.executable, "-c", "from safepoint.cli import main; main()"]
Start = Callable[..., Daemon]
Job = Callable[..., safepoint.Checkpointer]


def cli(*words: str, code: int = 0) -> str:
    result = subprocess.run([*COMMAND, *words], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "store"
    folder.mkdir()
    return folder


@pytest.fixture
def url(base: Path) -> str:
    return f"file://{base}"


def without_roots_rights() -> list[str]:
    """Before a command: root, too, needs permission then."""
    rights = "-dac_override,-dac_read_search"
    return ["setpriv", f"--bounding-set={rights}", f"--inh-caps={rights}"] if os.geteuid() == 0 else []


def state(value: float) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(int(value))
    return {
        "model": {"w": torch.randn(700, 1000, generator=generator), "b": torch.full((7,), value, dtype=torch.bfloat16)},
        "epoch": int(value),
        "name": f"step {value}",
    }


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return (
        all(torch.equal(a["model"][key], b["model"][key]) for key in ("w", "b"))
        and a["epoch"] == b["epoch"]
        and a["name"] == b["name"]
    )


def test_a_job_resumes_from_the_store_when_all_memory_is_lost(start_daemon: Start, url: str, open_job: Job) -> None:
    """The main promise: keeper and worker die, and with them the memory; the newest durable step is there."""
    daemon = start_daemon(f"--store={url}")
    job = open_job(daemon, "train")
    for step in (10, 20, 30):
        job.save(step, state(step), durable=step != 30).wait("durable" if step != 30 else "memory", timeout=30)
    os.kill(daemon.process.pid, signal.SIGKILL)
    daemon.process.wait()
    job.close()

    again = open_job(start_daemon(f"--store={url}"), "train")
    found = state(0)
    info = again.restore(found)
    assert info is not None
    assert (info.step, info.source, info.world_size) == (20, "durable", 1)
    assert equal(found, state(20))
    save = again.save(21, state(21), durable=True)
    assert save.wait("durable", timeout=30) == "durable"
    assert [i.step for i in again.steps()] == [21, 20, 10]


def test_steps_that_memory_let_go_of_are_read_from_the_store(daemon_with_store: Daemon, open_job: Job) -> None:
    job = open_job(daemon_with_store)
    job.save(1, state(1), durable=True).wait("durable", timeout=30)
    for step in (2, 3, 4):
        job.save(step, state(step)).wait(timeout=30)
    assert [(i.step, i.level) for i in job.steps()] == [(4, "memory"), (3, "memory"), (1, "durable")]
    found = state(0)
    info = job.restore(found, step=1, verify_first=True)
    assert info is not None and info.source == "durable"
    assert equal(found, state(1))


@pytest.fixture
def daemon_with_store(start_daemon: Start, url: str) -> Daemon:
    return start_daemon(f"--store={url}")


def test_load_needs_no_daemon_and_any_world_size(
    daemon_with_store: Daemon, url: str, open_job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = open_job(daemon_with_store, "train")
    job.save(40, state(40), durable=True).wait("durable", timeout=30)
    job.close()
    daemon_with_store.stop()
    monkeypatch.setenv("SAFEPOINT_SOCKET", "/nonexistent/socket")
    assert equal(safepoint.load(url), state(40))
    assert equal(safepoint.load(url, namespace="train", step=40), state(40))
    assert equal(safepoint.load(f"{url}/train/step-40"), state(40))
    for world_size in (1, 2, 3):
        for rank in range(world_size):
            found = state(0)
            info = safepoint.load_into(url, found, rank=rank, world_size=world_size, verify_first=True)
            assert (info.step, info.source) == (40, "durable")
            assert equal(found, state(40))
    with pytest.raises(safepoint.NotFound, match="whole steps: 40"):
        safepoint.load(url, step=41)
    with pytest.raises(safepoint.Mismatch):
        safepoint.load_into(url, {"model": {"w": torch.zeros(3)}}, rank=0, world_size=1)
    with pytest.raises(safepoint.InvalidArgument):
        safepoint.load(f"{url}/train/step-40", step=40)
    with pytest.raises(safepoint.InvalidArgument, match="no URL"):
        safepoint.load("gopher://x")
    with pytest.raises(safepoint.NotFound):
        safepoint.load(f"{url}/not-there")


def test_shards_open_with_safetensors_alone(daemon_with_store: Daemon, base: Path, open_job: Job) -> None:
    job = open_job(daemon_with_store, "train")
    job.save(40, state(40), durable=True).wait("durable", timeout=30)
    (shard,) = base.glob("train/step-40/*/rank-0.safetensors")
    tensors = safetensors.torch.load_file(shard)
    assert torch.equal(tensors["model.w"], state(40)["model"]["w"])
    with safe_open(shard, "pt") as file:
        assert "model.b" in file.keys()  # noqa: SIM118
    assert {path.name for path in shard.parent.iterdir()} == {
        "rank-0.safetensors",
        "rank-0.crc32c",
        "lineage.json",
        "manifest.json",
    }


def test_f66_what_was_altered_in_the_store_is_found(
    daemon_with_store: Daemon, base: Path, url: str, open_job: Job
) -> None:
    job = open_job(daemon_with_store, "train")
    for step in (1, 2):
        job.save(step, state(step), durable=True).wait("durable", timeout=30)
    (shard,) = base.glob("train/step-2/*/rank-0.safetensors")
    with shard.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(safepoint.Corrupt) as caught:
        safepoint.load(url)
    assert caught.value.rank == 0 and caught.value.block == 2
    found = state(0)
    with pytest.raises(safepoint.Corrupt, match="nothing was changed"):
        safepoint.load_into(url, found, rank=0, world_size=1, verify_first=True)
    assert equal(found, state(0))
    assert equal(safepoint.load(url, step=1), state(1)), "an older step by explicit choice only"
    assert "block 2" in cli("verify", "--store", url, code=1)
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(safepoint.Corrupt):
        safepoint.load(url)


def test_f68_a_missing_shard_is_named(daemon_with_store: Daemon, base: Path, url: str, open_job: Job) -> None:
    job = open_job(daemon_with_store, "train")
    for step in (1, 2):
        job.save(step, state(step), durable=True).wait("durable", timeout=30)
    (folder,) = base.glob("train/step-2/*")
    (folder / "rank-0.safetensors").unlink()
    with pytest.raises(safepoint.Incomplete, match=r"step-2/.*rank-0\.safetensors is missing"):
        safepoint.load(url)
    assert "rank-0.safetensors is missing" in cli("verify", "--store", url, "2", code=1)
    (folder / "rank-0.crc32c").unlink()
    with pytest.raises(safepoint.Incomplete, match=r"rank-0\.crc32c is missing"):
        safepoint.load(url)
    (folder / "manifest.json").unlink()
    assert equal(safepoint.load(url), state(1)), "without its manifest it is no step"


@pytest.fixture
def three_steps(daemon_with_store: Daemon, open_job: Job) -> None:
    """Steps 1, 2 and 3 of namespace train."""
    job = open_job(daemon_with_store, "train")
    for step in (1, 2, 3):
        job.save(step, state(step), durable=True).wait("durable", timeout=30)


def damage(base: Path, step: int, namespace: str = "train") -> Path:
    (manifest,) = base.glob(f"{namespace}/step-{step}/*/manifest.json")
    manifest.write_text("{}")
    return manifest


def test_damage_of_older_steps_keeps_nobody_from_the_newest(
    three_steps: None, daemon_with_store: Daemon, base: Path, url: str
) -> None:
    damage(base, 1)
    (lineage,) = base.glob("train/step-2/*/lineage.json")
    lineage.unlink()
    assert equal(safepoint.load(url), state(3))
    found = state(0)
    assert safepoint.load_into(url, found, rank=0, world_size=1).step == 3 and equal(found, state(3))
    found = state(0)
    dcp.load(found, storage_reader=dcp.Reader(url))
    assert equal(found, state(3))
    assert "train-3 step 3: " in cli("import", url, "--socket", daemon_with_store.socket, "--namespace", "train-3")
    with pytest.raises(safepoint.Corrupt, match=str(base / "train" / "step-1")):
        safepoint.load(url, step=1)


def test_what_is_newest_the_stores_clock_says_not_the_number(three_steps: None, base: Path, url: str) -> None:
    """Of a job that was rolled back: a damaged step of a larger number that was made before the newest one."""
    manifest = damage(base, 3)
    hour_ago = time.time() - 3600
    os.utime(manifest, (hour_ago, hour_ago))
    assert equal(safepoint.load(url), state(2))


def test_f68_a_damaged_newest_step_is_named_and_an_older_one_can_be_chosen(
    three_steps: None, base: Path, url: str
) -> None:
    manifest = damage(base, 3)
    with pytest.raises(safepoint.Corrupt, match=re.escape(str(manifest)) + r".*older one.*step="):
        safepoint.load(url)
    assert equal(safepoint.load(url, step=2), state(2))
    with pytest.raises(safepoint.Corrupt) as caught:
        safepoint.load(url, step=3)
    assert "older" not in str(caught.value), "who has chosen is not told to choose"


def test_steps_that_go_between_listing_and_reading_are_passed_over(
    three_steps: None, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Late:
        """A store that somebody deletes from after it was listed."""

        gone: tuple[int, ...] = ()

        def __init__(self, url: str) -> None:
            self._store = _core.Store(url)

        def steps(self, ns: str) -> list[_core.StepName]:
            names = self._store.steps(ns)
            for name in names:
                if name.step in self.gone:
                    self._store.delete(name)
            return names

        def __getattr__(self, name: str) -> Any:
            return getattr(self._store, name)

    monkeypatch.setattr(_stored, "_core", SimpleNamespace(Store=Late))
    Late.gone = (1,)
    assert equal(safepoint.load(url), state(3))
    Late.gone = (3,)
    assert equal(safepoint.load(url), state(2))
    Late.gone = (2,)
    with pytest.raises(safepoint.NotFound, match="deleted since"):
        safepoint.load(url)


def test_ls_and_verify_go_on_past_a_damaged_step(three_steps: None, base: Path, url: str) -> None:
    manifest = str(damage(base, 2))
    listed = json.loads(cli("ls", "--store", url, "--json"))
    assert [(s["step"], s["state"]) for s in listed] == [(3, "complete"), (1, "complete"), (2, "corrupt")]
    assert manifest in listed[2]["reason"] and listed[2]["bytes"] is None
    assert "corrupt" in cli("ls", "--store", url)
    told = json.loads(cli("verify", "--store", url, "--json", code=1).partition("\nCORRUPT")[0])
    assert told["steps"] == [3, 1] and [(c["step"], c["state"]) for c in told["corrupt"]] == [(2, "corrupt")]
    assert f"CORRUPT: step 2: file://{manifest}" in cli("verify", "--store", url, code=1)


def test_verify_of_one_step_reads_no_other(three_steps: None, base: Path, url: str) -> None:
    manifest = str(damage(base, 2))
    assert "every block matches" in cli("verify", "--store", url, "1")
    assert manifest in cli("verify", "--store", url, "2", code=1)
    assert "no complete step 4" in cli("verify", "--store", url, "4", code=1)


def test_ls_of_a_store_lists_all_namespaces(daemon_with_store: Daemon, url: str, open_job: Job) -> None:
    for name in ("one", "two"):
        open_job(daemon_with_store, name).save(1, state(1), durable=True).wait("durable", timeout=30)
    listed = json.loads(cli("ls", "--store", url, "--json"))
    assert [(s["namespace"], s["step"]) for s in listed] == [("one", 1), ("two", 1)]
    table = cli("ls", "--store", url)
    assert all(word in table for word in ("namespace", "one", "two"))
    assert [s["namespace"] for s in json.loads(cli("ls", "--store", url, "-n", "two", "--json"))] == ["two"]


def test_a_place_without_steps_is_told_by_ls_and_gc(three_steps: None, base: Path, url: str) -> None:
    (base / "empty").mkdir()
    assert f"{url} has no whole step of namespace typo" in cli("ls", "--store", url, "-n", "typo", code=1)
    assert f"{url}/empty has no whole step" in cli("ls", "--store", f"{url}/empty", code=1)
    for place in ("train", "empty"):
        assert f"NotFound: {url}/{place} has no step, " in cli("gc", f"{url}/{place}", "--keep-last", "1", code=1)
    told = cli("gc", url, "--keep-last", "1", "-n", "typo", code=1)
    assert f"NotFound: {url} has no step in namespace typo, " in told


def test_gc_goes_on_when_a_step_cannot_be_deleted(three_steps: None, base: Path, url: str) -> None:
    (folder,) = base.glob("train/step-2/*")
    folder.chmod(0o555)
    command = [*without_roots_rights(), *COMMAND, "gc", url, "--keep-last", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stdout + done.stderr
    assert not (base / "train" / "step-1").exists(), "it comes after the one that failed"
    for step, what in ((3, "stays"), (2, "failed"), (1, "deleted")):
        assert re.search(rf"│ {step} +│ 2\.68 MiB │ {what} +│", done.stdout), done.stdout
    assert re.search(r": 2\.68\s+MiB\s+freed", done.stdout), "of step 1 alone"
    assert f"{url}/train/step-2/{folder.name}: Denied: " in done.stderr
    folder.chmod(0o755)
    cli("gc", url, "--keep-last", "1")
    assert not folder.exists()


def test_f61_workers_killed_while_steps_drain(daemon_with_store: Daemon, base: Path, url: str, open_job: Job) -> None:
    job = open_job(daemon_with_store, "train")
    saves = []
    for step in range(1, 13):
        saves.append((step, job.save(step, state(step), durable=step % 3 == 0)))
        daemon_with_store.kill_worker()
        saves[-1][1].wait(timeout=30)
    for step, save in saves:
        if step % 3 == 0:
            assert save.wait("durable", timeout=60) == "durable"
    for step in (3, 6, 9, 12):
        assert equal(safepoint.load(url, step=step), state(step))
    cli("verify", "--store", url)
    eventually(lambda: not list(base.rglob(".safepoint-upload-*")), "I-24: no litter")
    assert len(list(base.glob("train/step-*/*"))) == 4


def test_i22_without_the_store_saves_go_on(start_daemon: Start, tmp_path: Path, open_job: Job) -> None:
    """A missing directory, as where a file system is not mounted: never made, and never taken for an empty one."""
    base = tmp_path / "mount"
    daemon = start_daemon(f"--store=file://{base}", "--retain=1")
    with pytest.raises(safepoint.Unavailable, match="mount"):
        open_job(daemon, "early").save(1, state(1))
    assert "mount" in cli("status", "--socket", daemon.socket)
    assert daemon.status()["not_listed"][0]["namespace"] == "early"
    base.mkdir()
    eventually(lambda: can_save(open_job, daemon), "the store is listed")
    job = open_job(daemon, "train")
    job.save(1, state(1), durable=True).wait("durable", timeout=30)
    shutil.rmtree(base)
    waiting = job.save(2, state(2), durable=True)
    waiting.wait(timeout=30)
    eventually(
        lambda: bool(daemon.status()["drains"]) and daemon.status()["drains"][0]["failures"] > 0, "trouble is shown"
    )
    job.save(3, state(3)).wait(timeout=30)
    assert "mount" in cli("status", "--socket", daemon.socket)
    assert not base.exists()
    base.mkdir()
    assert waiting.wait("durable", timeout=60) == "durable"
    trouble = daemon.events("drain_in_trouble")
    assert len(trouble) == 1 and "mount" in trouble[0]["why"], "F64: once per interval, naming the place"


def can_save(open_job: Job, daemon: Daemon) -> bool:
    try:
        job = open_job(daemon)
        job.save(1, {"x": torch.zeros(1)}).wait(timeout=10)
    except safepoint.Unavailable:
        return False
    return True


def test_without_a_store_durable_is_refused_at_once(daemon: Daemon, open_job: Job) -> None:
    job = open_job(daemon)
    with pytest.raises(safepoint.Unavailable, match="store"):
        job.save(1, state(1), durable=True)
    save = job.save(2, state(2))
    with pytest.raises(safepoint.InvalidArgument, match="durable tier"):
        save.wait("durable", timeout=5)


def test_not_asked_for_is_said_at_once(daemon_with_store: Daemon, open_job: Job) -> None:
    save = open_job(daemon_with_store).save(1, state(1))
    save.wait(timeout=30)
    with pytest.raises(safepoint.InvalidArgument, match="durable=True"):
        save.wait("durable", timeout=30)


def test_a_daemon_that_is_to_end_drains_first(start_daemon: Start, url: str, open_job: Job) -> None:
    daemon = start_daemon(f"--store={url}", "--grace=60s")
    job = open_job(daemon, "train")
    saves = [job.save(step, state(step), durable=True) for step in (1, 2)]
    for save in saves:
        save.wait(timeout=30)
    assert daemon.stop() == 0
    assert equal(safepoint.load(url, step=1), state(1)) and equal(safepoint.load(url, step=2), state(2))


def test_policy_every_nth_step(start_daemon: Start, url: str, open_job: Job) -> None:
    daemon = start_daemon(f"--store={url}", "--durable-every=5")
    job = open_job(daemon, "train")
    for step in range(1, 11):
        save = job.save(step, state(step))
        save.wait(timeout=30)
        if step % 5 == 0:
            assert save.wait("durable", timeout=30) == "durable"
    listed = json.loads(cli("ls", "--store", url, "--json"))
    assert [(s["step"], s["level"]) for s in listed] == [(10, "durable"), (5, "durable")]


def test_the_rate_of_a_drain_is_bounded(start_daemon: Start, url: str, open_job: Job) -> None:
    daemon = start_daemon(f"--store={url}", "--drain-rate=1MiB")
    job = open_job(daemon, "train")
    began = time.monotonic()
    save = job.save(1, state(1), durable=True)  # 2.7 MiB.
    save.wait(timeout=30)
    eventually(lambda: any(d["bytes_done"] for d in daemon.status()["drains"]), "its progress is shown")
    assert save.wait("durable", timeout=60) == "durable"
    assert time.monotonic() - began > 1.5


def test_gc_keeps_what_its_rule_says(daemon_with_store: Daemon, base: Path, url: str, open_job: Job) -> None:
    job = open_job(daemon_with_store, "train")
    for step in range(1, 8):
        job.save(step, {"x": torch.full((5,), step)}, durable=True).wait("durable", timeout=30)
    foreign = base / "train" / "notes.txt"
    foreign.write_text("mine")
    beside = next(base.glob("train/step-1/*")) / "README"
    beside.write_text("mine, too")
    rule = ("gc", url, "--keep-last", "2", "--keep-every", "4")
    told = json.loads(cli(*rule, "--dry-run", "--json"))
    assert {s["step"] for s in told["steps"] if s["what"] == "would go"} == {1, 2, 3, 5}
    assert len(list(base.glob("train/step-*/*/manifest.json"))) == 7, "a dry run deletes nothing"
    cli(*rule)
    assert [s["step"] for s in json.loads(cli("ls", "--store", url, "--json"))] == [7, 6, 4]
    assert foreign.read_text() == "mine" and beside.read_text() == "mine, too"
    assert [p.name for p in base.glob("train/step-1/*/*")] == ["README"]
    cli("gc", url, "--keep-last", "1", "--namespace", "other", code=1)
    cli("gc", url, "--keep-every", "4", code=2)
    cli("gc", url, "--keep-for", "7", code=2)


def test_gc_goes_by_the_stores_clock_and_finishes_what_was_cut_short(
    daemon_with_store: Daemon, base: Path, url: str, open_job: Job
) -> None:
    job = open_job(daemon_with_store, "train")
    for step in range(1, 6):
        job.save(step, {"x": torch.full((5,), step)}, durable=True).wait("durable", timeout=30)
    hour, now = 3600, int(time.time())
    for step in range(1, 6):
        (manifest,) = base.glob(f"train/step-{step}/*/manifest.json")
        os.utime(manifest, (now - (5 - step) * hour, now - (5 - step) * hour))
    (cut_short,) = base.glob("train/step-4/*")
    (cut_short / "deleting.json").write_text("{}")
    (cut_short / "manifest.json").unlink()
    cli("gc", url, "--keep-for", "2h")
    assert [s["step"] for s in json.loads(cli("ls", "--store", url, "--json"))] == [5, 3]
    assert not cut_short.exists()
    assert not list(base.glob("train/step-1"))


def test_gc_leaves_what_it_cannot_read(daemon_with_store: Daemon, base: Path, url: str, open_job: Job) -> None:
    job = open_job(daemon_with_store, "train")
    for step in range(1, 5):
        job.save(step, {"x": torch.full((5,), step)}, durable=True).wait("durable", timeout=30)
    (damaged,) = base.glob("train/step-2/*/manifest.json")
    damaged.write_text("{}")
    (remains := base / "gone" / "step-7" / ("a" * 32)).mkdir(parents=True)
    (remains / "deleting.json").write_text("{}")
    told = json.loads(cli("gc", url, "--keep-last", "1", "--json"))
    what = {(row["namespace"], row["step"]): (row["what"], row["why"]) for row in told["steps"]}
    assert {key for key, (verb, _) in what.items() if verb == "deleted"} == {("train", 1), ("train", 3), ("gone", 7)}
    assert what["train", 2][0] == "stays" and str(damaged) in what["train", 2][1]
    assert not (base / "gone").exists()


def test_a_daemon_deletes_what_its_rule_lets_go(start_daemon: Start, url: str, base: Path, open_job: Job) -> None:
    rule = ("--durable-every=1", "--durable-keep-last=2", "--durable-keep-every=4")
    daemon = start_daemon(f"--store={url}", "--retain=1", *rule)
    job = open_job(daemon, "kept")
    for step in range(1, 10):
        job.save(step, {"x": torch.full((5,), step)}).wait("durable", timeout=30)

    def stored() -> list[int]:
        return sorted(int(p.parent.parent.name.removeprefix("step-")) for p in base.glob("kept/*/*/manifest.json"))

    eventually(lambda: stored() == [4, 8, 9], "the others go")
    # Their manifests go first, then the rest, then it is told.
    eventually(lambda: daemon.status()["durable"]["deleted"] == 6, "their deletion is told")
    assert sorted(p.name for p in base.glob("kept/*")) == ["step-4", "step-8", "step-9"]
    deleted = daemon.events("stored_step_deleted")
    assert {int(line["step"]) for line in deleted} == {1, 2, 3, 5, 6, 7}
    assert all("not among the newest 2" in line["why"] for line in deleted)
    assert equal_tensor(job, 4)


def equal_tensor(job: safepoint.Checkpointer, step: int) -> bool:
    into = {"x": torch.zeros(5, dtype=torch.int64)}
    job.restore(into, step=step)
    return bool((into["x"] == step).all())


def test_export_and_show_from_a_store(daemon_with_store: Daemon, url: str, open_job: Job, tmp_path: Path) -> None:
    job = open_job(daemon_with_store, "train")
    job.save(40, state(40), durable=True).wait("durable", timeout=30)
    shown = json.loads(cli("show", "40", "--store", url, "--json", "--tensors"))
    assert shown["shards"][0]["tensors"]["model.w"]["shape"] == [700, 1000]
    cli("export", str(tmp_path / "out"), "--store", url)
    tensors = safetensors.torch.load_file(tmp_path / "out" / "rank-0.safetensors")
    assert torch.equal(tensors["model.w"], state(40)["model"]["w"])


def test_a_step_of_memory_is_made_durable_by_hand(
    daemon_with_store: Daemon, start_daemon: Start, url: str, open_job: Job
) -> None:
    job = open_job(daemon_with_store, "late")
    job.save(7, {"x": torch.full((5,), 7)})
    told = cli("make-durable", "7", "--socket", daemon_with_store.socket, "--json")
    assert json.loads(told)["level"] == "durable"
    assert bool((safepoint.load(url, namespace="late", step=7)["x"] == 7).all())
    assert "durable" in cli("make-durable", "7", "--socket", daemon_with_store.socket)  # Again: it is.
    assert "NotFound" in cli("make-durable", "8", "--socket", daemon_with_store.socket, code=1)
    without = start_daemon()
    open_job(without, "late").save(7, {"x": torch.zeros(1)})
    assert "Unavailable" in cli("make-durable", "7", "--socket", without.socket, code=3)


def test_a_step_moves_to_another_store_by_copying_its_folder(
    daemon_with_store: Daemon, url: str, base: Path, tmp_path: Path, open_job: Job
) -> None:
    job = open_job(daemon_with_store, "moved")
    job.save(7, {"x": torch.full((5,), 7)}, durable=True).wait("durable", timeout=30)
    shutil.copytree(base, tmp_path / "other")
    other = f"file://{tmp_path}/other"
    assert bool((safepoint.load(other)["x"] == 7).all())
    assert "every block matches" in cli("verify", "--store", other)


def test_i38_a_store_that_may_not_be_read_is_denied_by_name(base: Path, url: str) -> None:
    base.chmod(0)
    command = [*without_roots_rights(), sys.executable, "-c", f"import safepoint; safepoint.load({url!r})"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "safepoint.errors.Denied: " in done.stderr and str(base) in done.stderr, done.stderr


def test_settings_of_a_store_are_checked_at_start(start_daemon: Start, tmp_path: Path) -> None:
    for flag, said in (
        ("--store=gopher://x", "no URL of a store"),
        ("--store=file://relative/path", "file:"),
        ("--store=/plain/path", "no URL of a store"),
        ("--durable-every=5", "needs a store"),
    ):
        with pytest.raises(AssertionError, match=said):
            start_daemon(flag)


def test_import_brings_a_durable_step_into_another_daemons_memory(
    daemon_with_store: Daemon, start_daemon: Start, url: str, open_job: Job, tmp_path: Path
) -> None:
    """From the shell: every rank's own parts, the step's own number unless another is given, and never by surprise."""
    job = open_job(daemon_with_store, "train")
    for step in (40, 41):
        part = state(step) | {"rng": safepoint.PerRank(torch.full((3,), float(step)))}
        job.save(step, part, durable=True).wait("durable", timeout=30)
    other = start_daemon()
    to = ("--socket", other.socket, "--namespace")
    told = json.loads(cli("import", url, *to, "newest", "--json"))
    assert (told["step"], told["format"], told["verified"], told["skipped"]) == (41, "store", True, [])
    assert "train-40 step 7: " in cli("import", f"{url}/train/step-40", *to, "train-40", "--step", "7")
    for name, step, number in (("newest", 41, 41), ("train-40", 40, 7)):
        found: dict[str, Any] = state(0) | {"rng": safepoint.PerRank(torch.zeros(3))}
        info = open_job(other, name).restore(found)
        assert info is not None and (info.step, info.source) == (number, "memory")
        assert equal(found, state(step)) and found["rng"].value.tolist() == [step] * 3
    cli("import", url, *to, "below", "--prefix", "a.b")
    below = {"a": {"b": state(0)}}
    assert open_job(other, "below").restore(below) is not None and equal(below["a"]["b"], state(41))
    assert "--existing" in cli("import", url, *to, "newest", code=2)
    cli("import", url, *to, "newest", "--existing")
    assert "--format" in cli("import", url, *to, "x", "--format", "hf", code=2)
    assert "--step" in cli("import", str(tmp_path), *to, "x", code=2)
    assert "whole steps: 40, 41" in cli("import", f"{url}/train/step-42", *to, "x", code=1)


def test_import_of_a_step_with_pickled_values(daemon_with_store: Daemon, url: str, monkeypatch: Any) -> None:
    monkeypatch.setenv("SAFEPOINT_SOCKET", daemon_with_store.socket)
    with safepoint.Checkpointer("train", rank=0, world_size=1, allow_pickle=True) as job:
        job.save(1, {"w": torch.ones(2), "odd": slice(1, 2)}, durable=True).wait("durable", timeout=30)
    to = ("--socket", daemon_with_store.socket, "--namespace")
    assert "NotPlain: odd" in cli("import", url, *to, "a", code=1)
    assert json.loads(cli("import", url, *to, "b", "--skip-not-plain", "--json").partition("\nleft")[0])["skipped"] == [
        "odd"
    ]
    cli("import", f"{url}/train/step-1", *to, "c", "--allow-pickle")
    with safepoint.Checkpointer("c", rank=0, world_size=1, allow_pickle=True) as job:
        found: dict[str, Any] = {"w": torch.zeros(2), "odd": None}
        assert job.restore(found) is not None and found["odd"] == slice(1, 2)
