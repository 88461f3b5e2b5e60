"""Steps of a durable tier, read without a daemon: `safepoint.load`, `safepoint.load_into`."""

from __future__ import annotations

import itertools
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from safepoint import _core, _launch
from safepoint._objects import Decoder
from safepoint._reads import Reads, Shards
from safepoint._save import settle_all_copies
from safepoint._shard import Checkpoint
from safepoint._state import build
from safepoint._urls import shown
from safepoint.api import RestoreInfo, as_step, restore_from
from safepoint.errors import (
    Corrupt,
    Denied,
    Incomplete,
    InvalidArgument,
    LimitExceeded,
    NotFound,
    NotPlain,
    SafepointError,
)

if TYPE_CHECKING:
    from safepoint._core import StepName, StoredPin
    from safepoint._objects import Json
    from safepoint._reads import Pin

# The URL of one step: the store's own, and what docs/formats/store.md puts behind it.
_STEP_URL = re.compile(r"(.+?)/([A-Za-z0-9_-]{1,200})/step-(\d{1,19})(?:/([0-9a-f]{32}))?/?")

_LOOKS = 64  # Manifests that are read to find the newest step.
_UNREADABLE = (Corrupt, Incomplete, LimitExceeded, Denied)  # Said of one step: others may be readable.


def load(
    url: str, *, namespace: str | None = None, step: int | None = None, rank: int = 0, allow_pickle: bool = False
) -> Any:
    """The whole state of a durable step, as new objects: dicts, lists, tensors in this machine's memory, plain values.

    `url`: of the durable tier ("file:///mnt/checkpoints", "s3://bucket/base"), or of one step in it
    (".../run-3/step-40"). `namespace`: may be left out where the tier has one. `step`: None for the newest. Of parts
    that were each rank's own, those of `rank`.
    Modules and optimizers come as their state dicts. Needs no daemon.

    NotFound: no such step. Incomplete, Corrupt: an object of it is missing, or does not match its checksums; an older
    step is read only if it is asked for, and damage of older ones is not looked at. NotPlain: a value was saved with
    pickle.
    """
    with open_step(step_url(url, namespace=namespace, step=step)) as pin:
        parts = read_parts(pin, Decoder(allow_pickle), rank)
        return build([(part.path, part.value) for part in parts])


class Part(NamedTuple):
    """A tensor, array or value of a step."""

    name: str
    path: Sequence[Json]
    owner: int | None  # The rank whose own it is.
    value: Any


def read_parts(
    pin: Pin, decoder: Decoder, rank: int | None, refused: Callable[[str, NotPlain], None] | None = None
) -> list[Part]:
    """The parts of a step, as new objects; of those that are one rank's own, that rank's (None: all ranks').

    NotPlain: a value was saved with pickle; where `refused` is given, that is told and the value left out.
    """
    shards = Shards(pin)
    stored = Checkpoint()
    for number in range(pin.info.world_size):
        stored.add(shards.parse(number))
    reads = Reads(stored, decoder)
    owners = {name: rank for name, (_, rank) in stored.owned().items()}
    getters: list[tuple[str, Callable[[], Any]]] = []
    for name in (*stored.pieces, *stored.values):
        if rank is not None and owners.get(name, rank) != rank:
            continue
        try:
            getters.append((name, reads.getter(name, None)))
        except NotPlain as error:
            if refused is None:
                raise
            refused(name, error)
    reads.run(shards)
    return [Part(name, stored.full_path(name), owners.get(name), get()) for name, get in getters]


def load_into(
    url: str,
    state: Any,
    *,
    namespace: str | None = None,
    step: int | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    allow_missing: bool = False,
    allow_pickle: bool = False,
    verify_first: bool = False,
) -> RestoreInfo:
    """Restores a durable step into `state`, in place, as `Checkpointer.restore` does, and reads only the ranges that
    this rank needs. Any world size. `rank`, `world_size`: of the process group or launch unless given.

    `url`, `namespace`, `step` and errors as in `load`; Mismatch as in `Checkpointer.restore`.
    """
    settle_all_copies()  # Nothing that is being copied may change under the copy.
    begin = time.perf_counter()
    place = _launch.identify(rank, world_size)
    with open_step(step_url(url, namespace=namespace, step=step)) as pin:
        return restore_from(
            pin,
            state,
            place,
            begin,
            allow_missing=allow_missing,
            decoder=Decoder(allow_pickle),
            verify_first=verify_first,
        )


class StepUrl(NamedTuple):
    """Which step of a durable tier; None: the only namespace, the newest step, its last try."""

    store: str
    namespace: str | None
    step: int | None
    attempt: bytes | None


def step_url(url: str, *, namespace: str | None, step: int | None) -> StepUrl:
    """What a URL names, of a tier or of one step in it, with what is given beside it."""
    place, parameters, options = url.partition("?")
    if (match := _STEP_URL.fullmatch(place)) is None:
        return StepUrl(url, namespace, None if step is None else as_step(step), None)
    if namespace is not None or step is not None:
        raise InvalidArgument(f"{shown(url)} names a step: do not give a namespace or step with it")
    attempt = bytes.fromhex(match[4]) if match[4] else None
    return StepUrl(f"{match[1]}{parameters}{options}", match[2], as_step(int(match[3])), attempt)


def url_of(store: str, name: StepName) -> str:
    """The URL of one step of the store with that URL, as `step_url` reads it."""
    place, mark, parameters = store.partition("?")
    return f"{place}/{name.ns}/step-{name.step}/{name.attempt.hex()}{mark}{parameters}"


def open_each(store: _core.Store, names: Iterable[StepName]) -> Iterator[tuple[StepName, StoredPin | SafepointError]]:
    """Each of these steps, or why it cannot be read; without those that were deleted since they were listed.

    Unavailable: that is said of the store, not of a step.
    """
    for name in names:
        found: StoredPin | SafepointError
        try:
            found = store.open(name)
        except NotFound:
            continue
        except _UNREADABLE as error:
            found = error
        yield name, found


def open_step(wanted: StepUrl) -> StoredPin:
    """A context manager. NotFound: no such step. Corrupt, Incomplete, LimitExceeded, Denied: its manifest or lineage
    cannot be read.
    """
    url, namespace, step, attempt = wanted
    store = _core.Store(url)
    names = store.steps(namespace or "")
    spaces = sorted({name.ns for name in names})
    if namespace is None and len(spaces) > 1:
        raise InvalidArgument(f"{url} has several namespaces, name one: {', '.join(spaces[:20])}")
    there = [name for name in names if step is None or name.step == step]
    there = [name for name in there if attempt is None or name.attempt == attempt]
    if not there:
        of = f" of namespace {namespace}" if namespace is not None else ""
        what = f"no step {step}{of}" if step is not None else f"no whole step{of}"
        what += f" with attempt {attempt.hex()}" if attempt is not None else ""
        steps = ", ".join(str(number) for number in sorted({name.step for name in names})[-20:])
        raise NotFound(f"{url} has {what}; whole steps: {steps or 'none'}")
    try:
        return _newest(store, there)
    except _UNREADABLE as error:
        if step is not None or attempt is not None:
            raise
        raise type(error)(
            f"{error}; it is the newest step there: an older one can be chosen with step=, or by its URL"
        ) from error


def _newest(store: _core.Store, names: list[StepName]) -> StoredPin:
    """Of the newest generation the latest step, and of that the last try; of this user's steps if there are some.

    A job that was rolled back saves smaller steps again, in a newer generation: they are the newer ones. What cannot be
    read could be the newest as long as nothing that was made after it can: raises why (F68). NotFound: all have gone.
    """
    # Where there are very many, those that were made last, as daemons do. Of those made in one second the larger first.
    made = sorted(names, key=lambda name: (name.modified, name.step), reverse=True)
    looks = [found for _, found in itertools.islice(open_each(store, made), _LOOKS)]
    pins = [found for found in looks if not isinstance(found, SafepointError)]
    users = {pin.uid for pin in pins}
    user = os.getuid() if os.getuid() in users else min(users, default=None)
    if len(users) > 1 and user != os.getuid():
        told = ", ".join(str(uid) for uid in sorted(users))
        raise InvalidArgument(f"{store.url} has steps of users {told} under this name: give the URL of one attempt")
    for found in looks:
        if isinstance(found, SafepointError):
            raise found
        if found.uid == user:
            break
    else:
        raise NotFound(f"{store.url}: every step that was asked for was deleted since it was listed")
    own = (pin for pin in pins if pin.uid == user)
    return max(own, key=lambda pin: (pin.info.generation, pin.info.step, pin.info.try_number))
