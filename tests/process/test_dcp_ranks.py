"""safepoint.dcp on two ranks with a process group: what happens between them. The scenarios are in dcp_rank.py."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Daemon

SCENARIOS = [
    "a_rank_that_fails_in_its_first_save",  # The first of all: the launch has no nonce yet.
    "no_collectives",
    "torchs_own",
    "without_collectives_of_torch",
    "overlapping",
    "dcps_planning",
    "another_group",
    "ranks_out_of_step",
    "uploads_in_flight",
    "a_rank_without_a_state",
    "different_steps",
    "changed_structure",
    "process_mode",
    "from_the_store",  # What the one before made durable.
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, list[dict[str, Any]]]]:
    """What every rank found in each scenario; one launch for all, because importing torch takes seconds."""
    folder = tmp_path_factory.mktemp("dcp")
    (folder / "store").mkdir()
    daemon = Daemon(
        folder / "d", "--pool=512MiB", "--extent=1MiB", "--pool-prefault=64MiB", f"--store=file://{folder}/store"
    )
    environment = {**os.environ, "SAFEPOINT_SOCKET": daemon.socket, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    program = str(Path(__file__).parent / "dcp_rank.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, program, str(folder), str(rank), "2", *SCENARIOS],
            env=environment,
            stdout=(folder / f"out-{rank}").open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        for rank in range(2)
    ]
    try:
        end = time.monotonic() + 300
        for process in ranks:
            # A rank whose other one has failed may wait for it in vain.
            while process.poll() is None and not any(other.poll() for other in ranks) and time.monotonic() < end:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.1)
        told = [(folder / f"out-{rank}").read_text()[-5000:] for rank in range(2)]
        assert [process.poll() for process in ranks] == [0, 0], "\n".join(told)
        yield {
            name: [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(2)] for name in SCENARIOS
        }
    finally:
        for process in ranks:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        daemon.stop()


def test_no_operation_of_the_process_group_after_the_first_save(found: dict[str, list[dict[str, Any]]]) -> None:
    assert [rank["calls"] for rank in found["no_collectives"]] == [[], []]


@pytest.mark.parametrize(
    "scenario",
    [
        "torchs_own",
        "without_collectives_of_torch",
        "another_group",
        "process_mode",
        "from_the_store",
        "uploads_in_flight",
        "changed_structure",
    ],
)
def test_saved_and_loaded_again(found: dict[str, list[dict[str, Any]]], scenario: str) -> None:
    """The scenario itself compares every bit; a hang or a difference ends its process with an error."""
    assert len(found[scenario]) == 2


def test_a_thousand_overlapping_saves(found: dict[str, list[dict[str, Any]]]) -> None:
    """Every one is sealed or refused, with an error that a caller can tell; the newest is whole.

    Which one that is depends on how the machine has the ranks take turns: one that is far ahead is refused (16 open
    attempts), and what it was refused the other one is, too.
    """
    for rank in found["overlapping"]:
        assert set(rank["failed"]) <= {"Closed", "NotFound", "Incomplete"}, rank
        assert rank["refused"] < 1000
        assert rank["latest"] == found["overlapping"][0]["latest"] >= 1


def test_dcps_planning_saves_duplicates_once(found: dict[str, list[dict[str, Any]]]) -> None:
    for rank in found["dcps_planning"]:
        assert len(rank["sizes"]) == 2 and all(size < 2 * 4 * 3 * 50 * 33 + 64 * 1024 for size in rank["sizes"])


def test_a_rank_with_one_load_more_is_found_out(found: dict[str, list[dict[str, Any]]]) -> None:
    assert all("have all ranks make the same restores" in rank["told"] for rank in found["ranks_out_of_step"])


def test_a_rank_that_fails_in_its_first_save_keeps_nobody_waiting(found: dict[str, list[dict[str, Any]]]) -> None:
    ranks = found["a_rank_that_fails_in_its_first_save"]
    assert "bad: a tensor of layout" in ranks[0]["told"]
    assert ranks[1]["waited"] < 30 and [rank["agreed"] for rank in ranks] == [True, True]


def test_a_rank_without_a_state_saves_an_empty_shard(found: dict[str, list[dict[str, Any]]]) -> None:
    assert all(rank["seconds"] < 50 for rank in found["a_rank_without_a_state"])


def test_ranks_that_save_different_steps_are_told_so(found: dict[str, list[dict[str, Any]]]) -> None:
    for rank in found["different_steps"]:
        for round, told in enumerate(rank["told"]):
            assert f"different steps, which never become complete: rank 0 step {round * 10}, rank 1" in told
        assert rank["seconds"] < 120
