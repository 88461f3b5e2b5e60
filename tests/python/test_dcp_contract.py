"""What torch calls, in which order and in whose thread, as `safepoint.dcp` relies on it; without a process group.

With two ranks, and in PROCESS mode: tests/process/test_dcp_layouts.py. What changes here in a new torch changes what
`stage` may do.
"""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import recording
import torch
import torch.distributed.checkpoint as torch_dcp
from recording import by_place
from states import same
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse

from safepoint import dcp

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

UPLOAD = [
    "storage_meta",
    "set_up_storage_writer",
    "prepare_local_plan",
    "prepare_global_plan",
    "write_data",
    "finish",
]
LOAD = ["read_metadata", "set_up_storage_reader", "prepare_local_plan", "prepare_global_plan", "read_data"]


def state(fill: float) -> dict[str, Any]:
    return {"model": {"w": torch.full((5, 3), fill)}, "n": int(fill)}


def check_loaded(namespace: str, fill: float) -> None:
    target = state(0)
    dcp.load(target, storage_reader=dcp.Reader(namespace))
    same(state(fill), target)


@pytest.mark.parametrize("checkpoint_id", [None, "run/step-1"])
@pytest.mark.parametrize("kind", ["Writer", "Synchronising", "WithFuture"])
def test_async_save_in_a_thread(namespace: str, tmp_path: Path, kind: str, checkpoint_id: str | None) -> None:
    """Staging in the trainer's thread, everything else in torch's; the id comes with the second half, if at all."""
    with recording.recording(tmp_path / "calls") as calls:
        writer = getattr(recording, kind)(namespace, step=1)
        assert isinstance(writer, AsyncStager)
        value = state(7)
        future = torch_dcp.async_save(value, checkpoint_id=checkpoint_id, storage_writer=writer)
        value["model"]["w"].zero_()
        if kind == "WithFuture":
            assert isinstance(future, AsyncSaveResponse) and not hasattr(future, "result")
            future.staging_completion.result(30)
            future = future.upload_completion
        assert isinstance(future, Future)
        future.result(30)
    places = by_place(calls())
    in_trainer = {
        "Writer": ["stage", "should_synchronize_after_execute"],
        "Synchronising": ["stage", "should_synchronize_after_execute", "synchronize_staging"],
        "WithFuture": ["stage"],
    }
    upload = UPLOAD if checkpoint_id is None else ["reset", *UPLOAD]
    assert places == {"caller": in_trainer[kind], "thread": upload}  # And `close` by nobody.
    assert calls()[0][0] == "stage"
    details = {name: detail for name, _, detail in calls()}
    assert details["set_up_storage_writer"] == [True, {"rank": 0, "use_collectives": True}]
    assert details.get("reset") == checkpoint_id
    check_loaded(namespace, 7)


@pytest.mark.parametrize("options", [{"no_dist": True}, {"use_collectives": False}], ids=lambda o: next(iter(o)))
def test_options_do_not_change_the_order(namespace: str, tmp_path: Path, options: dict[str, bool]) -> None:
    with recording.recording(tmp_path / "calls") as calls:
        torch_dcp.async_save(state(2), storage_writer=recording.Writer(namespace, step=1), **options).result(30)
    assert by_place(calls())["thread"] == UPLOAD
    check_loaded(namespace, 2)


def test_save_never_stages(namespace: str, tmp_path: Path) -> None:
    with recording.recording(tmp_path / "calls") as calls:
        torch_dcp.save(state(3), checkpoint_id="step-1", storage_writer=recording.Writer(namespace))
    assert by_place(calls()) == {"caller": ["reset", *UPLOAD]}
    check_loaded(namespace, 3)


def test_a_stager_of_the_users_own_stages_instead(namespace: str, tmp_path: Path) -> None:
    """The writer is not asked to stage: the copy is made in torch's thread, of what that stager handed over."""
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    stager = DefaultStager(StagingOptions(False, False, False, False))
    with recording.recording(tmp_path / "calls") as calls:
        value = state(4)
        writer = recording.Writer(namespace, step=1)
        future = torch_dcp.async_save(value, storage_writer=writer, async_stager=stager)
        value["model"]["w"].zero_()
        assert isinstance(future, Future)
        future.result(30)
    stager.close()
    assert by_place(calls()) == {"thread": UPLOAD}
    check_loaded(namespace, 4)


@pytest.mark.parametrize("checkpoint_id", [None, "step-1"])
def test_load(namespace: str, tmp_path: Path, checkpoint_id: str | None) -> None:
    """All in the caller's thread. `read_metadata` without keywords: with `rank=` only torch's fallback calls it."""
    dcp.async_save(state(5), storage_writer=dcp.Writer(namespace, step=1)).result(30)
    target = state(0)
    with recording.recording(tmp_path / "calls") as calls:
        torch_dcp.load(target, checkpoint_id=checkpoint_id, storage_reader=recording.Reader(namespace))
    same(state(5), target)
    assert by_place(calls()) == {"caller": LOAD if checkpoint_id is None else ["reset", *LOAD]}
    details = {name: detail for name, _, detail in calls()}
    assert details["read_metadata"] == []
    assert details["set_up_storage_reader"] == [True, {"rank": 0, "use_collectives": True}]


def test_our_functions_call_nothing_of_torchs_steps(namespace: str, tmp_path: Path) -> None:
    """`safepoint.dcp` with the same objects: no staging, no planning."""
    with recording.recording(tmp_path / "calls") as calls:
        dcp.async_save(state(6), storage_writer=recording.Writer(namespace, step=1)).result(30)
        target = state(0)
        dcp.load(target, storage_reader=recording.Reader(namespace))
    same(state(6), target)
    assert {name for name, _, _ in calls()} <= {"reset"}
