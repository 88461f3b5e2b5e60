"""From a merged checkpoint to reads into the caller's state: everything is decided and checked before the first byte
changes.

Rules, in the order in which they apply to a part of the state:
- A tensor gets the stored bytes in place; name, dtype and global shape must agree.
- A value, an array, or an empty container gets what is stored at its path, be it one value or a whole subtree.
- An nn.Module keeps its structure. Other Stateful objects get the stored structure where it differs from theirs (a
  fresh optimizer has no state yet); what an optimizer has and the checkpoint has not (state made later, options of a
  newer torch) is dropped.
- A PerRank part of a rank that did not exist at save time keeps what it has.
"""

from __future__ import annotations

import bisect
import collections
import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from safepoint import _torch
from safepoint._boxes import Box, narrowed, parts_of
from safepoint._objects import Decoder
from safepoint._pieces import name_for_rank
from safepoint._reads import Reads, Shards, stored_dtype
from safepoint._shard import Checkpoint, StoredPiece, name_of
from safepoint._state import (
    DICT,
    LIST,
    STATEFUL,
    TUPLE,
    Boxed,
    Flat,
    Leaf,
    Names,
    Placer,
    build,
    check_names,
    element_text,
    is_empty_mapping,
)
from safepoint._walk import describe, paused_collector, read_tensors, walk
from safepoint.errors import Mismatch

if TYPE_CHECKING:
    from safepoint._reads import Pin

_log = logging.getLogger("safepoint")
# A contiguous tensor in this machine's memory: (dtype, no raw type, shape) as they are stored, address, bytes.
_Target = tuple[tuple[str, None, tuple[int, ...]], int, int]
_LISTED = 20  # Names in one error message.


class _Rebuilt(NamedTuple):
    """A Stateful whose state dict is made from the checkpoint: (path below it, how to get the value after reading)."""

    leaves: list[tuple[Sequence[Any], Callable[[], Any]]]


class RestorePlan:
    """Reads and changes of one restore. The constructor only looks; `run` reads and changes."""

    def __init__(
        self,
        flat: Flat,
        names: Names,
        stored: Checkpoint,
        *,
        rank: int,
        world_size: int,
        allow_missing: bool,
        decoder: Decoder,
        cast: bool = False,
    ) -> None:
        """`world_size`: the checkpoint's. `cast`: tensors of another dtype are converted.

        Mismatch: the checkpoint does not fit.
        """
        self._flat = flat
        self._names = names
        self._stored = stored
        self._rank = rank
        self._world_size = world_size
        self._allow_missing = allow_missing
        self._cast = cast
        self._placer = Placer(flat, names)
        self.reads = Reads(stored, decoder)
        self._rebuilt: dict[int, _Rebuilt] = {}
        self._untouched: set[int] = set()  # Statefuls of which the checkpoint has nothing.
        self._missing: list[str] = []
        self._mismatched: list[str] = []
        self._used: set[str] = set()
        self._sorted: list[str] | None = None
        self._boxed = {number: boxed for boxed in flat.boxed for number in boxed.numbers}
        self._foreign: set[str] = set()  # Stored names of other ranks' own parts.
        self._above_own: set[str] = set()  # Names of containers with parts that are each rank's own.
        self._mark_per_rank()
        self._plan()

    # --- deciding

    def _mark_per_rank(self) -> None:
        """A part that was saved as each rank's own is restored as such, also where the state does not say PerRank."""
        owned = self._stored.owned()
        if not owned:
            return
        self._foreign = {name for name, (_, rank) in owned.items() if rank != self._rank}
        bases = {base for base, _ in owned.values()}
        for base in bases:
            while (base := base.rpartition(".")[0]) and base not in self._above_own:
                self._above_own.add(base)
        pieces, values, names = self._stored.pieces, self._stored.values, self._names

        def marked(leaves: list[Leaf]) -> list[Leaf]:
            return [
                leaf._replace(per_rank=True)
                if leaf.name in bases and leaf.name not in pieces and leaf.name not in values
                else leaf
                for leaf in leaves
            ]

        names.tensors, names.arrays, names.values = marked(names.tensors), marked(names.arrays), marked(names.values)
        names.boxed = marked(names.boxed)

    def _plan(self) -> None:
        tolerant, in_rebuilt = self._plan_statefuls()
        rank = self._rank
        names = [name_for_rank(leaf, rank) if leaf.per_rank else leaf.name for leaf in self._names.tensors]
        stored = list(map(self._stored.pieces.get, names))
        self._used.update([name for name, pieces in zip(names, stored, strict=True) if pieces is not None])
        straight: list[tuple[torch.Tensor, StoredPiece, int, int]] = []
        for index, (target, tensor, pieces) in enumerate(
            zip(self._simple_targets(), self._flat.tensors, stored, strict=True)
        ):
            if target is not None and pieces is not None:
                piece = pieces[0]
                if target[0] == piece[1:4] and piece.shape == piece.global_shape:
                    straight.append((tensor, piece, target[1], target[2]))
                    continue
            leaf = self._names.tensors[index]
            if pieces is None:
                self._miss(leaf, names[index], tensor, tolerant, in_rebuilt)
            else:
                self._plan_tensor(index, tensor, leaf, names[index], pieces, in_rebuilt)
        for boxed, leaf in zip(self._flat.boxed, self._names.boxed, strict=True):
            if not boxed.numbers:  # This rank has no part of it.
                self._used.add(name_for_rank(leaf, self._rank))
        self.reads.whole(straight)
        for old, leaf in (
            *zip(self._flat.arrays, self._names.arrays, strict=True),
            *zip(self._flat.values, self._names.values, strict=True),
        ):
            name = name_for_rank(leaf, self._rank)
            found = [name] if name in self._stored.values or name in self._stored.pieces else self._below(leaf)
            self._used.update(found)
            if not found:
                self._miss(leaf, name, old, tolerant, in_rebuilt)
            elif leaf.container not in in_rebuilt:  # What is rebuilt has its own reads.
                self._place(leaf, old, self._getter(leaf, name, found, old))
        self._check_lists()
        if self._missing or self._mismatched:
            # A tensor of several boxes was looked up for each.
            self._missing, self._mismatched = (
                list(dict.fromkeys(names)) for names in (self._missing, self._mismatched)
            )
            raise Mismatch(self._mismatch_text(), tuple(self._missing), tuple(self._mismatched))

    def _simple_targets(self) -> list[_Target | None]:
        """The tensors that stored bytes can be read straight into; None: the general way decides."""
        count = len(self._flat.tensors)
        try:
            known = read_tensors(self._flat.tensors)
        except (RuntimeError, NotImplementedError):
            return [None] * count
        simple = known.plain & known.contiguous & ~known.negative & (known.nbytes > 0)
        simple[list(self._boxed)] = False
        names = {dtype: name for dtype, name in _torch.DTYPE_NAMES.items() if dtype not in _torch.COMPLEX_DTYPES}
        return [
            ((names[dtype], None, shape), address, nbytes)
            if straight and device.type == "cpu" and dtype in names
            else None
            for straight, device, dtype, shape, address, nbytes in zip(
                simple.tolist(),
                known.devices,
                known.dtypes,
                known.shapes,
                known.addresses.tolist(),
                known.nbytes.tolist(),
                strict=True,
            )
        ]

    def _mismatch_text(self) -> str:
        parts = []
        for title, names in (("not in the checkpoint", self._missing), ("different", self._mismatched)):
            if names:
                more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
                parts.append(f"{title}: {', '.join(names[:_LISTED])}{more}")
        return "the checkpoint does not fit the state; nothing was changed; " + "; ".join(parts)

    def _miss(self, leaf: Leaf, name: str, current: Any, tolerant: set[int], in_rebuilt: dict[int, int]) -> None:
        own = leaf.per_rank or leaf.name in self._above_own
        if (own and self._rank >= self._world_size) or leaf.container in tolerant:
            return
        if leaf.container in in_rebuilt and self._was_empty(name):
            return
        empty = isinstance(current, Mapping) and not current
        if not self._allow_missing and not empty:
            self._missing.append(name)
            return
        owner = in_rebuilt.get(leaf.container)
        if empty and owner is None:
            # torch's planners store no empty dict: what is missing may have been one.
            _log.warning("restore: the checkpoint has nothing for %s, which is empty here and stays so", name)
        if owner is not None:
            prefix = len(self._names.paths[owner])
            self._rebuilt[owner].leaves.append((leaf.path[prefix:], functools.partial(_same, current)))

    def _was_empty(self, name: str) -> bool:
        """Whether a container above is stored as empty."""
        while name := name.rpartition(".")[0]:
            if name in self._stored.values:
                return True
        return False

    def _under(self, path: Sequence[Any], prefix: str, per_rank: bool) -> list[str]:
        """Stored names of what lies below a path."""
        if self._sorted is None:
            self._sorted = sorted((*self._stored.pieces, *self._stored.values))
        names = self._sorted
        suffix = f"@{self._rank}" if per_rank else ""
        if not path:
            found = names
        else:
            start = bisect.bisect_left(names, prefix + ".")
            found = names[start : bisect.bisect_left(names, prefix + "/", start)]  # "/" is the character after "."
        if per_rank:
            found = [name for name in found if name.endswith(suffix)]
        elif self._foreign:
            found = [name for name in found if name not in self._foreign]
        # A name does not say where a key ends that has a dot in it; the stored path does.
        # Keys are compared as texts, as names do: torch's planners know no others.
        texts = list(map(element_text, path))
        return [name for name in found if list(map(element_text, self._path(name)[: len(path)])) == texts]

    def _path(self, name: str) -> Sequence[Any]:
        return self._stored.full_path(name)

    def _container_name(self, number: int) -> str:
        return name_of(self._names.paths[number])

    def _plan_statefuls(self) -> tuple[set[int], dict[int, int]]:
        """Containers whose missing leaves are fine, and those that are replaced (by the number of their Stateful)."""
        tokens, names = self._flat.tokens, self._names
        if not any(token[0] == STATEFUL for token in tokens):
            return set(), {}
        ends = list(range(1, len(tokens) + 1))
        for number in range(len(tokens) - 1, 0, -1):
            parent = names.parents[number][0]
            ends[parent] = max(ends[parent], ends[number])
        leaves = (*names.tensors, *names.boxed, *names.arrays, *names.values)
        tolerant: set[int] = set()
        in_rebuilt: dict[int, int] = {}
        for number, token in enumerate(tokens):
            if token[0] != STATEFUL or number in in_rebuilt:
                continue
            stateful = self._flat.containers[number]
            inside = range(number, ends[number])
            prefix = self._container_name(number)
            own = {name_for_rank(leaf, self._rank) for leaf in leaves if leaf.container in inside}
            stored = set(self._under(names.paths[number], prefix, names.per_rank[number]))
            whole = f"{prefix}@{self._rank}" if names.per_rank[number] else prefix
            if whole in self._stored.values and not stored:
                stored = {whole}  # Its state dict was empty, or no dict: what it has now was not there then.
                tolerant.update(inside)
            if not stored:
                self._untouched.add(number)
                continue
            if own == stored:
                continue
            if _torch.is_module(stateful):
                extra = sorted(stored - own)
                if extra:
                    shown = ", ".join(extra[:5])
                    _log.warning(
                        "restore: the checkpoint has %d entries that %s does not: %s",
                        len(extra),
                        prefix or "the module",
                        shown,
                    )
                    self._used.update(extra)
                continue
            self._plan_rebuild(number, stored, own)
            in_rebuilt.update(dict.fromkeys(inside, number))
            if isinstance(stateful, torch.optim.Optimizer):
                tolerant.update(inside)
        return tolerant, in_rebuilt

    def _plan_rebuild(self, number: int, stored: set[str], own: set[str]) -> None:
        prefix = len(self._names.paths[number])
        inside = self._rebuilt[number] = _Rebuilt([])
        self._used.update(stored)
        targets: dict[str, Any] = {}  # Name -> the tensor of the state.
        if own & stored:
            tensors = zip(self._flat.tensors, self._names.tensors, strict=True)
            targets.update((name_for_rank(leaf, self._rank), tensor) for tensor, leaf in tensors)
            values = zip(self._flat.boxed, self._names.boxed, strict=True)
            targets.update((name_for_rank(leaf, self._rank), boxed.value) for boxed, leaf in values)
        stateful = self._flat.containers[number]
        parameters: list[Any] = []
        if isinstance(stateful, torch.optim.Optimizer):
            parameters = [parameter for group in stateful.param_groups for parameter in group["params"]]
        counted = self._counters_in_parts(stored, own)
        for leaf, old, found in counted:
            inside.leaves.append((leaf.path[prefix:], self._getter(leaf, leaf.name, found, old)))
        in_parts = {name for _, _, found in counted for name in found}
        for name in [n for n in (*self._stored.pieces, *self._stored.values) if n in stored and n not in in_parts]:
            path = self._path(name)[prefix:]
            target = targets.get(name)
            if target is not None and name in self._stored.pieces and not getattr(target, "is_meta", False):
                # The tensor that is there is read into, by the general rule; the new dict refers to it.
                inside.leaves.append((path, functools.partial(_same, target)))
            elif (made := self._state_like_parameter(parameters, name, path)) is not None:
                inside.leaves.append((path, functools.partial(_same, made)))
            else:
                inside.leaves.append((path, self.reads.getter(name, None)))

    def _counters_in_parts(self, stored: set[str], own: set[str]) -> list[tuple[Leaf, Any, list[str]]]:
        """Counters of the state that are stored count by count: (leaf, counter, stored names)."""
        result = []
        for leaf, old in zip(self._names.values, self._flat.values, strict=True):
            if isinstance(old, collections.Counter):
                name = name_for_rank(leaf, self._rank)
                if name in own and name not in stored and (found := self._below(leaf)):
                    result.append((leaf, old, found))
        return result

    def _state_like_parameter(self, parameters: list[Any], name: str, path: Sequence[Any]) -> Any:
        """A new state tensor of an optimizer in the layout of its parameter, which it must have; None: a plain one.

        `parameters`: the optimizer's, in the order of the numbers in its state dict.
        """
        pieces = self._stored.pieces.get(name)
        if pieces is None or len(path) != 3 or path[0] != "state" or path[1] not in range(len(parameters)):
            return None
        parameter, dtype = parameters[path[1]], stored_dtype(pieces[0])
        if not _torch.is_dtensor(parameter) or parameter.shape != pieces[0].global_shape or dtype is None:
            return None
        boxes = parts_of(parameter)[1]
        local = torch.empty(_torch.local_tensor(parameter).shape, dtype=dtype, device=parameter.device)
        if isinstance(boxes, str):
            return None
        for box in boxes:
            self._read_into(narrowed(local, box), name, pieces, box, in_place=False)
        return _torch.dtensor_from_local(local, parameter)

    def _plan_tensor(
        self,
        index: int,
        tensor: torch.Tensor,
        leaf: Leaf,
        name: str,
        pieces: list[StoredPiece],
        in_rebuilt: dict[int, int],
    ) -> None:
        first = pieces[0]
        dtype = _torch.DTYPE_NAMES.get(tensor.dtype)
        other: torch.dtype | None = None  # The stored dtype, where it is to be converted.
        if first.dtype != (dtype or "U8") or first.raw != (None if dtype else _torch.RAW_NAMES.get(tensor.dtype)):
            other = stored_dtype(first) if self._cast and not tensor.is_meta else None
            if other is None:
                self._mismatched.append(
                    f"{name} (dtype {first.raw or first.dtype} in the checkpoint, {tensor.dtype} here)"
                )
                return
        boxed = self._boxed.get(index)
        box: Box | None = None
        if boxed is not None:
            if isinstance(boxed.boxes, str):
                self._mismatched.append(f"{name} ({boxed.boxes})")
                return
            box = boxed.boxes[index - boxed.first]
        shape = tuple(tensor.shape) if box is None else box.global_shape
        if first.global_shape != shape:
            self._mismatched.append(f"{name} (shape {list(first.global_shape)} in the checkpoint, {list(shape)} here)")
            return
        if tensor.is_meta:
            if boxed is None or index == boxed.first:
                self._make_tensor(tensor, boxed, leaf, name, pieces, in_rebuilt)
            return
        if _torch.is_wrapper(tensor):
            self._mismatched.append(f"{name} (the tensor here cannot be written in place)")
            return
        overlapping = _torch.strides_overlap(tensor)
        if other is not None:
            if overlapping:
                self._mismatched.append(f"{name} (the tensor here cannot be written in place)")
                return
            buffer = torch.empty(tensor.shape, dtype=other)
            self._read_into(buffer, name, pieces, box, in_place=False)
            self.reads.converted(tensor, buffer)
            return
        if overlapping:
            self._plan_expanded(tensor, leaf, name, pieces, box, in_rebuilt)
            return
        self._read_into(tensor, name, pieces, box, in_place=True)

    def _plan_expanded(
        self,
        tensor: torch.Tensor,
        leaf: Leaf,
        name: str,
        pieces: list[StoredPiece],
        box: Box | None,
        in_rebuilt: dict[int, int],
    ) -> None:
        """An expanded target gets the values in place where they repeat as it does; else a tensor takes its place."""
        if box is not None or leaf.container in in_rebuilt:
            self._mismatched.append(f"{name} (the tensor here cannot be written in place)")
            return
        new = torch.empty(tensor.shape, dtype=tensor.dtype)
        self._read_into(new, name, pieces, None, in_place=False)

        def place() -> None:
            base = _torch.not_expanded(tensor, tensor)
            values = _torch.not_expanded(new, tensor)
            if _torch.same_bits(values.expand(new.shape), new):
                _torch.copy_values(base, values)
            else:
                self._placer.put(leaf.container, leaf.slot, new)

        self.reads.after.append(place)

    def _make_tensor(
        self,
        meta: torch.Tensor,
        boxed: Boxed | None,
        leaf: Leaf,
        name: str,
        pieces: list[StoredPiece],
        in_rebuilt: dict[int, int],
    ) -> None:
        """A new tensor in the place of one on the meta device."""
        if boxed is not None and not _torch.is_dtensor(boxed.value):
            self._mismatched.append(f"{name} (its parts are on the meta device)")
            return
        old: Any = meta if boxed is None else boxed.value
        local = torch.empty((meta if boxed is None else _torch.local_tensor(old)).shape, dtype=meta.dtype)
        if boxed is None:
            self._read_into(local, name, pieces, None, in_place=False)
            new = local
        else:
            for box in boxed.boxes:
                assert isinstance(box, Box)
                self._read_into(narrowed(local, box), name, pieces, box, in_place=False)
            new = _torch.dtensor_from_local(local, old)
        if leaf.container not in in_rebuilt:
            value = torch.nn.Parameter(new, old.requires_grad) if isinstance(old, torch.nn.Parameter) else new
            self.reads.after.append(lambda: self._placer.put(leaf.container, leaf.slot, value))

    def _read_into(
        self, tensor: torch.Tensor, name: str, pieces: list[StoredPiece], box: Box | None, *, in_place: bool
    ) -> None:
        problem = self.reads.into(tensor, name, pieces, box, in_place=in_place)
        if problem is not None:
            self._mismatched.append(problem)

    def _below(self, leaf: Leaf) -> list[str]:
        return self._under(leaf.path, leaf.name, leaf.per_rank)

    def _getter(self, leaf: Leaf, name: str, found: list[str], old: Any) -> Callable[[], Any]:
        """How to get what is stored for a value or array: one thing of its name, or a subtree."""
        if found == [name]:
            return self.reads.getter(name, old)
        leaves = [(self._path(n)[len(leaf.path) :], self.reads.getter(n, None)) for n in found]

        def whole() -> Any:
            new = build([(path, get()) for path, get in leaves])
            return _counter_like(old, new) if isinstance(old, collections.Counter) and type(new) is dict else new

        return whole

    def _place(self, leaf: Leaf, old: Any, getter: Callable[[], Any]) -> None:
        def place() -> None:
            new = getter()
            if new is old:
                return
            # An empty mapping of the caller's own class is filled, so that it stays the object that it was.
            slot_value = self._current(leaf)
            if is_empty_mapping(slot_value) and isinstance(new, dict) and hasattr(slot_value, "update"):
                slot_value.update(new)
            else:
                self._placer.put(leaf.container, leaf.slot, new)

        self.reads.after.append(place)

    def _current(self, leaf: Leaf) -> Any:
        container = self._flat.containers[leaf.container]
        kind = self._flat.tokens[leaf.container][0]
        if kind in (DICT, LIST, TUPLE):
            return container[leaf.slot]
        if kind == STATEFUL:
            return self._flat.children[leaf.container]
        return container.value if leaf.slot is None else getattr(container, leaf.slot)

    def _check_lists(self) -> None:
        """Refuses a list that is longer in the checkpoint: it would be cut without a word. More keys of dicts do no
        harm.
        """
        lists = {
            self._container_name(n): n
            for n, token in enumerate(self._flat.tokens)
            if token[0] in (LIST, TUPLE) and n not in self._untouched
        }
        if not lists:
            return
        total = len(self._stored.pieces) + len(self._stored.values)
        if total == len(self._used):
            return
        told: set[str] = set()
        for name in (*self._stored.pieces, *self._stored.values):
            if name in self._used:
                continue
            prefix = name
            while prefix and (prefix := prefix.rpartition(".")[0]):
                if prefix in lists and prefix not in told:
                    container = lists[prefix]
                    depth = len(self._names.paths[container])
                    path = self._path(name)
                    have = len(self._flat.containers[container])
                    if len(path) > depth and isinstance(path[depth], list) and path[depth][0] >= have:
                        told.add(prefix)
                        self._mismatched.append(f"{prefix} (more elements in the checkpoint than the {have} here)")

    # --- doing

    def run(self, shards: Shards) -> None:
        """Reads, then puts values in place and calls `load_state_dict`. Corrupt says whether the state was changed."""
        self.reads.run(shards)
        for number, rebuilt in self._rebuilt.items():
            state = self._flat.children[number] = build([(path, get()) for path, get in rebuilt.leaves])
            if isinstance(self._flat.containers[number], torch.optim.Optimizer):
                state.setdefault("state", {})  # torch's planners store no empty dict.
        self._placer.finish(self._load)

    def _load(self, number: int, stateful: Any, state: Any) -> None:
        if number in self._untouched:
            return
        if _torch.is_module(stateful):
            if _torch.loads_by_copy(stateful, state):
                return
            if any(p.is_meta for p in (*stateful.parameters(), *stateful.buffers())):
                stateful.load_state_dict(state, assign=True)
                return
        stateful.load_state_dict(state)


def _same(value: Any) -> Any:
    return value


def _counter_like(old: collections.Counter[Any], new: dict[Any, Any]) -> collections.Counter[Any]:
    """A counter that torch's planner took for a dict, whose keys it made texts of; `old` says what they were."""
    keys = {str(key): key for key in old}
    if old and all(type(key) is int for key in old):
        keys = {text: int(text) for text in map(str, new) if text.isdecimal()} | keys
    return collections.Counter({keys.get(str(key), key): count for key, count in new.items()})


def plan_restore(
    pin: Pin,
    state: Any,
    rank: int,
    world_size: int,
    *,
    allow_missing: bool,
    decoder: Decoder,
    cast: bool = False,
) -> tuple[RestorePlan, Shards]:
    """Walks the state, reads as many headers as it needs, and decides everything. Changes nothing.

    `cast`: tensors of another dtype are converted, as DCP does.
    """
    shards = Shards(pin)
    saved = pin.info.world_size
    with paused_collector():
        flat = walk(state)
        names = describe(flat.tokens)
        check_names(names)
        stored = Checkpoint()
        # The own shard first: of values that differ although they should not, a rank gets its own back.
        for shard_rank in sorted(range(saved), key=lambda r: (r != rank or saved != world_size, r)):
            if stored.ranks and _has_everything(stored, flat, names, rank):
                break
            stored.add(shards.parse(shard_rank))
        plan = RestorePlan(
            flat, names, stored, rank=rank, world_size=saved, allow_missing=allow_missing, decoder=decoder, cast=cast
        )
    return plan, shards


def plan_from(
    stored: Checkpoint, state: Any, rank: int, saved: int, *, allow_missing: bool, decoder: Decoder
) -> RestorePlan:
    """As `plan_restore`, for headers that were all read; `saved`: the checkpoint's world size. As DCP does, tensors of
    another dtype are converted.
    """
    with paused_collector():
        flat = walk(state)
        names = describe(flat.tokens)
        check_names(names)
        return RestorePlan(
            flat, names, stored, rank=rank, world_size=saved, allow_missing=allow_missing, decoder=decoder, cast=True
        )


def _has_everything(stored: Checkpoint, flat: Flat, names: Names, rank: int) -> bool:
    """Whether the shards read so far have everything the state asks for, so that no further header is needed."""
    if flat.boxed:
        return False

    def found(leaves: Iterable[Leaf], known: Any) -> bool:
        return all(name_for_rank(leaf, rank) in known for leaf in leaves)

    values = stored.values
    return (
        not any(token[0] == STATEFUL for token in flat.tokens)
        and found(names.tensors, stored.pieces)
        and found(names.values, values)
        and all(
            name in values or name in stored.pieces for name in (name_for_rank(leaf, rank) for leaf in names.arrays)
        )
        and all(stored.pieces[name_for_rank(leaf, rank)][0].whole for leaf in names.tensors)
    )
