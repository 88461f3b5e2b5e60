"""Checkpointer with the real extension and daemon."""

from __future__ import annotations

import gc
import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed
from states import bits, same
from test_checkpointer import everything, model_and_optimizer, train_step

import safepoint
from safepoint import _connect, _core, _engine, _launch, errors
from safepoint._reads import Shards
from safepoint._save import Save

HERE = Path(__file__).parent


@pytest.fixture
def checkpointer(namespace: str) -> Iterator[safepoint.Checkpointer]:
    with safepoint.Checkpointer(namespace, rank=0, world_size=1) as made:
        yield made


def run_python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a program that finds this folder's modules; the caller looks at its exit status."""
    path = os.pathsep.join([str(HERE), *sys.path])
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        env={**os.environ, **environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_every_state_kind_comes_back_in_another_process(checkpointer: safepoint.Checkpointer, namespace: str) -> None:
    """I-34, I-8: saved by a process that is gone, without any unpickler in either."""
    code = """
        import os, pickle, sys
        import safepoint
        from test_checkpointer import everything
        def poison(*a, **k): raise AssertionError("pickle")
        for name in ("loads", "load", "dumps", "dump"): setattr(pickle, name, poison)
        safepoint.Checkpointer(sys.argv[1], rank=0, world_size=1).save(7, everything(1)).wait(timeout=30)
        os.kill(os.getpid(), 9)
    """
    assert run_python(code, namespace).returncode == -signal.SIGKILL
    target = everything(2)
    info = checkpointer.restore(target, verify_first=True)
    assert info is not None and (info.step, info.source) == (7, "memory")
    same(everything(1), target)


def test_poisoned_unpickler(checkpointer: safepoint.Checkpointer, monkeypatch: pytest.MonkeyPatch) -> None:
    def poison(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("pickle was used")

    for name in ("loads", "load", "dumps", "dump", "Unpickler"):
        monkeypatch.setattr(pickle, name, poison)
    checkpointer.save(1, everything(1)).wait(timeout=30)
    target = everything(2)
    checkpointer.restore(target)
    same(everything(1), target)


def test_continues_bit_for_bit(checkpointer: safepoint.Checkpointer) -> None:
    model, optimizer, scheduler = model_and_optimizer(1, 3)
    checkpointer.save(3, {"model": model, "optim": optimizer, "sched": scheduler}).wait(timeout=30)
    other = model_and_optimizer(2, 0)
    assert checkpointer.restore(dict(zip(("model", "optim", "sched"), other, strict=True)))
    for i in range(3, 6):
        train_step(model, optimizer, scheduler, i)
        train_step(*other, i)
    same(model, other[0])
    same(optimizer.state_dict(), other[1].state_dict())


def test_guarded_copy_is_isolated(namespace: str) -> None:
    """I-9: what optimizer.step() and others change right after the call is not in the checkpoint."""
    parameters = [torch.nn.Parameter(torch.randn(1 << 18)) for _ in range(20)]
    optimizer = torch.optim.SGD(parameters, lr=1.0, momentum=0.9)
    loose = torch.randn(1 << 18)
    for p in parameters:
        p.grad = torch.ones_like(p)
    with safepoint.Checkpointer(namespace, rank=0, world_size=1, mode="guarded", optimizers=optimizer) as c:
        for step in range(1, 6):
            expected = [p.detach().clone() for p in parameters], loose.clone()
            save = c.save(step, {"p": list(parameters), "o": optimizer, "loose": loose})
            loose.add_(1)
            optimizer.step()
            save.wait(timeout=30)
            target = {"p": [torch.zeros(1 << 18) for _ in parameters], "loose": torch.zeros(1 << 18)}
            assert c.restore(target)
            for got, want in zip(target["p"], expected[0], strict=True):
                assert bits(got) == bits(want)
            assert bits(target["loose"]) == bits(expected[1])


def test_interrupted_save_never_counts(checkpointer: safepoint.Checkpointer, monkeypatch: pytest.MonkeyPatch) -> None:
    """I-9: whoever interrupts a blocking save goes on and may change what is being copied, so it must not be sealed."""
    state = {"w": torch.ones(1 << 22)}
    checkpointer.save(1, state).wait(timeout=30)
    waited = Save.wait_safe

    def interrupted(self: Save, timeout: float | None = None) -> None:
        raise KeyboardInterrupt

    engine = checkpointer._engine
    monkeypatch.setattr(Save, "wait_safe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.save(2, state, hold=True)  # Held, so that it cannot be whole before the interruption.
    monkeypatch.setattr(Save, "wait_safe", waited)
    with pytest.raises(errors.Closed, match="interrupted by KeyboardInterrupt"):
        engine._in_flight[-1].wait_sealed(timeout=30)
    state["w"].zero_()
    assert [info.step for info in checkpointer.steps()] == [1]
    assert checkpointer.restore(state).step == 1 and bool((state["w"] == 1).all())  # type: ignore[union-attr]
    checkpointer.save(3, state).wait(timeout=30)


def test_ranks_that_restart_with_a_size_hint_leave_each_other_room(
    namespace: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A pool of three slots for each rank, as many as its steps need: the rank that comes first takes its own ones."""
    store = torch.distributed.HashStore()
    monkeypatch.setattr(_launch, "store_for", lambda rank, world_size: store)
    size = 36 << 20  # With what is added to a hint six slots are 240 of the 256 MiB.
    states = [{f"part{rank}": torch.full((size // 4,), float(rank))} for rank in range(2)]
    for launch in range(2):
        ranks = [safepoint.Checkpointer(namespace, rank=rank, world_size=2, size_hint=size) for rank in range(2)]
        for step in range(4 * launch, 4 * launch + 4):
            with ThreadPoolExecutor() as threads:
                begun = [threads.submit(ranks[rank].save, step, states[rank]) for rank in range(2)]
                saves = [future.result() for future in begun]
            assert [save.wait(timeout=30) for save in saves] == ["memory", "memory"]
        for checkpointer in ranks:
            checkpointer.close()
    assert "does not fit" not in caplog.text


@pytest.mark.parametrize(
    "wrong",
    [
        {"namespace": 7},
        {"rank": "0", "world_size": "1"},
        {"rank": 1.5, "world_size": 2},
        {"size_hint": -1},
        {"size_hint": "1GB"},
        {"size_hint": 1 << 50},
        {"mode": "guarded", "optimizers": [3]},
        {"mode": "sometimes"},
    ],
)
def test_wrong_arguments_are_told_before_anything_is_asked(wrong: dict[str, Any]) -> None:
    with pytest.raises(errors.InvalidArgument):
        safepoint.Checkpointer(**{"namespace": "arguments", **wrong})


def test_several_in_flight_and_retention(checkpointer: safepoint.Checkpointer) -> None:
    saves = [checkpointer.save(step, {"x": torch.full((1000,), step)}) for step in range(6)]
    assert saves[-1].wait(timeout=30) == "memory" and saves[-1].level == "memory"
    assert [info.step for info in checkpointer.steps()][:2] == [5, 4]
    latest = checkpointer.latest()
    assert latest is not None and latest.attempt == saves[-1].attempt
    with pytest.raises(errors.NotFound):
        checkpointer.restore({"x": torch.zeros(1000)}, step=77)


def test_outcomes_of_a_new_namespace(checkpointer: safepoint.Checkpointer) -> None:
    assert checkpointer.restore({"x": 1}) is None and checkpointer.latest() is None and checkpointer.steps() == []
    with pytest.raises(errors.NotFound):
        checkpointer.restore({"x": 1}, step=1)


def test_state_larger_than_the_pool(checkpointer: safepoint.Checkpointer) -> None:
    with pytest.raises(errors.NoSpace, match=r"\d"):
        checkpointer.save(1, {"x": torch.empty(300 << 20, dtype=torch.uint8)})
    assert checkpointer.save(2, {"x": torch.ones(3)}).wait(timeout=30) == "memory"


def test_two_jobs_in_one_namespace(checkpointer: safepoint.Checkpointer, namespace: str) -> None:
    """I-21."""
    checkpointer.save(1, {"x": 1}).wait(timeout=30)
    code = """
        import sys, safepoint
        c = safepoint.Checkpointer(sys.argv[1], rank=0, world_size=1)
        state = {"x": 0}
        assert c.restore(state).step == 1 and state == {"x": 1}
        c.save(2, {"x": 2}).wait(timeout=30)
    """
    done = run_python(code, namespace)
    assert done.returncode == 0, done.stderr
    with pytest.raises(errors.Fenced):
        checkpointer.save(3, {"x": 3})


def test_shard_opens_in_safetensors(checkpointer: safepoint.Checkpointer, namespace: str, tmp_path: Path) -> None:
    state = {"a": torch.randn(300, 300), "b": torch.randn(5).bfloat16()}
    checkpointer.save(1, {**state, "v": [1, 2]}).wait(timeout=30)
    client = _core.Client(os.environ["SAFEPOINT_SOCKET"])
    with client.open_read(namespace) as pin, open(tmp_path / "x", "wb") as file:
        pin.shard(0).copy_to_file(file.fileno())
    loaded = safetensors.torch.load_file(tmp_path / "x")
    assert {k: bits(v) for k, v in loaded.items()} == {k: bits(v) for k, v in state.items()}


def test_gil_is_released_during_copies(checkpointer: safepoint.Checkpointer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread runs while the extension copies. Without a forced switch, only a released lock lets it run."""
    state = {"x": torch.ones(60 << 20, dtype=torch.uint8)}
    checkpointer.save(1, state).wait(timeout=30)
    counted = 0
    during: dict[str, int] = {}
    stop = threading.Event()

    def count() -> None:
        nonlocal counted
        while not stop.is_set():
            counted += 1
            time.sleep(0)  # Gives the lock up for whoever waits for it.

    def measured(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            before = counted
            result = call(*args)
            during[name] = during.get(name, 0) + counted - before
            return result

        return run

    class Reader:
        def __init__(self, real: Any) -> None:
            self.header, self.static_offset = real.header, real.static_offset
            self.read = measured("read", real.read)

    original = Shards.reader
    monkeypatch.setattr(Shards, "reader", lambda self, rank: Reader(original(self, rank)))
    monkeypatch.setattr(_engine, "start_copy", measured("copy", _engine.start_copy))
    monkeypatch.setattr(Save, "wait_safe", measured("copy", Save.wait_safe))
    interval = sys.getswitchinterval()
    thread = threading.Thread(target=count)
    try:
        sys.setswitchinterval(1000)
        thread.start()
        save = checkpointer.save(2, state)
        checkpointer.restore({"x": torch.zeros(60 << 20, dtype=torch.uint8)})
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        thread.join()
    save.wait(timeout=30)
    assert during["copy"] > 0 and during["read"] > 0


def test_forked_child_is_refused_and_harms_nothing(checkpointer: safepoint.Checkpointer) -> None:
    state = {"x": torch.arange(1000)}
    checkpointer.save(1, state).wait(timeout=30)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            for call in (lambda: checkpointer.save(2, state), lambda: checkpointer.restore(state), checkpointer.latest):
                try:
                    call()
                except errors.Unavailable:
                    os.write(write, b"U")
            checkpointer.close()
            gc.collect()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert os.read(read, 10) == b"UUU"
    os.close(read)
    os.close(write)
    assert checkpointer.save(2, state).wait(timeout=30) == "memory"


@pytest.mark.parametrize("mode", ["blocking", "guarded"])
def test_interpreter_exit_with_saves_in_flight(namespace: str, mode: str) -> None:
    code = """
        import sys, torch, safepoint
        p = torch.nn.Parameter(torch.randn(4 << 20))
        o = torch.optim.SGD([p], lr=1.0)
        guard = {"mode": "guarded", "optimizers": o} if sys.argv[2] == "guarded" else {}
        c = safepoint.Checkpointer(sys.argv[1], rank=0, world_size=1, **guard)
        for step in range(4):
            c.save(step, {"p": p, "step": step})
        print("end", flush=True)
    """
    done = run_python(code, namespace, mode)
    assert (done.returncode, done.stdout) == (0, "end\n"), done.stderr
    with safepoint.Checkpointer(namespace, rank=0, world_size=1) as c:
        latest = c.latest()
        assert latest is not None and latest.step == 3


def test_dropping_everything_at_once(namespace: str) -> None:
    """No reference is left to Checkpointer, Save or tensors while a copy runs."""
    for _ in range(5):
        parameter = torch.nn.Parameter(torch.randn(1 << 20))
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        c = safepoint.Checkpointer(namespace, rank=0, world_size=1, mode="guarded", optimizers=optimizer)
        c.save(1, {"p": parameter})
        del c, parameter, optimizer
        gc.collect()
        torch.full((1 << 20,), 7.0)


def test_private_daemon_is_started_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("SAFEPOINT_SOCKET", raising=False)
    monkeypatch.setattr(_connect, "NODE_SOCKET", str(tmp_path / "none"))
    original = _connect.find_endpoint
    monkeypatch.setattr(_connect, "find_endpoint", lambda **k: original(node_socket=str(tmp_path / "none"), **k))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("SAFEPOINTD_POOL", "64MiB")
    monkeypatch.setenv("SAFEPOINTD_IDLE_EXIT", "1s")
    monkeypatch.setenv("SAFEPOINTD_IDLE_EXIT_HOLDING", "2s")
    with caplog.at_level("INFO", logger="safepoint"):
        first = safepoint.Checkpointer("a", rank=0, world_size=1)
    second = safepoint.Checkpointer("b", rank=0, world_size=1)
    assert first._engine.client.daemon.private and first._engine.client.daemon.pid == second._engine.client.daemon.pid
    (line,) = [r.message for r in caplog.records if "private daemon" in r.message]
    assert "2s" in line and str(tmp_path / "safepoint" / "safepointd.log") in line
    first.save(1, {"x": 1}).wait(timeout=30)
    first.close()
    second.close()
    end = time.monotonic() + 30
    while os.path.exists(first._engine.client.socket_path) and time.monotonic() < end:
        time.sleep(0.05)  # Its own clock decides; there is nothing to wait on.
    with pytest.raises(errors.Unavailable):
        _core.Client(first._engine.client.socket_path)


RANKS = """
import json, os, sys
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
import safepoint
from leaving import leave
from states import bits

dist.init_process_group("gloo")
rank, world_size = dist.get_rank(), dist.get_world_size()
mode, namespace, results = sys.argv[1:4]

def tell(attempt):
    with open(os.path.join(results, f"{mode}-{world_size}-{rank}"), "w") as file:
        file.write(attempt.hex())

def model(seed):
    torch.manual_seed(seed)
    m = DistributedDataParallel(torch.nn.Linear(64, 64))
    o = torch.optim.AdamW(m.parameters())
    m(torch.ones(2, 64)).sum().backward()
    o.step()
    return {"model": m, "optim": o, "step": seed, "rng": safepoint.PerRank(torch.full((10,), rank + seed))}

def sharded(seed):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    mesh = init_device_mesh("cpu", (world_size,))
    whole = torch.randn(50, 33, generator=torch.Generator().manual_seed(seed))
    return {str(p): distribute_tensor(whole, mesh, [p]) for p in (Shard(0), Shard(1), Replicate())}, whole

calls = []
for name in ("all_reduce", "broadcast", "all_gather", "all_gather_object", "gather_object", "barrier"):
    setattr(dist, name, lambda *a, _n=name, _f=getattr(dist, name), **k: (calls.append(_n), _f(*a, **k))[1])
c = safepoint.Checkpointer(namespace)
if mode == "save":
    tensors, _ = sharded(5)
    for step in range(3):
        save = c.save(step, {**model(1), **tensors})
    save.wait(timeout=60)
    assert not calls, calls
    tell(save.attempt)
else:
    state = model(2)
    tensors, _ = sharded(6)
    info = c.restore({**state, **tensors})
    expected, (_, whole) = model(1), sharded(5)
    assert info.step == 2 and state["rng"].value[0] == (rank + 1 if rank < info.world_size else rank + 2)
    for key, value in expected["model"].state_dict().items():
        assert bits(value) == bits(state["model"].state_dict()[key]), key
    for key, entry in expected["optim"].state_dict()["state"].items():
        for name, value in entry.items():
            assert bits(value) == bits(state["optim"].state_dict()["state"][key][name]), name
    for value in tensors.values():
        assert bits(value.full_tensor()) == bits(whole)
    tell(info.attempt)
c.close()
dist.destroy_process_group()
leave()
"""


def torchrun(folder: Path, ranks: int, mode: str, namespace: str) -> list[str]:
    """Runs RANKS; what every rank told, in the order of the ranks. A file each: in one pipe their lines can mix."""
    script = folder / "ranks.py"
    script.write_text(RANKS)
    path = os.pathsep.join([str(HERE), *sys.path])
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={ranks}",
        str(script),
        mode,
        namespace,
        str(folder),
    ]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-6000:]
    return [(folder / f"{mode}-{ranks}-{rank}").read_text() for rank in range(ranks)]


def test_ranks_under_torchrun_and_another_world_size(namespace: str, tmp_path: Path) -> None:
    """I-4, I-7, I-18: DDP, DTensors, PerRank; 2 ranks save, 2, 1 and 3 restore the same attempt."""
    saved = torchrun(tmp_path, 2, "save", namespace)
    assert len(saved) == 2 and len(set(saved)) == 1
    for ranks in (2, 1, 3):
        assert torchrun(tmp_path, ranks, "load", namespace) == [saved[0]] * ranks


def test_damaged_shard_fails_the_read(namespace: str) -> None:
    """I-8, I-9: a trainer that writes into its slot after the seal makes the shard corrupt, never other."""
    code = """
        import ctypes, os, sys, torch, safepoint
        from safepoint import _engine
        kept = []
        start = _engine.start_copy
        _engine.start_copy = lambda lease, *a: (kept.append(lease), start(lease, *a))[1]
        c = safepoint.Checkpointer(sys.argv[1], rank=0, world_size=1)
        c.save(1, {"x": torch.ones(4 << 20)}).wait(timeout=30)
        lease = kept[0]
        ctypes.memset(lease.address + lease.length - (2 << 20), 0x55, 1)
        os._exit(0)
    """
    done = run_python(code, namespace)
    assert done.returncode == 0, done.stderr
    with safepoint.Checkpointer(namespace, rank=0, world_size=1) as c:
        target = {"x": torch.zeros(4 << 20)}
        with pytest.raises(errors.Corrupt) as caught:
            c.restore(target, verify_first=True)
        assert not caught.value.state_modified and caught.value.rank == 0 and caught.value.block == 14
        assert target["x"].sum() == 0 and "block 14" in str(caught.value)
        with pytest.raises((errors.Lost, errors.Corrupt)):
            c.restore(target)


def test_status_is_json(checkpointer: safepoint.Checkpointer) -> None:
    assert json.loads(checkpointer._engine.client.status())


def test_numbers_of_a_steady_save(checkpointer: safepoint.Checkpointer) -> None:
    """Saves of an unchanged structure reuse the plan object."""
    state = {f"t{i}": torch.zeros(16) for i in range(2000)}
    checkpointer.save(0, state).wait(timeout=30)
    plan = checkpointer._engine._plan
    checkpointer.save(1, {key: value + 1 for key, value in state.items()}).wait(timeout=30)
    assert checkpointer._engine._plan is plan
    target = {key: torch.zeros(16) for key in state}
    checkpointer.restore(target)
    assert np.all([t[0] == 1 for t in target.values()])
