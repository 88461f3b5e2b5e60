"""The walk in C++ against the one in Python, which says what is meant: equal results on equal states, equal verdicts on
changed ones. What is at stake is I-34 (bit identity): a changed tensor that is taken for a known one is saved wrongly.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import gc
import json
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from fake_core import FakeDaemon
from hypothesis import given, settings
from hypothesis import strategies as st
from states import DTYPES, random_tensor, same

import safepoint
from safepoint import _core, _plan, _shard, _state, _walk, errors


@pytest.fixture(params=[True, False], ids=["native", "python"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    monkeypatch.setattr(_walk, "native", request.param)
    yield request.param


@dataclasses.dataclass
class Part:
    weights: torch.Tensor
    seen: int = 3


class Pair(NamedTuple):
    a: Any
    b: Any


class Stateful:
    def __init__(self, state: Any) -> None:
        self.state = state
        self.calls = 0

    def state_dict(self) -> Any:
        self.calls += 1
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


class MyDict(dict[Any, Any]):
    pass


class MyList(list[Any]):
    pass


class MyTensor(torch.Tensor):
    pass


def t(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


def steady(stateful: Any) -> Any:
    """Gives the same state dict each time, so that two walks can be compared by identity."""
    state = stateful.state_dict()
    stateful.state_dict = lambda: state
    return stateful


def model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))


def optimizer() -> torch.optim.Optimizer:
    net = model()
    adam = torch.optim.AdamW(net.parameters())
    net(torch.ones(2, 3)).sum().backward()
    adam.step()
    return adam


STATES: dict[str, Callable[[], Any]] = {
    "flat": lambda: {"a": t(2), "b": t(3, 4), "n": 1},
    "values": lambda: {
        "none": None, "bool": True, "int": 2**70, "float": 1.5, "text": "x", "complex": 1j, "size": torch.Size([1, 2]),
        "empty": {}, "od": collections.OrderedDict(), "mine": MyDict(), "counter": collections.Counter("aab"),
        "list": [1, [2, [None]], (3, "x")], "set": {1}, "bytes": b"x", "dtype": torch.float32, "array": np.arange(3),
        "scalar": np.float32(1), "no list": [], "no tuple": (), "no pair": Pair(1, 2), "type": dict, "text list": ["a"],
    },
    "containers": lambda: {
        "list": [t(1), 2, [t(2), {}]], "tuple": (t(1), (t(2), 3), ()), "pair": Pair(t(1), [t(2)]),
        "part": Part(t(3)), "rank": safepoint.PerRank({"x": t(1), "y": [1]}), "mine": MyDict(a=t(1)),
        "my list": MyList([t(1), 1]), "od": collections.OrderedDict(b=t(1), a=t(2)),
        "default": collections.defaultdict(list, {"q": [t(1)]}), "nested": {"a": {"b": {"c": {"d": t(1)}}}},
        "deep values": [[[[1]]], [[[t(1)]]]],
    },
    "keys": lambda: {0: t(1), "0x": t(1), (1, (2, "a")): t(1), None: t(2), 1.5: t(1), True: {"y": t(1)}, b"k": [t(1)]},
    "arrays": lambda: {"a": np.zeros(5000), "small": np.zeros(2), "b": b"x" * 5000, "c": bytearray(5000)},
    "stateful": lambda: {"m": steady(model()), "o": steady(optimizer()),
        "s": Stateful({"x": t(1), "again": Stateful({"y": 1})})},
    "tensors": lambda: {
        "parameter": torch.nn.Parameter(t(2)), "buffer": torch.nn.Buffer(t(2)), "mine": t(2).as_subclass(MyTensor),
        "view": t(4, 5)[1:, ::2], "transposed": t(4, 5).T, "expanded": t(1, 2).expand(3, 2), "empty": t(0, 3),
        "empty view": t(3)[3:], "scalar": torch.tensor(1), "conjugate": torch.ones(3, dtype=torch.complex64).conj(),
        "negative": torch.ones(1, dtype=torch.complex64).conj().imag, "meta": torch.empty(3, device="meta"),
        "no result": torch.nn.Parameter(t(2)) * 2, "int1": torch.empty(2, dtype=torch.int1),
    },
    "root list": lambda: [t(1), {"a": t(2)}, 3],
    "root part": lambda: Part(t(1)),
    "root stateful": lambda: steady(model()),
    "root empty": lambda: {},
    "root values": lambda: [1, 2],
}  # fmt: skip


def facts(flat: _state.Flat) -> tuple[Any, ...]:
    """Everything in a Flat; objects by identity, so that nothing is hidden by an equality of theirs."""
    return (
        flat.tokens,
        list(map(id, flat.containers)),
        {number: id(child) for number, child in flat.children.items()},
        list(map(id, flat.tensors)),
        [(boxed.first, id(boxed.value), boxed.boxes) for boxed in flat.boxed],
        list(map(id, flat.arrays)),
        # An empty mapping is replaced by a new dict.
        [id(v) if not (type(v) is dict and not v) else "{}" for v in flat.values],
    )


def by(native: bool, function: Callable[..., Any], *args: Any) -> Any:
    before, _walk.native = _walk.native, native
    try:
        return function(*args)
    finally:
        _walk.native = before


@pytest.mark.parametrize("name", STATES)
def test_both_walks_find_the_same(name: str) -> None:
    state = STATES[name]()
    native, python = by(True, _walk.walk, state), by(False, _walk.walk, state)
    assert facts(native) == facts(python)
    assert by(True, _walk.describe, native.tokens) == by(False, _walk.describe, python.tokens)
    assert _walk.walk(state, native.tokens).tokens is native.tokens


def columns(tensors: list[torch.Tensor]) -> tuple[Any, ...]:
    read = _walk.read_tensors(tensors)
    return (
        read.shapes, read.dtypes, read.devices, read.contiguous.tolist(), read.negative.tolist(),
        read.conjugate.tolist(), read.nbytes.tolist(), read.addresses.tolist(),
    )  # fmt: skip


def all_tensors() -> list[torch.Tensor]:
    made = [random_tensor((3, 2), dtype) for dtype in DTYPES] + [random_tensor((), dtype) for dtype in DTYPES]
    return made + list(STATES["tensors"]().values())


def test_both_ways_read_the_same_of_every_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = all_tensors()
    native, python = by(True, columns, tensors), by(False, columns, tensors)
    assert native == python
    assert native[7] == [tensor.data_ptr() for tensor in tensors]
    # A torch without the table.
    monkeypatch.setattr(_walk, "_reader", _walk._make_reader(None, (torch.Tensor, torch.nn.Parameter)))
    assert not _walk._reader.has_table and by(True, columns, tensors) == python
    assert not _walk.read_tensors(tensors).plain.any()


def test_the_table_of_this_torch_is_in_use() -> None:
    assert _walk._reader.has_table
    assert _walk.read_tensors([t(2), torch.nn.Parameter(t(1))]).plain.all()
    subclass, meta = t(2).as_subclass(MyTensor), torch.empty(1, device="meta")
    assert not _walk.read_tensors([subclass, meta]).plain.any()


@pytest.mark.parametrize("index", range(len(all_tensors())))
def test_a_tensor_matches_only_its_own_layout(either: bool, index: int) -> None:
    tensors = all_tensors()
    expected = _walk.read_tensors([t(9), tensors[index]])
    for other, tensor in enumerate(tensors):
        found = expected.match([t(9), tensor])
        if found is None:
            assert other != index
        else:
            assert found[1] == tensor.data_ptr()
            described, wanted = (_walk._describe(x)[1:] for x in (tensor, tensors[index]))
            assert described == wanted
    assert expected.match([t(9)]) is None and expected.match([t(9), tensors[index], t(9)]) is None


def _conjugate_view() -> torch.Tensor:
    return torch.ones(1, dtype=torch.complex64).conj()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (t(2, 3), t(3, 2)),
        (t(2, 3), t(6)),
        (t(2, 3), t(3, 2).T),
        (t(2), t(2).to(torch.float64)),
        (torch.zeros(2, dtype=torch.int8), torch.empty(2, dtype=torch.int1)),
        (torch.zeros(1), torch.ones(1, dtype=torch.complex64).conj().imag),  # Contiguous, with a negative bit.
        (torch.ones(1, dtype=torch.complex64), _conjugate_view()),
        (t(2), torch.empty(2, device="meta")),
        (t(2), t(2).to_sparse()),
        (torch.zeros(2, dtype=torch.complex64), torch.zeros(2, dtype=torch.complex128)),
        (torch.zeros(2, dtype=torch.float8_e4m3fn), torch.zeros(2, dtype=torch.float8_e4m3fnuz)),
        (torch.zeros(2, dtype=torch.int16), torch.zeros(2, dtype=torch.uint16)),
    ],
)
def test_a_changed_layout_is_seen(either: bool, before: torch.Tensor, after: torch.Tensor) -> None:
    known = _walk.read_tensors([before])
    assert known.match([before.clone()]) is not None
    try:
        assert known.match([after]) is None
    except (RuntimeError, NotImplementedError):
        assert after.is_sparse  # Told by name when the plan is made.


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"a": 1, "b": t(1)}, {"b": t(1), "a": 1}),
        ({"a": t(1)}, {"b": t(1)}),
        ({"a": t(1)}, {"a": t(1), "b": t(1)}),
        ({"a": t(1), "b": t(1)}, {"a": t(1)}),
        ({"a": t(1)}, {"a": 1}),
        ({"a": 1}, {"a": {"b": 1}}),
        ({"a": {}}, {"a": {"b": 1}}),
        ({"a": {"b": t(1)}}, {"a": collections.OrderedDict(b=t(1), c=t(1))}),
        ({"a": [t(1)]}, {"a": (t(1),)}),
        ({"a": [t(1)]}, {"a": [t(1), t(1)]}),
        ({"a": [t(1), 1]}, {"a": [1, t(1)]}),
        ({"a": [1]}, {"a": [t(1)]}),
        ({"a": {"x": t(1)}, "b": {"y": t(1)}}, {"a": {"x": t(1)}, "b": {"z": t(1)}}),
        ({"a": Part(t(1))}, {"a": {"weights": t(1), "seen": 3}}),
        ({"a": safepoint.PerRank(t(1))}, {"a": safepoint.PerRank([t(1)])}),
        ({"a": Stateful({"x": t(1)})}, {"a": Stateful({"y": t(1)})}),
        ({"a": b"x" * 5000}, {"a": b"x"}),
        ([t(1)], [t(1), t(1)]),
        # One key of a dict, three names.
        ({1: t(1)}, {True: t(1)}),
        ({1: t(1)}, {1.0: t(1)}),
        ({(1, "x"): t(1)}, {(True, "x"): t(1)}),
    ],
)
def test_a_changed_structure_is_seen(either: bool, before: Any, after: Any) -> None:
    known = _walk.walk(before).tokens
    assert _walk.walk(copy.deepcopy(before), known).tokens is known
    changed = _walk.walk(after, known)
    assert changed.tokens is not known
    assert facts(changed)[1:] == facts(_state.flatten(after))[1:]
    assert changed.tokens == _walk.walk(after).tokens


def test_equal_keys_that_are_other_objects_are_the_same_structure(either: bool) -> None:
    def fresh() -> dict[Any, Any]:
        return {"".join(["ke", "y"]): t(1), int("1234567"): t(1), ("".join(["x", "y"]), 2.5): t(1)}

    known = _walk.walk(fresh()).tokens
    assert _walk.walk(fresh(), known).tokens is known


def test_a_key_of_another_type_gets_its_own_name(either: bool, fake: FakeDaemon) -> None:
    c = safepoint.Checkpointer("job", rank=0, world_size=1)
    c.save(1, {"x": {1: t(2)}}).wait()
    c.save(2, {"x": {True: torch.ones(2)}}).wait()
    target = {"x": {True: t(2)}}
    assert c.restore(target) is not None
    same(target, {"x": {True: torch.ones(2)}})


def test_state_dict_is_called_once_and_its_error_is_the_callers(either: bool) -> None:
    class Failing(Stateful):
        def state_dict(self) -> Any:
            raise KeyError("mine")

    good = Stateful({"x": t(1)})
    known = _walk.walk({"a": good, "b": 1}).tokens
    with pytest.raises(KeyError, match="mine"):
        _walk.walk({"a": good, "b": Failing({})}, known)
    _walk.walk({"a": good, "b": 2}, known)
    assert good.calls == 3


def test_a_state_that_changes_during_the_walk_is_walked_as_it_was(either: bool) -> None:
    inner: dict[str, Any] = {"s": None, "t1": t(1), "t2": t(2)}

    class Changing(Stateful):
        def state_dict(self) -> Any:
            inner.clear()
            inner["new"] = 1
            items.clear()
            return {}

    inner["s"] = Changing(None)
    items = [t(3), Changing(None), t(4)]
    first, second = inner["t1"], inner["t2"]
    found = _walk.walk({"inner": inner}).tensors
    assert [id(x) for x in found] == [id(first), id(second)]
    keep = list(items) or [t(3), Changing(None), t(4)]
    items[:] = keep
    assert len(_walk.walk({"items": tuple(items)}).tensors) == 2


def test_a_class_whose_kind_changes_the_state(either: bool) -> None:
    """`kind_of` asks the object for its attributes, which runs its code in the middle of a container."""
    state: dict[str, Any] = {}

    class Nosy:
        def __getattr__(self, name: str) -> Any:
            state.clear()
            raise AttributeError(name)

    state.update(a=t(1), nosy=Nosy(), b=t(2))
    assert len(_walk.walk({"x": state}).tensors) == 2


def test_depth_and_cycles_are_refused(either: bool) -> None:
    def nested(depth: int) -> Any:
        state: Any = {"x": t(1)}
        for number in range(depth):
            state = {f"k{number}": state}
        return state

    assert len(_walk.walk(nested(_state.DEPTH_MAX)).tensors) == 1
    with pytest.raises(errors.NotPlain, match=r"^k202\.k201\.k200\..*nested deeper than 200 levels"):
        _walk.walk(nested(_state.DEPTH_MAX + 3))
    cycle: dict[str, Any] = {}
    cycle["me"] = cycle
    with pytest.raises(errors.NotPlain, match=r"me\.me\.me"):
        _walk.walk(cycle)
    items: list[Any] = []
    items.append(items)
    with pytest.raises(RecursionError):
        _walk.walk({"x": items})


@pytest.mark.parametrize("root", [1, "x", t(1), (t(1),), None, np.zeros(9000), torch.Size([1])])
def test_roots_that_are_no_state(either: bool, root: Any) -> None:
    with pytest.raises(errors.InvalidArgument, match="state must be a dict"):
        _walk.walk(root)


def test_references_are_given_back() -> None:
    """Whatever the walk ends with: found, changed, or an error in the middle."""

    class Failing(Stateful):
        def state_dict(self) -> Any:
            raise ValueError

    key, other = ("a", 1.5), ("b", 2.5)
    tensor, array, value, inner = t(1), np.zeros(5000), object(), {other: t(2)}
    watched = [key, other, tensor, array, value, inner, None]
    good = {key: tensor, "array": array, "inner": inner, "list": [tensor, 1], "value": value}
    bad = {**good, "fails": Failing({})}
    changed = {**good, "more": 1}
    known = _walk.walk(good).tokens
    read = _walk.read_tensors([tensor])

    def use() -> None:
        for _ in range(50):
            assert _walk.walk(good, known).tokens is known
            assert _walk.walk(changed, known).tokens is not known
            with pytest.raises(ValueError):
                _walk.walk(bad, known)
            _walk.describe(known)
            assert read.match([tensor]) is not None
            assert read.match([t(2)]) is None
            with pytest.raises(AttributeError):
                _walk.read_tensors([value])  # type: ignore[list-item]

    use()
    gc.collect()
    before = [sys.getrefcount(x) for x in watched[:-1]]
    use()
    gc.collect()
    assert [sys.getrefcount(x) for x in watched[:-1]] == before


def test_an_unusual_key_fails_in_its_own_words(either: bool) -> None:
    class Key:
        def __hash__(self) -> int:
            return 1

        def __eq__(self, other: object) -> bool:
            raise ArithmeticError("no comparing")

    known = _walk.walk({Key(): t(1)}).tokens
    with pytest.raises(ArithmeticError, match="no comparing"):
        _walk.walk({Key(): t(1)}, known)


# --- random states

KEYS = st.one_of(st.sampled_from(["a", "b", "c.d", "é", ""]), st.integers(-2, 2), st.booleans(), st.just((1, "x")))
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3),
    st.builds(lambda n: torch.zeros(n), st.integers(0, 3)),
    st.builds(lambda: torch.nn.Parameter(torch.ones(2, 2).T)),
    st.builds(lambda n: np.zeros(n, dtype=np.uint8), st.sampled_from([1, 5000])),
    st.builds(lambda n: b"x" * n, st.sampled_from([1, 5000])),
)  # fmt: skip


def _containers(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    dicts = st.dictionaries(KEYS, children, max_size=4)
    lists = st.lists(children, max_size=4)
    return st.one_of(
        dicts, lists, dicts.map(collections.OrderedDict), dicts.map(MyDict), lists.map(tuple), lists.map(MyList),
        dicts.map(Stateful), children.map(safepoint.PerRank), st.builds(Part, children, children),
        st.builds(Pair, children, children),
    )  # fmt: skip


TREES = st.dictionaries(KEYS, st.recursive(LEAVES, _containers, max_leaves=12), max_size=5)


@settings(max_examples=300, deadline=None)
@given(TREES, TREES)
def test_random_states(a: dict[Any, Any], b: dict[Any, Any]) -> None:
    native, python = by(True, _walk.walk, a), by(False, _walk.walk, a)
    assert facts(native) == facts(python)
    assert by(True, _walk.describe, native.tokens) == by(False, _walk.describe, python.tokens)
    assert by(True, columns, native.tensors) == by(False, columns, python.tensors)
    known = native.tokens
    assert by(True, _walk.walk, a, known).tokens is known and by(False, _walk.walk, a, known).tokens is known
    verdicts = [by(way, _walk.walk, b, known) for way in (True, False)]
    assert (verdicts[0].tokens is known) == (verdicts[1].tokens is known)
    assert facts(verdicts[0]) == facts(verdicts[1]) == facts(_state.flatten(b))


# --- what is written


def reference_static_part(
    entries: list[tuple[str, str, tuple[int, ...], tuple[int, ...], int, int]], info: str
) -> bytes:
    def compact(value: Any) -> str:
        return json.dumps(value, separators=(",", ":"))

    sharding = {key: {"saved_offsets": offsets} for key, _, _, offsets, _, _ in entries}
    tensors = {k: {"dtype": d, "shape": s, "data_offsets": [b, e]} for k, d, s, _, b, e in entries}
    text = f',"format":"pt","DCP_VERSION":"1.0","DCP_SHARDING_INFO":{compact(compact(sharding))}'
    text += f',"safepoint":{compact(info)}}}' + ("," + compact(tensors)[1:] if tensors else "}")
    return text.encode().ljust(_plan.align_up(len(text)))


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"])),
        st.tuples(
            st.sampled_from(["F32", "U8"]), st.lists(st.integers(0, 2**63), max_size=3).map(tuple),
            st.lists(st.integers(0, 2**63), max_size=3).map(tuple), st.integers(0, 2**40), st.integers(0, 2**40),
        ),
        max_size=5,
    ),
    st.text(st.characters(exclude_categories=["Cs"])),
)  # fmt: skip
def test_the_header_text_is_that_of_pythons_json(entries: dict[str, Any], info: str) -> None:
    rows = [(key, *parts) for key, parts in entries.items()]
    assert _core.static_part(rows, info) == reference_static_part(rows, info)


@pytest.mark.parametrize(
    "bad", [("x", "F32", (1,), (0,), 0), ("x", "F32", [1], (0,), 0, 4), ("x", "F32", (-1,), (0,), 0, 4)]
)
def test_wrong_entries_are_refused(bad: Any) -> None:
    with pytest.raises((TypeError, OverflowError)):
        _core.static_part([bad], "{}")


def rewritten(header: bytes, separators: tuple[str, str]) -> tuple[bytes, int]:
    """The same JSON in another form, which only the general reader takes."""
    text = json.dumps(json.loads(header[8:]), separators=separators).encode()
    return len(text).to_bytes(8, "little") + text, 0


def test_the_quick_reader_and_the_general_one_agree(fake: FakeDaemon) -> None:
    base = torch.arange(6.0)
    states: list[Any] = [
        {"m": {f"w{n}.x": random_tensor((n % 5, 3), DTYPES[n % len(DTYPES)], n) for n in range(60)}},
        {"a": base, "tied": base, "view": base[2:], "é": t(1), 'q"\\': t(2), "k": {1: t(2), (1, 2): t(1)}},
        {"a": np.arange(2000.0), "b": b"x" * 5000, "r": safepoint.PerRank(t(3)), "v": {"x": [1, 2.5, "é"]}},
        {"no tensors": 1},
    ]
    c = safepoint.Checkpointer("job", rank=0, world_size=1)
    quick = []
    for number, state in enumerate(states):
        save = c.save(number, state)
        save.wait()
        data = fake.space("job").shards[(save.attempt, 0)]
        static_offset = fake.space("job").structures[(save.attempt, 0)][0]
        header = data[: 8 + int.from_bytes(data[:8], "little")]
        found = _shard.parse_shard(header, 0, static_offset)
        other, offset = rewritten(header, (",", ": "))
        assert _core.split_header(other, offset) is None
        general = _shard.parse_shard(other, 0, offset)
        moved = len(header) - len(other)  # The data begins elsewhere.
        for pieces in general.pieces.values():
            pieces[:] = [piece._replace(begin=piece.begin + moved) for piece in pieces]
        assert found == general
        assert list(found.pieces) == list(general.pieces)
        assert all(type(piece) is _shard.StoredPiece for pieces in found.pieces.values() for piece in pieces)
        _, _, entries = _core.split_header(header, static_offset) or (None, None, 0)
        quick.append(_core.read_pieces(header, entries, 0, _shard.StoredPiece, {}) is not None)
    assert quick == [True, False, True, True]  # Keys with escapes are the general reader's.


def test_names_and_boxes_of_a_shard_are_read() -> None:
    """Two pieces of one tensor, the second under a key of its own, and an alias of each."""
    info = {
        "version": 1,
        "global": {"w": [4, 2], "w@1": [4, 2]},
        "alias": {"tied": "w", "tied@1": "w@1"},
        "name": {"w@1": "w", "tied@1": "tied"},
        "path": {"w": ["w"], "tied": ["tied"]},
    }
    rows = [("w", "F32", (1, 2), (0, 0), 0, 8), ("w@1", "F32", (2, 2), (2, 0), 8, 24)]
    step = json.dumps(json.dumps({"version": 1, "rank": 3, "step": 1, "attempt": "00", "world_size": 4}))
    dynamic = f'{{"__metadata__":{{"safepoint.step":{step},"safepoint.objects":"[]"'.encode().ljust(4088)
    static = _core.static_part(rows, json.dumps(info, separators=(",", ":")))
    header = (len(dynamic) + len(static)).to_bytes(8, "little") + dynamic + static
    for shard in (_shard.parse_shard(header, 3, 4096), _shard.parse_shard(*_swap(rewritten(header, (", ", ":")), 3))):
        assert list(shard.pieces) == ["w", "tied"]
        for name in ("w", "tied"):
            boxes = [(p.rank, p.shape, p.offsets, p.global_shape, p.nbytes) for p in shard.pieces[name]]
            assert boxes == [(3, (1, 2), (0, 0), (4, 2), 8), (3, (2, 2), (2, 0), (4, 2), 16)]


def _swap(found: tuple[bytes, int], rank: int) -> tuple[bytes, int, int]:
    return found[0], rank, found[1]


@pytest.mark.parametrize("offset", [-1, 10_000])
def test_a_static_offset_beyond_the_header_is_a_protocol_error(offset: int) -> None:
    header = (12).to_bytes(8, "little") + b"{}          "
    with pytest.raises(errors.ProtocolError):
        _shard.parse_shard(header, 0, offset)


def test_both_ways_write_the_same_bytes_and_restore_them(fake: FakeDaemon) -> None:
    written = []
    for way in (True, False):
        state = {
            "m": {f"w{n}.x": random_tensor((n % 5, 3), DTYPES[n % len(DTYPES)], n) for n in range(60)},
            "k": {1: t(2)},
        }
        state["m"]["tied"] = state["m"]["w3.x"]
        state["m"]["view"] = state["m"]["w4.x"][1:]
        state["m"]["odd"] = torch.arange(6.0).reshape(2, 3).T
        state["c"] = torch.ones(3, dtype=torch.complex64).conj()
        state["r"] = safepoint.PerRank({"rng": t(5)})
        target = copy.deepcopy(state)
        for tensor in target["m"].values():
            tensor.view(torch.uint8).zero_() if tensor.is_contiguous() and tensor.numel() else None
        c = safepoint.Checkpointer(f"job{way}", rank=0, world_size=1)
        for step in (1, 2):
            save = by(way, c.save, step, state)
            save.wait()
        static_offset, structure = fake.space(f"job{way}").structures[(save.attempt, 0)]
        written.append((structure, fake.space(f"job{way}").shards[(save.attempt, 0)][static_offset:]))
        by(not way, c.restore, target)
        same(target.pop("r").value, state.pop("r").value)
        same(target, state)
    assert written[0] == written[1]


def test_a_walk_in_guarded_mode_knows_what_only_the_optimizer_changes(either: bool, fake: FakeDaemon) -> None:
    """I-9: what the optimizer does not own is copied before save returns, so that it may change at once."""
    whole, other = torch.ones(200), torch.ones(100)
    parameter = torch.nn.Parameter(whole[:100])
    sgd = torch.optim.SGD([parameter], lr=1.0)
    fake.hold = threading.Event()
    c = safepoint.Checkpointer("job", rank=0, world_size=1, mode="guarded", optimizers=sgd)
    # At the parameter's address: itself, a part of it, and what is longer than it; and a stranger.
    state = {"p": parameter, "part": parameter.detach()[:50], "whole": whole, "other": other}
    save = c.save(1, state)
    whole[100:] = 0
    other.zero_()
    fake.hold.set()
    save.wait()
    target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    c.restore(target)
    same(target, {name: torch.ones_like(tensor) for name, tensor in state.items()})
