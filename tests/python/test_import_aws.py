"""Imports of what amzn-sagemaker-checkpointing wrote to S3: whole steps only, no code from the data, every byte.

Bit identity (I-34), any number of ranks (I-18), data is not code (I-39), bounded inputs (I-40).
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aws_tree
import pytest
import s3_folder
import torch
import torch.distributed.checkpoint as dcp
from aws_tree import MODULE, OLD_MODULE, STEP, Writer, pickled, place
from s3_folder import serving
from states import same
from test_interchange import HOSTILE_PICKLES, Bomb, blank, command, in_order, restore, saved
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

import safepoint
from safepoint import _connect, _core, errors
from safepoint.interchange import _aws_import, import_aws
from safepoint.interchange._aws_import import find_aws
from safepoint.interchange._state import Values

HERE = Path(__file__).parent
PACKAGE_SITE = HERE.parents[1] / "build" / "peers" / "aws"
LAYOUTS = ("default", "Ray")
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


def state(value: float) -> dict[str, Any]:
    base = torch.arange(1000.0).reshape(10, 100) * value
    return {
        "model": {"w": base.clone(), "half": torch.full((7,), value, dtype=torch.bfloat16), "row": base[3]},
        "empty": torch.empty(0, 3),
        "epoch": int(value),
        "list": [1, {"lr": 0.5}, torch.ones(2)],
    }


def write(run: Path, layout: str, step: int, module: str = MODULE) -> dict[str, Any]:
    made = state(step + 1)
    dcp.save(made, storage_writer=Writer(run, layout, step, module), no_dist=True)
    return made


def write_two(run: Path, layout: str, step: int, coordinator: int = 0) -> dict[str, Any]:
    """Of two ranks: a tensor in halves by rows, one by columns, a tensor of rank 0 and a value of rank 1."""
    rows, columns = torch.arange(12.0).reshape(4, 3) + step, torch.arange(8).reshape(2, 4)
    items: list[list[tuple[str, tuple[int, ...] | None, Any]]] = [
        [("rows", (0, 0), rows[:2].clone()), ("columns", (0, 0), columns[:, :2].clone()), ("one", (0,), torch.ones(5))],
        [("rows", (2, 0), rows[2:].clone()), ("columns", (0, 2), columns[:, 2:].clone()), ("value", None, {"at": step})]
    ]  # fmt: skip
    about: dict[str, Any] = {
        name: TensorStorageMetadata(
            TensorProperties(tensor.dtype),
            tensor.shape,
            [
                ChunkStorageMetadata(torch.Size(offsets), piece.shape)
                for part in items
                for found, offsets, piece in part
                if found == name and offsets is not None
            ],
        )
        for name, tensor in (("rows", rows), ("columns", columns), ("one", torch.ones(5)))
    }
    about["value"] = BytesStorageMetadata()
    stored = {}
    for rank, part in enumerate(items):
        blob = b""
        for name, offsets, value in part:
            data = saved(value)
            index = MetadataIndex(name, None if offsets is None else torch.Size(offsets))
            stored[index] = aws_tree._SageMakerStorageInfo(rank, len(blob), len(data))
            blob += data
        aws_tree.put(place(run, layout, step, rank, "checkpoint.pt"), blob)
    metadata = Metadata(about, storage_data=stored)
    aws_tree.put(place(run, layout, step, coordinator, "metadata.metadata"), pickled(metadata))
    return {"rows": rows, "columns": columns, "one": torch.ones(5), "value": {"at": step}}


def load(source: Path | str, step: int | None = None) -> tuple[int, Any]:
    """What an import would save."""
    found = find_aws(str(source), step)
    return found.step, found.load(Values(skip=False, allow_pickle=False), lambda *_: None).state("")


def change_metadata(run: Path, layout: str, step: int, change: Callable[[Any], object]) -> None:
    path = place(run, layout, step, 0, "metadata.metadata")

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            return aws_tree._SageMakerStorageInfo if module == MODULE else super().find_class(module, name)

    with path.open("rb") as file:
        found = Unpickler(file).load()
    change(found)
    path.write_bytes(pickled(found))


# --- whole steps


@pytest.mark.parametrize("module", [MODULE, OLD_MODULE])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_of_one_rank(layout: str, module: str, tmp_path: Path) -> None:
    """I-34. D-35: also with the class where earlier releases had it; D-8: step 0 is a step; D-20: a view's bytes."""
    run = tmp_path / "base" / "run"
    made = write(run, layout, 0, module)
    for source in (run, run.as_uri(), tmp_path / "base", f"{tmp_path}/base/./run/"):
        step, found = load(source)
        assert step == 0
        same(found, made)
    # The row stood in the blob with all of its tensor, which would else be held.
    assert found["model"]["row"].untyped_storage().nbytes() == 400


@pytest.mark.parametrize("coordinator", [0, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sharded_tensors_of_two_ranks(layout: str, coordinator: int, tmp_path: Path) -> None:
    """I-18. D-12: the metadata are found under the coordinator's rank, whichever it was."""
    write_two(tmp_path, layout, 9)
    made = write_two(tmp_path, layout, 10, coordinator)
    step, found = load(tmp_path)
    assert step == 10
    same(found, made)
    assert load(tmp_path, 9)[1]["value"] == {"at": 9}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_newest_whole_step_is_taken_and_what_was_passed_over_told(layout: str, tmp_path: Path) -> None:
    """D-2, D-7: prefixes prove nothing. Every way in which a step is not whole."""
    made = write_two(tmp_path, layout, 5)
    write_two(tmp_path, layout, 3)
    for step in (6, 7, 8, 10):
        write_two(tmp_path, layout, step)
    place(tmp_path, layout, 6, 0, "metadata.metadata").unlink()
    place(tmp_path, layout, 7, 1, "checkpoint.pt").unlink()
    os.truncate(place(tmp_path, layout, 8, 1, "checkpoint.pt"), 100)
    os.truncate(place(tmp_path, layout, 10, 0, "checkpoint.pt"), 0)
    found = find_aws(str(tmp_path), None)
    assert found.step == 5
    same(load(tmp_path)[1], made)
    reasons = {
        10: r"has 0 bytes, the metadata say \d+ at least",
        8: r"has 100 bytes, the metadata say \d+ at least",
        7: "checkpoint.pt of rank 1 is missing",
        6: "metadata.metadata is missing",
    }
    for told, (step, reason) in zip(found.passed_over, reasons.items(), strict=True):
        assert told.startswith(f"step {step} ({layout} layout): ")
        with pytest.raises(errors.Incomplete, match=reason):
            find_aws(str(tmp_path), step)
    with pytest.raises(errors.NotFound, match="has no step 4; steps: 3, 5, 6, 7, 8, 10"):
        find_aws(str(tmp_path), 4)
    for step in (3, 5):
        place(tmp_path, layout, step, 0, "metadata.metadata").unlink()
    with pytest.raises(errors.Incomplete, match=r"step 10 .*step 8 .*step 7 .*step 6 .*step 5 .*; and 1 more"):
        find_aws(str(tmp_path), None)


def test_what_a_source_may_be(tmp_path: Path) -> None:
    """D-39: names in front of the layout are no part of it; D-40: both layouts are read; one of Ray's steps."""
    base = tmp_path / "step_3"
    first = write(base / "rank_1", "Ray", 7)
    same(load(base)[1], first)
    assert load(base / "rank_1" / "step_7")[0] == 7
    write(base / "rank_1", "default", 6)
    assert load(base, 6)[0] == 6
    write(base / "step_1", "default", 2)
    with pytest.raises(errors.InvalidArgument, match="several runs, give the URL of one: rank_1, step_1"):
        load(base)
    same(load(base / "step_1")[1], state(3))
    write(base / "step_1", "Ray", 2)
    with pytest.raises(errors.InvalidArgument, match="step 2 in both layouts"):
        load(base / "step_1")
    place(base / "step_1", "default", 2, 0, "checkpoint.pt").unlink()
    found = find_aws(str(base / "step_1"), None)
    assert found.step == 2 and len(found.passed_over) == 1
    with pytest.raises(errors.NotFound, match="nowhere"):
        load(tmp_path / "nowhere")
    (tmp_path / "bare").mkdir()
    for name in ("rank_0/step_01", "rank_00/step_1", "rank_0/step_-1", "rank_0/step_1.5", "rank_0", "step_1/rank_x"):
        aws_tree.put(tmp_path / "bare" / name / "checkpoint.pt", b"x")
    with pytest.raises(errors.NotFound, match=r"no checkpoint\.pt or metadata\.metadata in rank_R/step_N"):
        load(tmp_path / "bare")


def test_reading_ahead_is_bounded_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = write(tmp_path, "default", 1)
    for window in (1, 1500, 3000, 1 << 20):
        monkeypatch.setattr(_aws_import, "_WINDOW", window)
        found = find_aws(str(tmp_path), None)
        same(found.load(Values(skip=False, allow_pickle=False), lambda *_: None).state(""), made)
        assert all(len(data) <= window for _, data in found._blobs._ahead.values())


def test_an_item_copies_no_other(tmp_path: Path) -> None:
    """I-40: of what was read ahead, once for every item, it would be the square of the window."""
    dcp.save(
        {str(at): torch.ones(1) for at in range(2000)}, storage_writer=Writer(tmp_path, "default", 1), no_dist=True
    )
    found = find_aws(str(tmp_path), None)
    first, second = sorted(found._metadata.stored.values(), key=lambda p: p.offset)[:2]
    found._blobs.read(first)
    assert len(found._blobs._ahead["0"][1]) > 1 << 20
    tracemalloc.start()
    try:
        assert len(found._blobs.read(second)) == second.length
        assert tracemalloc.get_traced_memory()[1] < second.length + (64 << 10)
    finally:
        tracemalloc.stop()


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials for the server of s3_folder."""
    for name, value in (("ACCESS_KEY_ID", "key"), ("SECRET_ACCESS_KEY", "secret"), ("EC2_METADATA_DISABLED", "true")):
        monkeypatch.setenv(f"AWS_{name}", value)


@pytest.mark.usefixtures("keys")
def test_a_bucket_is_listed_page_by_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """I-40: never held as a whole, and not listed any further once there are several runs."""
    names = [f"{number:02}" for number in range(20)]
    for name in names:
        aws_tree.put(tmp_path / "some" / name, b"x")
        aws_tree.put(place(tmp_path / name, "default", 1, 0, "checkpoint.pt"), b"x")
    pages: list[int] = []
    listing = s3_folder.listing
    monkeypatch.setattr(s3_folder, "listing", lambda *request: pages.append(1) or listing(*request))
    with serving(tmp_path) as bucket:
        store = _core.Store(bucket)
        found, cursor = store.objects("some/")
        while cursor:
            page, cursor = store.objects("some/", cursor)
            assert len(page) <= 3
            found += page
        assert [each.key for each in found] == [f"some/{name}" for name in names]
        pages.clear()
        with pytest.raises(errors.InvalidArgument, match=r"several runs, give the URL of one: 00, 01, 02, \.\.\.$"):
            load(bucket)
        assert len(pages) == 1


@pytest.mark.usefixtures("keys")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_from_s3(layout: str, tmp_path: Path) -> None:
    """Lists of several pages, ranges of blobs; what is missing there, and what goes away meanwhile."""
    run = tmp_path / "base" / "run"
    made = write_two(run, layout, 1)
    write_two(run, layout, 2)
    place(run, layout, 2, 1, "checkpoint.pt").unlink()
    with serving(tmp_path) as bucket:
        for path in ("", "/base", "/base/run", "/base/run/"):
            step, found = load(bucket.replace("?", f"{path}?"))
            assert step == 1
            same(found, made)
        url = bucket.replace("?", "/base/run?")
        with pytest.raises(errors.Incomplete, match="rank 1 is missing"):
            load(url, 2)
        with pytest.raises(errors.NotFound, match="keys with // in them are not read"):
            load(bucket.replace("?", "/elsewhere?"))
        seen = find_aws(url, None)
        assert seen.passed_over == (f"step 2 ({layout} layout): checkpoint.pt of rank 1 is missing",)
        place(run, layout, 1, 1, "checkpoint.pt").unlink()
        with pytest.raises(errors.NotFound, match=r"checkpoint\.pt"):
            seen.load(Values(skip=False, allow_pickle=False), lambda *_: None)


def test_memory_is_a_few_parts_not_a_blob(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the state itself: what is read ahead, old and new, and one part."""
    monkeypatch.setattr(_aws_import, "_WINDOW", 2 << 20)
    made = {str(number): torch.full((1 << 18,), float(number)) for number in range(32)}  # 1 MiB each
    dcp.save(made, storage_writer=Writer(tmp_path, "default", 1), no_dist=True)
    found = find_aws(str(tmp_path), None)
    tracemalloc.start()  # Sees Python's memory, and so what is read; not the tensors'.
    try:
        loaded = found.load(Values(skip=False, allow_pickle=False), lambda *_: None)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    same(loaded.state(""), made)
    assert peak < 8 << 20


# --- what is not believed


def info(run: Path, name: str, **fields: Any) -> None:
    def apply(metadata: Any) -> None:
        vars(next(about for index, about in metadata.storage_data.items() if index.fqn == name)).update(fields)

    change_metadata(run, "default", 1, apply)


def folder_info(run: Path) -> None:
    """Another writer's records, which name files."""

    def apply(metadata: Any) -> None:
        for index in metadata.storage_data:
            metadata.storage_data[index] = dcp.filesystem._StorageInfo("../../secret", 0, 10)

    change_metadata(run, "default", 1, apply)


LIES: dict[str, Callable[[Path], None]] = {
    "a rank that is a path": lambda run: info(run, "one", rank="../../secret"),
    "a negative rank": lambda run: info(run, "one", rank=-1),
    "no rank": lambda run: info(run, "one", rank=None),
    "a rank that is true": lambda run: info(run, "one", rank=True),
    "a rank of many digits": lambda run: info(run, "one", rank=10**5000),
    "negative offset": lambda run: info(run, "one", offset=-1),
    "no length": lambda run: info(run, "one", length=None),
    "bytes of another": lambda run: info(run, "one", offset=0),
    "too few bytes": lambda run: info(run, "one", length=10),
    "a file's name": folder_info,
    "no storage": lambda run: change_metadata(run, "default", 1, lambda m: m.storage_data.clear()),
    "a huge tensor": lambda run: change_metadata(
        run, "default", 1, lambda m: vars(m.state_dict_metadata["one"]).update(size=torch.Size([1 << 50]))
    ),
    "no elements, and strides beyond": lambda run: change_metadata(
        run,
        "default",
        1,
        lambda m: vars(m.state_dict_metadata["one"]).update(size=(0, (1 << 63) - 1, (1 << 63) - 1), chunks=[]),
    ),
    "cut short": lambda run: os.truncate(place(run, "default", 1, 0, "metadata.metadata"), 100),
}


@pytest.mark.parametrize("case", LIES)
def test_metadata_that_lie(case: str, tmp_path: Path) -> None:
    """I-40: the newest step is damaged, which is not the same as not whole: nothing older is taken in its place."""
    run = tmp_path / "base" / "run"
    write_two(run, "default", 0)
    write_two(run, "default", 1)
    (tmp_path / "secret").write_bytes(b"x" * 1000)
    LIES[case](run)
    with pytest.raises(errors.Corrupt, match=r"metadata\.metadata"):
        load(run)
    assert load(run, 0)[0] == 0


@pytest.mark.parametrize("case", HOSTILE_PICKLES)
def test_hostile_metadata_pickle(case: str, tmp_path: Path) -> None:
    write_two(tmp_path, "Ray", 1)
    place(tmp_path, "Ray", 1, 0, "metadata.metadata").write_bytes(HOSTILE_PICKLES[case])
    with pytest.raises(errors.Corrupt, match=r"metadata\.metadata"):
        load(tmp_path)


def test_nothing_in_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """D-25, I-39: in the metadata, in a tensor's place, in a value; and a class of the package that is not a record."""
    mark = tmp_path / "ran"
    run = tmp_path / "run"
    reader = pickle.dumps(0)[:-1] + f"c{OLD_MODULE}\nSageMakerTieredStorageReader\n(Vx\ntR.".encode()
    for evil in (pickle.dumps(Bomb(mark)), pickle.dumps({"storage_data": Bomb(mark)}), reader):
        write_two(run, "default", 1)
        place(run, "default", 1, 0, "metadata.metadata").write_bytes(evil)
        with pytest.raises(errors.Corrupt, match="which is none of torch's metadata classes"):
            load(run)
    for name, raised in (("one", errors.Corrupt), ("value", errors.NotPlain)):
        write_two(run, "default", 1)
        rank, evil = (0, saved(Bomb(mark))) if name == "one" else (1, saved(Bomb(mark)))
        path = place(run, "default", 1, rank, "checkpoint.pt")
        at = path.stat().st_size
        path.write_bytes(path.read_bytes() + evil)
        info(run, name, offset=at, length=len(evil))
        with pytest.raises(raised, match=name):
            load(run)
    assert not mark.exists()

    def poison(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("an unrestricted unpickler was used")

    write_two(run, "default", 1)
    for name in ("loads", "load", "Unpickler"):
        monkeypatch.setattr(pickle, name, poison)
    assert load(run)[0] == 1


def test_links_are_not_followed(tmp_path: Path) -> None:
    """A copy of a bucket has none: what one leads to was not in it."""
    write_two(tmp_path / "run", "default", 1)
    path = place(tmp_path / "run", "default", 1, 1, "checkpoint.pt")
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(errors.Incomplete, match="rank 1 is missing"):
        load(tmp_path / "run")


# --- as steps of a daemon


def test_imported_steps_are_ordinary_ones(namespace: str, tmp_path: Path) -> None:
    write_two(tmp_path, "Ray", 3)
    made = write_two(tmp_path, "Ray", 4)
    write_two(tmp_path, "Ray", 6)
    place(tmp_path, "Ray", 6, 1, "checkpoint.pt").unlink()
    seen: list[tuple[int, int]] = []
    told = import_aws(tmp_path, namespace, progress=lambda *now: seen.append(now))
    assert (told.format, told.step, told.parts, told.skipped) == ("aws", 4, 4, ())
    assert len(told.passed_over) == 1 and seen[-1][0] == seen[-1][1] > 0
    same(restore(blank(made), namespace), made)
    with pytest.raises(errors.InvalidArgument, match="existing"):
        import_aws(tmp_path, namespace)
    with pytest.raises(errors.Incomplete):
        import_aws(tmp_path, f"{namespace}-2", 6)
    client = _connect.open_client("test")
    assert [n.ns for n in client.list_namespaces()] == [namespace]
    client.close()
    import_aws(tmp_path, f"{namespace}-2", 3, prefix="old")
    target = {"old": blank(made)}
    with safepoint.Checkpointer(f"{namespace}-2", rank=0, world_size=1) as checkpointer:
        restored = checkpointer.restore(target)
    assert restored is not None and restored.step == 3 and target["old"]["value"] == {"at": 3}


def test_the_command(daemon: str, namespace: str, tmp_path: Path) -> None:
    write_two(tmp_path, "default", 0)
    write_two(tmp_path, "default", 2)
    place(tmp_path, "default", 2, 0, "metadata.metadata").unlink()
    words = ("import", "--format", "aws")
    told = json.loads(command(daemon, *words, tmp_path.as_uri(), "-n", "a", "--json").stdout)
    assert (told["step"], told["format"], told["parts"]) == (0, "aws", 4)
    assert told["passed_over"] == ["step 2 (default layout): metadata.metadata is missing"]
    done = command(daemon, *words, str(tmp_path), "-n", "b", "--step", "0")
    assert "passed over" not in done.stderr and "b step 0: 4 parts" in done.stdout
    done = command(daemon, *words, str(tmp_path), "-n", "c")
    assert "passed over, not whole: step 2 (default layout): metadata.metadata is missing" in done.stderr
    done = command(daemon, *words, str(tmp_path), "-n", "d", "--step", "2", code=1)
    assert "Incomplete" in done.stderr
    assert "no step 7" in command(daemon, *words, str(tmp_path), "-n", "d", "--step", "7", code=1).stderr
    refused = command(daemon, "import", "--format", "hf", tmp_path.as_uri(), "-n", "d", code=2)
    assert "--format hf is a folder's" in refused.stderr


# --- ranks of a real job, by our imitation of the package's writer and by the package


def torchrun(writer: str, folder: Path, *site: str) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    # The package's own dependencies come last: torch and numpy are the environment's.
    search = os.pathsep.join([str(HERE), *sys.path, *site])
    done = subprocess.run(
        [*launch, str(HERE / "aws_tree.py"), writer, str(folder)],
        env={**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks wrote in both layouts, by the imitation."""
    folder = tmp_path_factory.mktemp("own")
    torchrun("own", folder)
    return folder


def test_fsdp_and_dtensors_of_two_ranks(job: Path) -> None:
    """I-18, I-34: FSDP2, AdamW, DTensors by rows and by columns."""
    expected = torch.load(job / "expected.pt", weights_only=False)
    for layout in LAYOUTS:
        step, found = load(job / "bucket" / "base" / layout)
        assert step == STEP
        same(in_order(found, expected), expected)


def test_the_package_writes_these_very_files(job: Path, tmp_path: Path) -> None:
    """The package's own writer, of the same state: what the tests of this file stand on is what it does."""
    if not PACKAGE_SITE.is_dir():
        pytest.skip("amzn-sagemaker-checkpointing is not installed: make bench-peers PEERS=aws")
    torchrun("package", tmp_path, str(PACKAGE_SITE))
    written = files(tmp_path / "bucket")
    assert len(written) == 6
    assert written == files(job / "bucket")
    expected = torch.load(tmp_path / "expected.pt", weights_only=False)
    for layout in LAYOUTS:
        same(in_order(load(tmp_path / "bucket" / "base" / layout)[1], expected), expected)
