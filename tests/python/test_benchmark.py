"""The benchmark's own arithmetic and its counter: a figure that cannot come out wrong says nothing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from bench import contender, durable, durable_s3, figures, peers, report, summary
from bench.contender import Contender
from bench.launch import Failed
from bench.planning_rank import Operations
from bench.scenarios import build, change, clear, digest, expected_bytes, size_of, tensors_of


def saved(yards: list[float], safe: list[float]) -> dict[str, Any]:
    names = ("T_block", "T_safe", "T_mem", "copy")
    return {"bytes": 100, "tensors": 2, "samples": {"yardstick": yards, **{name: safe for name in names}}}


def cell(**changes: Any) -> dict[str, Any]:
    result: dict[str, Any] = {
        "system": "safepoint",
        "title": "safepoint",
        "scenario": "large",
        "ranks": 1,
        "one_core": False,
        "checksums": True,
        "retain": 2,
        "saves": [saved([1.0, 1.0, 1.0, 1.0, 1.0], [9.0, 7.0, 0.5, 0.4, 0.8])],
        "loads": [[{"samples": {"yardstick": [1.0, 1.0], "T_rec": [1.1, 0.6]}}]],
        "memory_beyond": 300,
        "memory_held": 300 + (60 << 20),
    }
    result.update(changes)
    result.update(summary.summarize(result))
    return result


def test_first_and_second_saves_are_apart_from_the_warm_ones() -> None:
    times = cell()["T_safe"]
    assert (times["first"]["x"], times["second"]["x"]) == (9.0, 7.0)
    assert times["x"] == {"median": 0.5, "min": 0.4, "max": 0.8}
    assert times["first_to_warm"] == 18.0


def test_the_slowest_rank_counts_against_its_own_yardstick() -> None:
    ranks = [saved([1.0] * 4, [1.0] * 4), saved([4.0] * 4, [3.0] * 4)]
    loads = [[{"samples": {"yardstick": [y, y], "T_rec": [y, y]}} for y in (1.0, 4.0)]]
    found = cell(saves=ranks, loads=loads)
    assert found["T_safe"]["x"]["median"] == 1.0  # The other rank took longer, for a slower memory.
    assert found["T_safe"]["seconds"]["median"] == 3.0
    assert found["bytes"] == 200


@pytest.mark.parametrize(("seconds", "reached"), [(0.55, "yes"), (0.65, "**no**")])
def test_a_goal_is_reached_or_not(seconds: float, reached: str) -> None:
    results = {"cells": [cell(saves=[saved([1.0] * 4, [seconds] * 4)])], "training": [], "planning": []}
    rows = {(row[1], row[3]): row for row in report.goals(results).rows}
    assert rows["10 x 100 MB, two copy threads", "0.6x"][4] == reached
    assert rows["10 x 100 MB, one copy thread", "1.0x"][2] == "not measured"


def test_a_failed_cell_is_no_measurement() -> None:
    failed = {"system": "safepoint", "scenario": "large", "ranks": 1, "one_core": False, "error": "a\nb"}
    results: dict[str, Any] = {"cells": [failed], "training": [], "planning": []}
    assert all(row.reached is None and row.measured == "not measured" for row in figures.rows(results))
    assert report.side_by_side(results)[0].rows[0][1] == "failed: b"


@pytest.mark.parametrize(("noise", "reached"), [(0.001, False), (0.2, None)])
def test_noise_leaves_a_loss_undecided(noise: float, reached: bool | None) -> None:
    loop = {"lost_seconds": {"median": 0.05, "min": 0.0, "max": 0.1}, "noise_seconds": {"median": noise}}
    entry = {"system": "safepoint", "title": "safepoint", "bytes": 10**9, "memcpy": 0.1}
    entry["loops"] = {"python": loop, "matmul": loop}
    rows = figures.rows({"cells": [], "training": [entry], "planning": []})
    assert [r.reached for r in rows if r.case == "Python-heavy loop, safepoint"] == [reached]


def test_a_loss_says_how_long_the_loop_stood_still() -> None:
    """It did so for the copy, whatever else a save costs; results of an older benchmark do not say it."""
    figure = {"median": 0.05, "min": 0.0, "max": 0.1}
    loop = {"lost_seconds": figure, "noise_seconds": figure}
    entry = {"system": "safepoint", "title": "safepoint", "bytes": 10**9, "memcpy": 0.1}
    entry["loops"] = {"python": {**loop, "stood_seconds": {**figure, "median": 0.048}}, "matmul": loop}
    results = {"cells": [], "training": [entry, {"system": "other", "error": "a\nb"}], "planning": []}
    told = {r.case: r.measured for r in figures.rows(results)}
    assert told["Python-heavy loop, safepoint"].endswith(", noise 50 ms, stood still 48 ms")
    assert "stood" not in told["matmul on all cores, safepoint"]
    sheet = report.training(results)
    assert sheet.rows[0][2::3] == ["48 ms", "–"] and {len(row) for row in sheet.rows} == {len(sheet.columns)}


def test_memory_is_held_against_all_retained_steps() -> None:
    rows = figures.rows({"cells": [cell()], "training": [], "planning": []})
    held = next(r for r in rows if r.what.startswith("pool") and r.case == "10 x 100 MB")
    assert held.reached is True and "+60 MiB" in held.measured
    rows = figures.rows({"cells": [cell(memory_held=300 + (65 << 20))], "training": [], "planning": []})
    assert next(r for r in rows if r.what.startswith("pool") and r.case == "10 x 100 MB").reached is False


@pytest.mark.parametrize("scenario", ["small", "gpt"])
def test_a_change_reaches_every_element_and_the_digest_sees_one_bit(scenario: str) -> None:
    state = build(scenario, 0, 0.01)
    assert size_of(state)[0] == pytest.approx(expected_bytes(scenario, 0.01), rel=0.01)
    before = {name: tensor.clone() for name, tensor in tensors_of(state.tree)}
    change(state, 3)
    assert all((tensor != before[name]).all() for name, tensor in tensors_of(state.tree))
    expected = digest(state)
    last = list(tensors_of(state.tree))[-1][1].view(-1)
    last.view(torch.uint8)[-1] ^= 1
    assert digest(state) != expected
    clear(state)
    assert all(not tensor.any() for _, tensor in tensors_of(state.tree))


def test_guarded_optimizers_own_every_tensor() -> None:
    state = build("gpt", 0, 0.01)
    owned = {p.data_ptr() for o in state.optimizers for g in o.param_groups for p in g["params"]}
    owned |= {v.data_ptr() for o in state.optimizers for s in o.state.values() for v in s.values()}
    assert {tensor.data_ptr() for _, tensor in tensors_of(state.tree)} <= owned


def test_the_counter_counts_and_puts_everything_back(tmp_path: Path) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        operations = Operations()
        real = vars(torch.distributed.ProcessGroup)["barrier"]
        with operations.counting():
            torch.distributed.barrier()
            torch.distributed.all_gather_object([None], "x")
        assert {"barrier", "all_gather_object", "allgather"} <= set(operations.names)
        count = len(operations.names)
        torch.distributed.barrier()
        assert len(operations.names) == count
        assert vars(torch.distributed.ProcessGroup)["barrier"] is real
    finally:
        torch.distributed.destroy_process_group()


ANSWERS = """
import sys
for line in sys.stdin:
    if line.strip() == "grow":
        kept = bytearray(64 << 20)
    if line.strip() == "end":
        raise SystemExit("the last word")
    print(0.25, 0.5, flush=True)
"""


def test_a_contender_answers_and_its_growth_is_seen(tmp_path: Path) -> None:
    one = Contender([sys.executable, "-u", "-c", ANSWERS], tmp_path / "log")
    try:
        sample = one.ask("grow")
        assert (sample.seconds, sample.cpu) == (0.25, 0.5)
        assert one.ask("rest").memory < 32 << 20
        with pytest.raises(Failed, match="the last word"):
            one.ask("end")
    finally:
        one.stop()


def test_torch_to_a_directory_is_measured_and_compared(tmp_path: Path) -> None:
    one = contender.python("bench.peers.stores", ["dcp", str(tmp_path / "dcp"), "0.01"], None, tmp_path / "log")
    try:
        for what in ("save", "load", "save", "load"):
            assert one.ask(what).seconds > 0
        assert len(list((tmp_path / "dcp").glob("step-*/.metadata"))) == 2
        for data in (tmp_path / "dcp" / "step-2").glob("*.distcp"):
            data.write_bytes(data.read_bytes().replace(data.read_bytes()[-4096:-4000], bytes(96)))
        with pytest.raises(Failed):
            one.ask("load")
    finally:
        one.stop()


def samples(*seconds: float) -> list[dict[str, Any]]:
    return [{"seconds": s, "cpu": s / 2, "memory": 3 << 20} for s in seconds]


def test_the_first_sample_of_a_store_is_apart_and_the_missing_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "site_folder", lambda site: Path("/nonexistent") / site)
    why = peers.not_installed("obstore")
    assert why is not None and "make bench-peers PEERS=obstore" in why
    results: dict[str, Any] = {"client raw_put1": samples(9.0, 1.0, 2.0, 3.0), "ours put1": samples(9.0, 3.0, 3.0, 3.0)}
    for kind in durable_s3.CLIENT.values():
        results[" ".join(kind[-1])] = why
    sheet = durable.clients("", results, 1 << 30)
    rows = {row[0]: row for row in reversed(sheet.rows)}  # Titles repeat: the first of each counts.
    assert rows["aws-c-s3 alone: from mapped memory, no checksums"][1:4] == ["9.000", "2.000 (1.000-3.000)", "1"]
    ours = next(row for title, row in rows.items() if title.startswith("`s3://`") and "sent" in title)
    assert ours[3:] == ["1.50x", "1.50", "3 MiB"]
    assert rows["obstore"][1] == why
    assert {len(row) for row in sheet.rows} == {len(sheet.columns)}


def test_tables_of_the_durable_tier_go_between_the_markers(tmp_path: Path) -> None:
    """Also those of a run in which a contender gave up; pages of parts that did not run stay as they are."""
    page = "before\n<!-- make bench README=1 writes from here -->\nold\n<!-- to here -->\nafter\n"
    for name in ("durable.md", "s3.md"):
        (tmp_path / name).write_text(page)
    told = {"cpu": "C", "cores": 2, "kernel": "6"}
    results: dict[str, Any] = {"machine": told, "settings": {"scale": 1}, "bytes": 10**9, "seconds": 60.0, "load": [1]}
    results |= {"torch": "2", "kernel": "avx2", "commit": "abc", "started": "2026-01-01T00:00:00Z"}
    results["whole"] = {" ".join(turn): samples(2.0, 1.0) for turns in durable_s3.WHOLE.values() for turn in turns}
    results["whole"]["aws save"] = "failed: no"
    durable.write(results, tmp_path)
    assert (tmp_path / "durable.md").read_text() == page
    text = (tmp_path / "s3.md").read_text()
    assert text.startswith("before") and text.endswith("after\n") and "old" not in text
    assert "| failed: no | - |" in text and "1.00x" in text and "commit abc" in text
