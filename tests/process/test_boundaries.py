"""Kill at every boundary (tests/boundaries), and that its grader and its watcher notice what they are there for."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "boundaries"))
from grader import VERDICTS, Observation, Restored, grade

FOLDER = Path(__file__).resolve().parent.parent / "boundaries"

needs_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="the recorder single-steps x86-64 code")

GOOD = Observation(
    prior=[1, 2],
    retain=2,
    completed=3,
    restored={0: Restored(2, 3, "aa"), 1: Restored(2, 3, "aa")},
    resumed=4,
    listed=[4, 3],
)
OLD = {0: Restored(1, 2, "bb"), 1: Restored(1, 2, "bb")}
ONE_RANK_OLD = {0: Restored(2, 3, "aa"), 1: Restored(1, 2, "bb")}
# What a run would have looked like with one thing wrong, and the verdict that it must get.
FABRICATED: list[tuple[str, str, dict[str, Any]]] = [
    ("nothing wrong", "PASS", {}),
    (
        "not complete, so the step before is right",
        "PASS",
        {"completed": -1, "restored": OLD, "resumed": 3, "listed": [3, 2]},
    ),
    ("never a step, told so", "PASS", {"prior": [], "completed": -1, "restored": {0: None, 1: None}, "listed": [4]}),
    ("a rank's error that nothing explains", "HARD_FAIL", {"needs_human": ["rank 1 seal: InternalError"]}),
    ("ranks resumed from different steps", "SILENT_DIVERGENCE", {"restored": ONE_RANK_OLD}),
    ("ranks were restoring different attempts", "SILENT_DIVERGENCE", {"diverged": ["x"]}),
    ("a step is there, and the job starts from scratch", "SILENT_DIVERGENCE", {"restored": {0: None, 1: None}}),
    ("a later loss would look like a fresh start", "SILENT_DIVERGENCE", {"marker": False}),
    ("a block of another step", "WRONG_BYTES", {"wrong": ["rank 0: 1 blocks of step 3 are wrong"]}),
    ("listed, and cannot be opened", "FALSE_COMPLETE", {"unreadable": ["step 3"]}),
    ("older than what was acknowledged", "LOST_WORK", {"restored": OLD, "resumed": 3, "listed": [3, 2]}),
    ("older than what the launch before had", "LOST_WORK", {"completed": -1, "prior": [1, 2, 3], "restored": OLD}),
    ("Lost, although the keeper lives", "LOST_WORK", {"lost": ["rank 0 open_read: Lost"]}),
    ("retired before its time", "LOST_WORK", {"listed": [4]}),
    ("a lease is left", "LEAK", {"leaked": ["1 open leases"]}),
    ("more steps are kept than promised", "LEAK", {"listed": [4, 3, 2]}),
    ("the next save never ended", "STALL", {"resumed": -1, "stalled": ["rank 0 wait: DeadlineExceeded"]}),
    ("the next save never began", "STALL", {"resumed": -1}),
]


@pytest.mark.parametrize(("what", "verdict", "wrong"), FABRICATED, ids=[f[0] for f in FABRICATED])
def test_grader_reaches_every_verdict(what: str, verdict: str, wrong: dict[str, Any]) -> None:
    found = grade(dataclasses.replace(GOOD, **wrong))
    assert found.name == verdict, found


def test_grader_lets_the_worst_verdict_win() -> None:
    """Each verdict together with all that are weaker than it."""
    evidence: dict[str, dict[str, Any]] = {
        "HARD_FAIL": {"needs_human": ["x"]},
        "SILENT_DIVERGENCE": {"marker": False},
        "WRONG_BYTES": {"wrong": ["x"]},
        "FALSE_COMPLETE": {"unreadable": ["x"]},
        "LOST_WORK": {"lost": ["x"]},
        "LEAK": {"leaked": ["x"]},
        "STALL": {"stalled": ["x"]},
    }
    assert [*evidence, "PASS"] == list(VERDICTS)
    for number, verdict in enumerate(evidence):
        seen = dataclasses.replace(GOOD)
        for weaker in list(evidence)[number:]:
            seen = dataclasses.replace(seen, **evidence[weaker])
        assert grade(seen).name == verdict


def run(program: str, *arguments: str, seconds: float = 600) -> str:
    """One of the programs of tests/boundaries; asserts that it ends well, and returns what it printed."""
    environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    command = [sys.executable, str(FOLDER / program), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False, env=environment)
    print(done.stdout[-6000:])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-4000:]
    return done.stdout


def test_stamps_show_every_kind_of_wrong_block() -> None:
    """Torn, stale, shifted, zero-filled and foreign blocks, without safepoint's checksums."""
    assert json.loads(run("check_stamps.py")) == {
        "own": 0,
        "one bit": 1,
        "zeros": 1,
        "torn": 1,
        "shifted": 256,
        "step before": 256,
        "other rank": 256,
        "other attempt": 256,
        "other generation": 256,
        "other namespace": 256,
        "header of the step before": "header",
    }


@needs_x86
def test_a_kill_at_every_event_loses_mixes_and_leaks_nothing() -> None:
    """I-1, I-2, I-4 to I-8, I-25, I-28, I-30, I-31, I-32; F1 to F4, F13, F14, F17.

    Each event once, before or after it, with one of the targets in turn; `make boundaries` plays all combinations.
    """
    run("campaign.py", "--part", "6")


@needs_x86
def test_watcher_reaches_every_verdict_in_a_real_run() -> None:
    """Seven runs without a kill, each with another damage done between the launch and the one that resumes."""
    run("campaign.py", "--sabotage")


@needs_x86
def test_a_kill_while_the_marker_is_written_leaves_no_file_beside_it() -> None:
    """I-28: the name of a temporary file stayed in the state directory for ever."""
    for event in ("creates the marker's file", "syncs the marker's file"):
        run("campaign.py", "--scenario", "first save", "--event", event, "--target", "worker")
