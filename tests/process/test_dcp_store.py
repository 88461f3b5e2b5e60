"""safepoint.dcp and the durable tier, with the real daemon: saving into it, and loading from it without a daemon.

On two ranks, sharded, and from torch's PROCESS mode: the scenarios `process_mode` and `from_the_store` of
test_dcp_ranks.py.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from conftest import Daemon
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

import safepoint
from safepoint import _launch, dcp
from safepoint._objects import Decoder
from safepoint.dcp import _source

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

Start = Callable[..., Daemon]


def state(value: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(value)
    return {
        "model": {"w": torch.randn(300, 100, generator=generator), "b": torch.full((7,), value, dtype=torch.bfloat16)},
        "epoch": value,
        "pair": (value, f"step {value}"),
    }


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    tensors = all(torch.equal(a["model"][key], b["model"][key]) for key in ("w", "b"))
    return tensors and (a["epoch"], a["pair"]) == (b["epoch"], b["pair"])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "store").mkdir()
    return tmp_path / "store"


@pytest.fixture
def job(start_daemon: Start, base: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A daemon with a store, and a namespace that only this test has."""
    monkeypatch.setenv("SAFEPOINT_SOCKET", start_daemon(f"--store=file://{base}").socket)
    return f"job-{os.urandom(4).hex()}"


def save(writer: dcp.Writer, how: str, value: dict[str, Any]) -> safepoint.Save:
    if how == "ours":
        dcp.async_save(value, storage_writer=writer).result(30)
    elif how == "torch":
        torch_dcp.async_save(value, storage_writer=writer).result(30)
    else:
        torch_dcp.save(value, storage_writer=writer)
    assert writer.save is not None
    return writer.save


@pytest.mark.parametrize("planning", ["own", "dcp"])
@pytest.mark.parametrize("how", ["ours", "torch", "sync"])
def test_every_second_step_becomes_durable(job: str, base: Path, how: str, planning: Any) -> None:
    writer = dcp.Writer(job, planning=planning, durable=2)
    for step in (1, 2, 3, 4):
        writer.step = step
        saved = save(writer, how, state(step))
        if step % 2 == 0:
            assert saved.wait("durable", timeout=30) == "durable"
        else:
            with pytest.raises(safepoint.InvalidArgument, match="durable=True"):
                saved.wait("durable", timeout=30)
    assert sorted(path.name for path in (base / job).glob("step-*")) == ["step-2", "step-4"]
    assert equal(safepoint.load(f"file://{base}/{job}/step-2"), state(2))


def test_without_a_store_the_first_save_says_so(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFEPOINT_SOCKET", daemon.socket)
    writer = dcp.Writer("train", step=1, durable=1000)
    for how in ("ours", "torch", "sync"):
        with pytest.raises((safepoint.Unavailable, CheckpointException), match="durable tier"):
            save(writer, how, state(1))
    assert writer.checkpointer.steps() == []


@pytest.fixture
def url(job: str, base: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A store with steps 1 and 2, and no daemon that could be asked."""
    for step in (1, 2):
        save(dcp.Writer(job, step=step, durable=True), "ours", state(step)).wait("durable", timeout=30)
    monkeypatch.setenv("SAFEPOINT_SOCKET", "/nonexistent/socket")
    return f"file://{base}"


LOADS = [(dcp.load, "own"), (torch_dcp.load, "own"), (torch_dcp.load, "dcp")]


@pytest.mark.parametrize(("function", "planning"), LOADS)
def test_a_reader_of_a_url_needs_no_daemon(url: str, job: str, function: Any, planning: Any) -> None:
    def loaded(target: str, checkpoint_id: str | None = None, **options: Any) -> dict[str, Any]:
        value = state(9)
        reader = dcp.Reader(target, planning=planning, **options)
        function(value, checkpoint_id=checkpoint_id, storage_reader=reader)
        assert reader.info is not None and reader.info.source == "durable"
        assert reader.info.step == value["epoch"]
        return value

    (attempt,) = (Path(url.removeprefix("file://")) / job / "step-1").iterdir()
    assert equal(loaded(url), state(2)), "the newest of the only namespace"
    assert equal(loaded(url, namespace=job, step=1), state(1))
    assert equal(loaded(url, checkpoint_id="run/step-1"), state(1))
    assert equal(loaded(url, namespace=job, checkpoint_id=f"safepoint://{job}/step-1"), state(1))
    assert equal(loaded(f"{url}/{job}/step-1"), state(1))
    assert equal(loaded(f"{url}/{job}/step-1/{attempt.name}", checkpoint_id="1"), state(1))
    assert equal(loaded(url, rank=2, world_size=3), state(2)), "any world size"
    half = {"model": {"b": torch.zeros(7)}, "new": 5}
    function(
        half, storage_reader=dcp.Reader(url, planning=planning), planner=DefaultLoadPlanner(allow_partial_load=True)
    )
    assert half["model"]["b"].tolist() == [2.0] * 7 and half["new"] == 5, "in part, and converted"


@pytest.mark.parametrize(("function", "planning"), LOADS)
def test_what_a_store_does_not_have_is_told(url: str, job: str, function: Any, planning: Any) -> None:
    for target, options, checkpoint_id, told in (
        (url, {"step": 7}, None, "NotFound.*whole steps: 1, 2"),
        (url, {"namespace": "other"}, None, "NotFound.*no whole step of namespace other"),
        (f"{url}/nowhere", {}, None, "nowhere"),
        (f"{url}/{job}/step-1", {}, "step-2", "names step 2, but step 1 is set"),
        (url, {}, f"safepoint://{job}/step-1", "namespace="),
    ):
        reader = dcp.Reader(target, planning=planning, **options)
        with pytest.raises((safepoint.SafepointError, CheckpointException)) as caught:
            function(state(9), checkpoint_id=checkpoint_id, storage_reader=reader)
        error = caught.value
        text = str(error.failures) if isinstance(error, CheckpointException) else f"{type(error).__name__}: {error}"
        assert re.search(told, text), text


def test_targets_that_contradict_themselves(url: str, job: str) -> None:
    for options in ({"step": 1}, {"namespace": job}):
        with pytest.raises(safepoint.InvalidArgument, match="names a step"):
            dcp.Reader(f"{url}/{job}/step-1", **options)
    with pytest.raises(safepoint.InvalidArgument, match="namespace="):
        dcp.Reader(job, namespace=job)
    with pytest.raises(safepoint.InvalidArgument, match="rank"):
        dcp.Reader(url, rank=3, world_size=2)
    with pytest.raises(safepoint.InvalidArgument, match="without a Checkpointer"):
        _ = dcp.Reader(url).checkpointer


def test_metadata_of_a_step_in_a_store(url: str, job: str) -> None:
    found = dcp.Reader(url).metadata()
    assert sorted(found.state_dict_metadata) == ["epoch", "model.b", "model.w", "pair"]
    chunks = found.state_dict_metadata["model.w"].chunks  # type: ignore[union-attr]
    assert [tuple(chunk.sizes) for chunk in chunks] == [(300, 100)]


def test_a_damaged_object_is_found_and_an_older_step_only_read_if_asked_for(url: str, job: str) -> None:
    (shard,) = Path(url.removeprefix("file://")).glob(f"{job}/step-2/*/rank-0.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(safepoint.Corrupt):
        dcp.load(state(9), storage_reader=dcp.Reader(url))
    with pytest.raises(CheckpointException):
        torch_dcp.load(state(9), storage_reader=dcp.Reader(url))
    value = state(9)
    torch_dcp.load(value, storage_reader=dcp.Reader(url, step=1))
    assert equal(value, state(1))


def test_all_ranks_load_what_rank_0_chose(job: str, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a newer step becomes durable between their looks, or rank 0 finds nothing."""
    store = torch.distributed.HashStore()
    monkeypatch.setattr(_launch, "store_for", lambda rank, world_size: store)

    def ranks(url: str) -> list[_source.Durable]:
        made = [_source.source_of(url, namespace=None, rank=rank, world_size=2) for rank in range(2)]
        for source in made:
            source._loads = itertools.count()  # As if each had a process of its own.
        return made

    def load_with(source: _source.Durable) -> int:
        info = source.restore(state(9), source.step, allow_missing=False, decoder=Decoder())
        assert info is not None
        return info.step

    first, second = ranks(f"file://{base}")
    for step in (1, 2):
        save(dcp.Writer(job, step=step, durable=True), "ours", state(step)).wait("durable", timeout=30)
        if step == 1:
            assert load_with(first) == 1
    assert load_with(second) == 1
    assert [load_with(source) for source in (first, second)] == [2, 2]
    for source in ranks(f"file://{base}/{job}/step-3"):
        with pytest.raises(safepoint.NotFound, match="whole steps: 1, 2"):
            load_with(source)
