"""Reading the trees that Amazon's amzn-sagemaker-checkpointing leaves in S3, or copies of them, without believing them.

Its blobs and metadata are those of torch.distributed.checkpoint (`_dcp_metadata`, `_dcp_items`), one blob per rank, in
one of two layouts:

    RUN/rank_R/step_N/checkpoint.pt     RUN/rank_R/step_N/metadata.metadata     its default
    RUN/step_N/rank_R/checkpoint.pt     RUN/step_N/rank_R/metadata.metadata     under Ray

It writes no mark of a whole step. A step is whole when its metadata are there, by whatever rank, and all blobs that
they name have the bytes that they name. The metadata come last, so a save that was cut short has none; but one that
saved a step once more over the old one, and was cut short, is not seen if all lengths are the same.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from safepoint import _core
from safepoint.errors import Corrupt, Incomplete, InvalidArgument, NotFound
from safepoint.interchange._dcp_items import load_items
from safepoint.interchange._dcp_metadata import METADATA_MAX, Metadata, Place, Record, read_metadata
from safepoint.interchange._state import Loaded, Values

if TYPE_CHECKING:
    from safepoint._core import Store, StoredObject
    from safepoint.interchange._source import Progress

_BLOB, _METADATA = "checkpoint.pt", "metadata.metadata"
_STEP, _RANK = r"step_(0|[1-9]\d{0,17})", r"rank_(0|[1-9]\d{0,8})"
_OBJECT = re.compile(rf"(?:(.+)/)?(?:{_RANK}/{_STEP}|{_STEP}/{_RANK})/({re.escape(_BLOB)}|{re.escape(_METADATA)})")
_WINDOW = 32 << 20  # Read ahead in all blobs together.
_TOLD = 5


@dataclass(slots=True)
class _Saved:
    """What is there of one step in one layout, by rank."""

    step: int
    layout: str
    blobs: dict[int, StoredObject] = field(default_factory=dict)
    metadata: dict[int, StoredObject] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"step {self.step} ({self.layout} layout)"


class _Blobs:
    """The ranks' blobs of one step, by the number of the rank. Items are small and many: reads ahead, within bounds."""

    storage = "_SageMakerStorageInfo"

    def __init__(self, store: Store, saved: _Saved) -> None:
        self._store = store
        self._saved = saved
        self._window = _WINDOW // max(1, len(saved.blobs))
        self._ahead: dict[str, tuple[int, bytes]] = {}  # Where a window begins, and its bytes.

    def name_of(self, about: Record) -> object:
        rank = about.get("rank")
        return str(rank) if type(rank) is int and rank >= 0 else None

    def check(self, file: str, size: int) -> None:
        blob = self._saved.blobs.get(int(file))
        if blob is None:
            raise Incomplete(f"{self._saved}: {_BLOB} of rank {file} is missing")
        if size > blob.size:
            raise Incomplete(f"{self._saved}: {blob.key} has {blob.size} bytes, the metadata say {size} at least")

    def read(self, place: Place) -> bytes:
        blob = self._saved.blobs[int(place.file)]
        if place.length >= self._window:
            return self._store.read(blob.key, place.offset, place.length)
        begin, data = self._ahead.get(place.file, (0, b""))
        if not begin <= place.offset <= place.offset + place.length <= begin + len(data):
            begin = place.offset
            data = self._store.read(blob.key, begin, min(self._window, blob.size - begin))
            self._ahead[place.file] = begin, data
        return data[place.offset - begin : place.offset - begin + place.length]


@dataclass(frozen=True)
class AwsStep:
    """A whole step. `passed_over`: newer ones that are not whole, and why."""

    url: str
    step: int
    passed_over: tuple[str, ...]
    _metadata: Metadata
    _blobs: _Blobs

    def load(self, values: Values, progress: Progress) -> Loaded:
        """The state, in memory; errors as in `load_items`, and those of a store."""
        return load_items(self._metadata, self._blobs, values, progress)


def find_aws(source: str, step: int | None) -> AwsStep:
    """The step of that number, or the newest whole one.

    `source`: a directory, or the URL of a store, at one run (base path and namespace), at a base path below which there
    is but one, or at one step of Ray's layout.

    NotFound: no such directory or bucket, or no such step in it. Incomplete: the step, or every step, is not whole.
    InvalidArgument: there are several runs, or the step is there in both layouts. Corrupt: the metadata of a step that
    was to be read are damaged, or lie.
    """
    store = _core.Store(source if "://" in source else Path(source).resolve().as_uri())
    there = _look(store)
    if not there:
        slashes = "; keys with // in them are not read: copy them to a disk" if source.startswith("s3:") else ""
        raise NotFound(f"{store.url} has no {_BLOB} or {_METADATA} in rank_R/step_N or step_N/rank_R{slashes}")
    if step is not None and step not in there:
        raise NotFound(f"{store.url} has no step {step}; steps: {', '.join(map(str, sorted(there)[-20:]))}")
    reasons: list[str] = []
    for number in sorted(there, reverse=True) if step is None else [step]:
        whole = []
        for saved in there[number]:
            blobs = _Blobs(store, saved)
            try:
                whole.append((_read_metadata(store, saved, blobs), blobs))
            except Incomplete as error:
                reasons.append(str(error))
        if len(whole) > 1:
            raise InvalidArgument(f"{store.url} has step {number} in both layouts: move one of them elsewhere")
        if whole:
            return AwsStep(store.url, number, tuple(reasons), *whole[0])
    more = f"; and {len(reasons) - _TOLD} more" if len(reasons) > _TOLD else ""
    raise Incomplete(f"{store.url}: {'; '.join(reasons[:_TOLD])}{more}")


def _look(store: Store) -> dict[int, list[_Saved]]:
    """What is there of each step. InvalidArgument: of several runs."""
    # The last name of the URL is seen, too: Ray tells its users the URL of a step.
    last = store.url.partition("?")[0].rpartition("/")[2]
    runs: dict[str, dict[tuple[int, str], _Saved]] = {}
    cursor, more = "", True
    while more:
        page, cursor = store.objects("", cursor)
        more = cursor != ""
        for found in page:
            match = _OBJECT.fullmatch(f"{last}/{found.key}")
            if match is None:
                continue
            run, rank, step, ray_step, ray_rank, file = match.groups()
            layout = "default" if step is not None else "Ray"
            place = int(step if step is not None else ray_step), layout
            saved = runs.setdefault(run or "", {}).setdefault(place, _Saved(*place))
            (saved.blobs if file == _BLOB else saved.metadata)[int(rank if rank is not None else ray_rank)] = found
        if len(runs) > 1:
            names = sorted(name.removeprefix(last).lstrip("/") or "." for name in runs)
            told = [*names[:20], *(["..."] if more or len(names) > 20 else [])]
            raise InvalidArgument(f"{store.url} has several runs, give the URL of one: {', '.join(told)}")
    there: dict[int, list[_Saved]] = {}
    for found_runs in runs.values():
        for saved in found_runs.values():
            there.setdefault(saved.step, []).append(saved)
    return there


def _read_metadata(store: Store, saved: _Saved, blobs: _Blobs) -> Metadata:
    """Incomplete: they are missing, or bytes that they name."""
    if not saved.metadata:
        raise Incomplete(f"{saved}: {_METADATA} is missing")
    # Written by whichever rank coordinated; rank 0's are those that the package itself reads.
    chosen = saved.metadata[min(saved.metadata)]
    if chosen.size > METADATA_MAX:
        raise Corrupt(f"{store.url}: {chosen.key} has more than {METADATA_MAX} bytes")
    return read_metadata(store.read(chosen.key, 0, chosen.size), f"{store.url}: {chosen.key}", blobs)
