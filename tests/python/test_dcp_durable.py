"""`safepoint.dcp.Writer(durable=...)`: which steps the daemon is asked to make durable, and when. With the real daemon:
tests/process/test_dcp_store.py.
"""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from fake_core import FakeDaemon
from torch.distributed.checkpoint.api import CheckpointException

from safepoint import dcp, errors

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

TOLD = (errors.Unavailable, CheckpointException)  # The latter is what torch makes of the former in its own steps.


def save(writer: dcp.Writer, how: str) -> None:
    value = {"w": torch.ones(3), "n": 1}
    if how == "ours":
        dcp.async_save(value, storage_writer=writer).result(30)
    elif how == "torch":
        torch_dcp.async_save(value, storage_writer=writer).result(30)
    else:
        torch_dcp.save(value, storage_writer=writer)


# Own planning through torch's async_save holds its seal, which the stand-in does not know.
DOORS = [("ours", "own"), ("sync", "own"), ("ours", "dcp"), ("torch", "dcp"), ("sync", "dcp")]


@pytest.mark.parametrize(("how", "planning"), DOORS)
@pytest.mark.parametrize(("durable", "expected"), [(False, []), (True, [1, 2, 3, 4]), (2, [2, 4]), (1, [1, 2, 3, 4])])
def test_the_daemon_is_asked_for_these_steps(
    fake: FakeDaemon, how: str, planning: Any, durable: bool | int, expected: list[int]
) -> None:
    fake.store = "file:///store"
    writer = dcp.Writer("job", planning=planning, durable=durable)
    reached = []
    for step in (1, 2, 3, 4):
        writer.step = step
        save(writer, how)
        assert writer.save is not None and writer.save.step == step
        if step in expected:
            assert writer.save.wait("durable", timeout=30) == "durable"
            reached.append(writer.save.attempt)
    attempts = fake.space("job").attempts
    assert [attempts[attempt].step for attempt in fake.wanted] == expected
    assert fake.wanted == reached


@pytest.mark.parametrize(("how", "planning"), [*DOORS, ("torch", "own")])
@pytest.mark.parametrize("durable", [True, 1000])
def test_without_a_durable_tier_nothing_is_sent(fake: FakeDaemon, how: str, planning: Any, durable: bool | int) -> None:
    """Told by the first save, also where only a later one would have to be durable."""
    writer = dcp.Writer("job", step=1, planning=planning, durable=durable)
    with pytest.raises(TOLD, match="durable tier"):
        save(writer, how)
    assert fake.requests == 0 and not fake.spaces and writer.save is None
    save(dcp.Writer("job", step=1, planning=planning), "sync")


@pytest.mark.parametrize("wrong", [0, -1, 2.5, "yes", None])
def test_numbers_of_steps_that_are_none(fake: FakeDaemon, wrong: Any) -> None:
    with pytest.raises(errors.InvalidArgument, match="durable"):
        dcp.Writer("job", durable=wrong)


def test_a_writer_in_torchs_child_process_asks_for_the_same_steps(fake: FakeDaemon) -> None:
    fake.store = "file:///store"
    there = pickle.loads(pickle.dumps(dcp.Writer("job", step=4, durable=2)))
    there.begin({"x": torch.ones(2)}).wait(timeout=30)
    assert len(fake.wanted) == 1
