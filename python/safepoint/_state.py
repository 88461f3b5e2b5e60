"""Walk of a training state into leaves, and the way back.

Containers are dicts, lists, tuples, dataclasses, PerRank and Stateful objects (whose `state_dict()` is walked). Leaves
are tensors, boxed tensors (DTensors and whatever else stands for k >= 0 boxes of a global tensor), arrays (numpy arrays
and bytes over 4 KiB, long lists and tuples of numbers of one type, stored like tensors) and values (plain Python,
stored as JSON). A shorter list or tuple without tensors, arrays or containers in it is one value.

The walk makes no object per leaf: it fills flat lists, and one *token* per container that says what was met there.
Equal tokens mean equal structure, so that a steady-state save compares two lists and never computes a path. `describe`
turns tokens into names and paths.
"""

from __future__ import annotations

import array
import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, NoReturn, TypeVar

import numpy as np
import torch

from safepoint import _torch
from safepoint._boxes import Box, Chunks, is_boxed, known_parts, parts_of
from safepoint._objects import Encoder, Json
from safepoint.errors import InvalidArgument, NotPlain

T = TypeVar("T")

TENSOR, BOXED, ARRAY, VALUE = "t", "D", "n", "v"  # BOXED stands in tokens with the number of boxes behind it: "D2".
_ONE_BOX = BOXED + "1"
DICT, LIST, TUPLE, DATACLASS, STATEFUL, PER_RANK = "d", "l", "u", "a", "s", "p"
_CONTAINERS = frozenset({DICT, LIST, TUPLE, DATACLASS, STATEFUL, PER_RANK})
_COMMON = _CONTAINERS | {TENSOR, ARRAY, VALUE}

ARRAY_BYTES_MIN = 4097  # Larger ones would bloat the header, which every reader parses.
LONG_MIN = 1001  # Elements of a list or tuple that is stored like an array.
DEPTH_MAX = 200
NAME_BYTES_MAX = 1024
_RANK_BYTES = 6  # "@65535"


class LongList(np.ndarray[Any, Any]):
    """The numbers of a long list."""

    python = "list"


class LongTuple(LongList):
    """The numbers of a long tuple."""

    python = "tuple"


LONG_KINDS: Mapping[str, Callable[[Any], Any]] = {"list": list, "tuple": tuple}
LONG_DTYPES = frozenset({"<i8", "<f8", "|b1"})
_LONG_LIST, _LONG_TUPLE = "L", "U"
_LONG_TYPES: Mapping[type, Callable[[Any], Any]] = {
    int: lambda values: np.frombuffer(array.array("q", values), dtype="<i8"),
    float: lambda values: np.frombuffer(array.array("d", values), dtype="<f8"),
    bool: lambda values: np.frombuffer(bytes(values), dtype="|b1"),
}


def _long_array(value: Any) -> LongList | None:
    """None: an integer does not fit into 64 bits."""
    try:
        numbers = _LONG_TYPES[type(value[0])](value)
    except OverflowError:
        return None
    result: LongList = numbers.view(LongTuple if isinstance(value, tuple) else LongList)
    return result


class PerRank(Generic[T]):
    """Marks a part of the state that differs from rank to rank: random number state, a data loader's position.

    Every rank saves its own and gets its own back; a rank that did not exist at save time keeps what it has. `value` is
    the part.
    """

    __slots__ = ("value",)

    def __init__(self, value: T) -> None:
        self.value = value

    def __repr__(self) -> str:
        return f"PerRank({self.value!r})"


# Per container: its kind, its keys (a count for lists and tuples), the kinds of its children.
Token = tuple[str, Any, tuple[str, ...]]


class Boxed(NamedTuple):
    """A boxed tensor of the state."""

    first: int  # Number of its first local tensor in `Flat.tensors`.
    value: Any
    boxes: tuple[Box, ...] | str  # One per local tensor; a text: why there are none, and there is one local tensor.

    @property
    def numbers(self) -> range:
        """Of its local tensors."""
        return range(self.first, self.first + (1 if isinstance(self.boxes, str) else len(self.boxes)))


class Flat:
    """What one walk found. A boxed tensor has a local tensor per box, one after the other."""

    __slots__ = ("arrays", "boxed", "children", "containers", "tensors", "tokens", "values")

    def __init__(self) -> None:
        self.tokens: list[Token] = []
        self.containers: list[Any] = []
        self.children: dict[int, Any] = {}  # Container number of a Stateful -> its state dict.
        self.tensors: list[torch.Tensor] = []
        self.boxed: list[Boxed] = []
        self.arrays: list[np.ndarray[Any, Any] | bytes | bytearray] = []
        self.values: list[Any] = []


KINDS: dict[type, str] = {
    torch.Tensor: TENSOR,
    torch.nn.Parameter: TENSOR,
    type(None): VALUE,
    bool: VALUE,
    int: VALUE,
    float: VALUE,
    str: VALUE,
    complex: VALUE,
    torch.Size: VALUE,
    collections.Counter: VALUE,
    PerRank: PER_RANK,
    Chunks: BOXED,
}


def know_dtensors() -> bool:
    """From when torch's module of DTensors is imported on, their class needs no question. True: since this call."""
    kind = _torch.imported_dtensor()
    if kind is None or kind in KINDS:
        return False
    KINDS[kind] = BOXED
    return True


def kind_of(value: Any) -> str:
    kind = KINDS.get(type(value))
    if kind is not None:
        return kind
    if type(value) is dict:  # The most frequent by far.
        return DICT if value else VALUE
    if isinstance(value, torch.Tensor):
        return BOXED if is_boxed(value) else TENSOR
    if isinstance(value, list | tuple):
        if isinstance(value, tuple) and type(value) is not tuple:
            return TUPLE if value else VALUE
        types = set(map(type, value))
        if all(KINDS.get(kind) == VALUE for kind in types):
            if len(value) < LONG_MIN or len(types) > 1 or not types <= _LONG_TYPES.keys():
                return VALUE
            return _LONG_TUPLE if type(value) is tuple else _LONG_LIST if type(value) is list else VALUE
        return (LIST if isinstance(value, list) else TUPLE) if any(kind_of(v) != VALUE for v in value) else VALUE
    if isinstance(value, np.ndarray):
        return ARRAY if value.nbytes >= ARRAY_BYTES_MIN and not value.dtype.hasobject else VALUE
    if isinstance(value, bytes | bytearray):
        return ARRAY if len(value) >= ARRAY_BYTES_MIN else VALUE
    if isinstance(value, collections.Counter):
        return VALUE
    if is_boxed(value):
        return BOXED
    if (
        not isinstance(value, type)
        and callable(getattr(value, "state_dict", None))
        and hasattr(value, "load_state_dict")
    ):
        return STATEFUL
    if isinstance(value, Mapping):
        return DICT if value else VALUE
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return DATACLASS
    return VALUE


class _Walker:
    def __init__(self) -> None:
        self.flat = Flat()
        self.path: list[Any] = []

    def visit(self, kind: str, container: Any) -> None:
        flat = self.flat
        flat.containers.append(container)
        keys, children = open_container(flat, kind, container)
        kinds: tuple[Any, ...] = tuple(map(KINDS.get, map(type, children)))
        if None in kinds:
            kinds = tuple([kind or kind_of(child) for kind, child in zip(kinds, children, strict=True)])
        opened: dict[int, Any] = {}
        if not _COMMON.issuperset(kinds):
            final = list(kinds)
            for index, kind_found in enumerate(kinds):
                if kind_found not in _COMMON:
                    final[index], opened[index] = open_leaf(kind_found, children[index])
            kinds = tuple(final)
        flat.tokens.append((kind, keys, kinds))
        if kinds.count(TENSOR) == len(kinds):
            flat.tensors += children
            return
        inner = False
        for index, (child, child_kind) in enumerate(zip(children, kinds, strict=True)):
            if child_kind == TENSOR:
                flat.tensors.append(child)
            elif child_kind == VALUE:
                flat.values.append(stored_value(child))
            elif child_kind == ARRAY:
                flat.arrays.append(child)
            elif child_kind in _CONTAINERS:
                inner = True
            else:
                add_leaf(flat, child, opened[index])
        if not inner:
            return
        if len(self.path) > DEPTH_MAX:
            refuse_depth(self.path)
        for key, child, child_kind in zip(_iterate(keys), children, kinds, strict=True):
            if child_kind in _CONTAINERS:
                self.path.append(key)
                self.visit(child_kind, child)
                self.path.pop()


def open_container(flat: Flat, kind: str, container: Any) -> tuple[Any, Sequence[Any]]:
    """Keys (as in its token) and children of the container that was added to `flat.containers` last."""
    if kind == DICT:
        return tuple(container), list(container.values())
    if kind in (LIST, TUPLE):
        return len(container), container
    if kind == DATACLASS:
        keys = tuple(field.name for field in dataclasses.fields(container))
        return keys, [getattr(container, key) for key in keys]
    if kind == STATEFUL:
        state = flat.children[len(flat.containers) - 1] = container.state_dict()
        return None, [state]
    return None, [container.value]


def open_leaf(kind: str, value: Any) -> tuple[str, Any]:
    """For leaves that are neither tensor, array nor value: the kind for the token, and what `add_leaf` needs of it.

    A long list whose numbers fit no array is a value after all.
    """
    if kind == BOXED:
        parts = known_parts(value)
        if parts is not None:
            return _ONE_BOX, parts
        parts = parts_of(value)
        return f"{BOXED}{len(parts[0])}", parts
    numbers = _long_array(value)
    return (VALUE, None) if numbers is None else (kind, numbers)


def add_leaf(flat: Flat, value: Any, opened: Any) -> None:
    if isinstance(opened, LongList):
        flat.arrays.append(opened)
        return
    local, boxes = opened
    tensors = flat.tensors
    # What Boxed(...) comes to, without its frame.
    flat.boxed.append(tuple.__new__(Boxed, (len(tensors), value, boxes)))
    tensors += local


def stored_value(value: Any) -> Any:
    """An empty mapping of whatever class is stored as an empty dict: the one in place is filled, never replaced."""
    return {} if is_empty_mapping(value) else value


def refuse_depth(path: Sequence[Any]) -> NoReturn:
    raise NotPlain(f"{_text(path)[:200]}...: nested deeper than {DEPTH_MAX} levels")


def is_empty_mapping(value: object) -> bool:
    return isinstance(value, Mapping) and not value and not isinstance(value, collections.Counter)


def _iterate(keys: Any) -> Sequence[Any]:
    if keys is None:
        return (None,)
    return range(keys) if isinstance(keys, int) else keys


def _text(path: Sequence[Any]) -> str:
    return ".".join(str(key) for key in path if key is not None)


def root_kind(state: Any) -> str:
    """InvalidArgument: the state is no container, or a tuple (its values could not be put back in place)."""
    kind = kind_of(state)
    if kind == VALUE and isinstance(state, Mapping | list):
        kind = DICT if isinstance(state, Mapping) else LIST
    if kind not in _CONTAINERS or kind == TUPLE:
        raise InvalidArgument(
            f"state must be a dict, list, dataclass or an object with state_dict(), not {type(state).__name__}"
        )
    return kind


def flatten(state: Any) -> Flat:
    """The walk in Python, which says what is meant; `safepoint._walk` has the fast one. Calls `state_dict()` of the
    Stateful objects in the state. Errors: those of `root_kind`; NotPlain: nested too deep; what `state_dict()` raises.
    """
    walker = _Walker()
    walker.visit(root_kind(state), state)
    return walker.flat


class Leaf(NamedTuple):
    """Name and place of one leaf."""

    name: str
    path: tuple[
        Any, ...
    ]  # JSON form: str or int: key; [i]: list index; [i, n]: index in a tuple of n; {"!": ..}: another key.
    per_rank: bool
    container: int
    slot: Any  # Key, index or attribute in that container; None: its only child.


@dataclasses.dataclass(slots=True)
class Names:
    """Leaves in the order of the lists in Flat, and the place of every container."""

    tensors: list[Leaf]  # That of a boxed tensor as often as it has boxes.
    boxed: list[Leaf]
    arrays: list[Leaf]
    values: list[Leaf]
    parents: list[tuple[int, Any]]  # Per container: its parent's number (-1: none) and its slot there.
    paths: list[tuple[Any, ...]]  # Per container.
    per_rank: list[bool]  # Per container.


class _Describer:
    def __init__(self, tokens: Sequence[Token]) -> None:
        self.tokens = tokens
        self.names = Names([], [], [], [], [], [], [])

    def visit(self, parent: tuple[int, Any], path: tuple[Any, ...], prefix: str, per_rank: bool) -> None:
        names = self.names
        number = len(names.parents)
        kind, keys, kinds = self.tokens[number]
        per_rank = per_rank or kind == PER_RANK
        names.parents.append(parent)
        names.paths.append(path)
        names.per_rank.append(per_rank)
        lists = {TENSOR: names.tensors, ARRAY: names.arrays, VALUE: names.values}
        inner: list[tuple[Any, tuple[Any, ...], str]] = []
        dotted = f"{prefix}." if path else ""
        for key, child_kind in zip(_iterate(keys), kinds, strict=True):
            if keys is None:
                child_path, text = path, prefix
            else:
                child_path, text = (*path, path_element(kind, key, keys, prefix)), dotted + str(key)
            target = lists.get(child_kind)
            if target is not None:
                target.append(Leaf(text, child_path, per_rank, number, key))
            elif child_kind in _CONTAINERS:
                inner.append((key, child_path, text))
            else:
                name_leaf(names, child_kind, Leaf(text, child_path, per_rank, number, key))
        for key, child_path, text in inner:
            self.visit((number, key), child_path, text, per_rank)


def name_leaf(names: Names, kind: str, leaf: Leaf) -> None:
    """Adds a leaf that is neither tensor, array nor value: one of several boxes, or a long list."""
    if kind[0] == BOXED:
        names.boxed.append(leaf)
        names.tensors += [leaf] * int(kind[1:])
    else:
        names.arrays.append(leaf)


def path_element(kind: str, key: Any, keys: Any, prefix: str) -> Json:
    if kind == LIST:
        return [key]
    if kind == TUPLE:
        return [key, keys]
    if type(key) is str or type(key) is int:
        return key
    return Encoder().encode(key, f"{prefix}: the key {key!r}")


def describe(tokens: Sequence[Token]) -> Names:
    """Names and paths of what a walk met.

    InvalidArgument: two leaves have the same name, or a name is too long or no valid text. NotPlain: a key of a dict is
    no plain value.
    """
    describer = _Describer(tokens)
    describer.visit((-1, None), (), "", False)
    return describer.names


def check_names(names: Names) -> None:
    seen: dict[str, Leaf] = {}
    for leaf in (*names.tensors, *names.boxed, *names.arrays, *names.values):
        other = seen.setdefault(leaf.name, leaf)
        if other is not leaf:
            raise InvalidArgument(
                f"two parts of the state have the name {leaf.name!r}: {list(other.path)} and {list(leaf.path)}"
            )
        try:
            size = len(leaf.name.encode())
        except UnicodeEncodeError as error:
            raise InvalidArgument(f"the name {leaf.name!r} is not valid Unicode") from error
        if leaf.name == "__metadata__":
            raise InvalidArgument(f"the name {leaf.name!r} is taken by the file format")
        if size + (_RANK_BYTES if leaf.per_rank else 0) > NAME_BYTES_MAX:
            raise InvalidArgument(
                f"the name {leaf.name[:80]!r}... has {size} bytes; at most {NAME_BYTES_MAX} are allowed"
            )


class Placer:
    """Puts new values into the containers of one walk. `finish` hands the state dicts back to their owners."""

    def __init__(self, flat: Flat, names: Names) -> None:
        self._flat = flat
        self._names = names
        self._tuples: dict[int, dict[int, Any]] = {}

    def put(self, container: int, slot: Any, value: Any) -> None:
        target = self._flat.containers[container]
        kind = self._flat.tokens[container][0]
        if kind in (DICT, LIST):
            target[slot] = value
        elif kind == TUPLE:
            self._tuples.setdefault(container, {})[slot] = value
        elif kind == DATACLASS:
            object.__setattr__(target, slot, value)  # Frozen ones, too: restoring in place is what was asked for.
        elif kind == PER_RANK:
            target.value = value
        else:
            self._flat.children[container] = value

    def finish(self, load: Callable[[int, Any, Any], None]) -> None:
        """Innermost first: rebuilds tuples, then calls `load(container number, object, its state dict)` for each
        Stateful.
        """
        for number in range(len(self._flat.containers) - 1, -1, -1):
            kind = self._flat.tokens[number][0]
            target = self._flat.containers[number]
            if kind == TUPLE and number in self._tuples:
                items = list(target)
                for index, value in self._tuples[number].items():
                    items[index] = value
                new = target._make(items) if hasattr(target, "_make") else type(target)(items)
                self.put(*self._names.parents[number], new)
            elif kind == STATEFUL:
                load(number, target, self._flat.children[number])


def element_text(element: Json) -> str:
    """What a stored path element contributes to the name."""
    if isinstance(element, list):
        return str(element[0])
    if isinstance(element, dict):
        from safepoint._objects import Decoder

        return str(Decoder().decode(element, "path"))
    return str(element)


class _Node:
    """One container of a tree that is being built from stored paths."""

    __slots__ = ("items", "size")

    def __init__(self) -> None:
        self.items: dict[Any, Any] = {}
        self.size: int | None = None  # None: a dict; -1: a list; else a tuple of that many.


def build(leaves: Sequence[tuple[Sequence[Json], Any]]) -> Any:
    """The tree that has these values at these (stored) paths; a single empty path gives the value itself."""
    if len(leaves) == 1 and not leaves[0][0]:
        return leaves[0][1]
    root = _Node()
    for path, value in leaves:
        node = root
        for depth, element in enumerate(path):
            if isinstance(element, list):
                key: Any = element[0]
                node.size = element[1] if len(element) == 2 else -1
            elif isinstance(element, dict):
                from safepoint._objects import Decoder

                key = Decoder().decode(element, "path")
            else:
                key = element
            if depth == len(path) - 1:
                node.items[key] = value
            else:
                child = node.items.get(key)
                if not isinstance(child, _Node):
                    child = node.items[key] = _Node()
                node = child
    return _finished(root)


def _finished(node: _Node) -> Any:
    items = {key: _finished(item) if isinstance(item, _Node) else item for key, item in node.items.items()}
    if node.size is None:
        return items
    values = [items[index] for index in sorted(items)]
    return values if node.size == -1 else tuple(values)
