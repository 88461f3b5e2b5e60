"""Sharded checkpoints through the doors of torch.distributed.checkpoint: saved with 2 and 4 ranks by each of them and
loaded with 1, 3 and 4 by each reader, torch's Hugging Face reader included; and what torch calls on several ranks.
The ranks are dcp_layouts_rank.py."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Daemon
from dcp_layouts_rank import DOORS, EXPORTED, FORMATS, LOADERS, SAVED, SAVED_BY
from test_reshard import Launch

from safepoint.interchange import export_step

PROGRAM = Path(__file__).parent / "dcp_layouts_rank.py"
UPLOAD = ["reset", "storage_meta", "set_up_storage_writer", "prepare_local_plan", "prepare_global_plan", "write_data",
          "finish"]  # fmt: skip
LOAD = ["read_metadata", "set_up_storage_reader", "prepare_local_plan", "prepare_global_plan", "read_data"]
COORDINATORS = {"prepare_global_plan", "finish"}

Results = dict[tuple[str, int, int], dict[str, Any]]  # By phase, world size and rank.


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Results]:
    """What every rank found; one launch of each world size for all tests, because importing torch takes seconds."""
    folder = tmp_path_factory.mktemp("layouts")
    daemon = Daemon(folder / "d", "--pool=768MiB", "--extent=1MiB")
    results: Results = {}
    with contextlib.ExitStack() as stack:
        stack.callback(daemon.stop)

        def launch(world_size: int, *phases: str) -> Launch:
            made = Launch(folder, world_size, ",".join(phases), socket=daemon.socket, program=PROGRAM)
            stack.callback(made.end)
            return made

        def collect(ranks: Launch, phase: str) -> None:
            for rank, result in enumerate(ranks.results(phase)):
                results[phase, ranks.world_size, rank] = result

        two, four = launch(2, "save", "contract"), launch(4, "save", "load")
        (folder / "save").touch()
        for each in (two, four):
            collect(each, "save")
        one, three = launch(1, "contract", "load"), launch(3, "load")
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(os.environ, "SAFEPOINT_SOCKET", daemon.socket)
            for saved_by in SAVED_BY:
                for layout, door in EXPORTED.items():
                    for form in FORMATS:
                        name = f"{layout}-{door}-{saved_by}"
                        export_step(name, folder / f"{name}-{form}", format=form)  # type: ignore[arg-type]
        (folder / "load").touch()
        (folder / "contract").touch()
        for each in (two, one):
            collect(each, "contract")
        for each in (one, three, four):
            collect(each, "load")
        yield results


def test_any_layout_through_any_door_into_any_other(found: Results) -> None:
    """I-18, I-34: FSDP2, a 2-D mesh and _StridedShard with AdamW's moments, uneven shards and empty pieces."""
    loads = 0
    for (phase, world_size, rank), result in found.items():
        if phase == "save":
            assert set(result["saved"]) == set(SAVED)
            assert not [wrong for wrong in result["saved"].values() if wrong], "the truth itself is in doubt"
        if phase == "load":
            wrong = {case: names for case, names in result["loaded"].items() if names and "HuggingFace" not in case}
            assert not wrong, (world_size, rank, wrong)
            loads += len(result["loaded"])
            assert len(result["loaded"]) == len(SAVED_BY) * len(SAVED) * (len(DOORS) * len(LOADERS) + len(FORMATS))
    assert loads > 8 * 60


def test_torchs_hugging_face_reader_reads_what_ranks_saved(found: Results) -> None:
    """I-18: exported shard by shard, and whole tensors; read by torch into DTensors of other layouts, by 1, 3, 4."""
    for (phase, world_size, rank), result in found.items():
        if phase == "load":
            cases = {case: names for case, names in result["loaded"].items() if "HuggingFace" in case}
            assert len(cases) == len(SAVED_BY) * len(EXPORTED) * len(FORMATS)
            assert not any(cases.values()), (world_size, rank, cases)


@pytest.mark.parametrize("world_size, place", [(2, "thread"), (1, "process")])
def test_what_torch_calls(found: Results, world_size: int, place: str) -> None:
    """In a thread with two ranks, in torch's child process with one: the trainer stages, the rest is elsewhere, only
    the coordinator is asked about all plans, and nobody closes the stager."""
    trainer = {
        "Writer": ["stage", "should_synchronize_after_execute"],
        "Synchronising": ["stage", "should_synchronize_after_execute", "synchronize_staging"],
        "WithFuture": ["stage"],
    }
    for rank in range(world_size):
        calls = found["contract", world_size, rank]["calls"]
        assert set(calls) == set(trainer)
        for kind, recorded in calls.items():
            upload = [name for name in UPLOAD if rank == 0 or name not in COORDINATORS]
            for where, names in (("caller", trainer[kind]), (place, upload)):
                assert [name for name, at, _ in recorded["save"] if at == where] == names, (kind, rank)
            assert {at for _, at, _ in recorded["save"]} == {"caller", place}
            details = {name: detail for name, _, detail in recorded["save"]}
            assert details["set_up_storage_writer"] == [rank == 0, {"rank": rank, "use_collectives": True}]
            load = [name for name in LOAD if rank == 0 or name not in COORDINATORS]
            assert [(name, at) for name, at, _ in recorded["load"]] == [(name, "caller") for name in load]


def test_what_is_unpickled_with_a_process_group(found: Results) -> None:
    """I-39: by our functions, nothing. torch's own gather and scatter plans and metadata as pickles, from rank to rank
    of this job, never through the store. They are empty, because `stage` handed over nothing and our metadata lists no
    pieces: no class of an item or of a tensor is among them, let alone one of the state's."""
    dcp = "torch.distributed.checkpoint"
    empty = {f"{dcp}.planner.SavePlan", f"{dcp}.planner.LoadPlan", f"{dcp}.metadata.Metadata"}
    empty |= {f"{dcp}.storage.WriteResult", f"{dcp}.metadata.MetadataIndex"}  # Which step this rank has saved.
    for rank in range(2):
        result = found["contract", 2, rank]
        assert result["unpickled by ours"] == []
        assert result["unpickled by torch"] and set(result["unpickled by torch"]) <= empty
