"""Everything that safepoint takes from torch beyond its documented API, in one place, and what it knows about dtypes.

A new torch release is checked here: each name below has a test in tests/python/test_torch_names.py.
"""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.distributed

from safepoint.errors import NotPlain

# safetensors' names. complex128, complex32, float4 and the rest have none that every reader knows: stored as bytes
# (U8).
DTYPE_NAMES: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}
DTYPES_BY_NAME: Mapping[str, torch.dtype] = {name: dtype for dtype, name in DTYPE_NAMES.items()}
# Stored as bytes with their true name beside them; one element is a whole number of bytes.
_SHELLS = (*(f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)),)  # torch has no operations on them.
_RAW = ("complex128", "complex32", "float4_e2m1fn_x2", "bits8", "bits16", "bits1x8", "bits2x4", "bits4x2", *_SHELLS)
RAW_DTYPES: Mapping[str, torch.dtype] = {name: getattr(torch, name) for name in _RAW if hasattr(torch, name)}
RAW_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in RAW_DTYPES.items()}
COMPLEX_DTYPES = frozenset({torch.complex32, torch.complex64, torch.complex128})
# Every dtype that torch has, for dtypes that are values themselves.
ALL_DTYPES: Mapping[str, torch.dtype] = {
    str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)
}
_NOT_COPYABLE = frozenset(RAW_DTYPES[name] for name in _SHELLS if name in RAW_DTYPES)


def copyable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or its bytes where torch cannot copy its dtype; shares the memory."""
    return tensor.view(torch.uint8) if tensor.dtype in _NOT_COPYABLE else tensor


@functools.cache
def _dtensor_classes() -> tuple[type, ...]:
    if not torch.distributed.is_available():
        return ()
    from torch.distributed.tensor import DTensor

    return (DTensor,)


def is_dtensor(value: object) -> bool:
    return isinstance(value, _dtensor_classes())


def imported_dtensor() -> type | None:
    """DTensor, where somebody has imported it: importing it takes a second, and whoever has one did."""
    found: type | None = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return found


def is_wrapper(value: torch.Tensor) -> bool:
    """A tensor subclass with its own dispatch: its `data_ptr` is not where its values are."""
    return type(value).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__


def local_tensor(value: Any) -> torch.Tensor:
    """The piece of a DTensor on this rank, without autograd history."""
    return cast(torch.Tensor, value._local_tensor)


class DTensorLayout(NamedTuple):
    """What decides the pieces of a DTensor.

    Cheap to make and to compare; keeps the mesh alive, so its identity is enough.
    """

    shape: tuple[int, ...]
    placements: tuple[Any, ...]
    order: Any  # As torch states it: per tensor dimension the mesh dimensions that split it.
    factors_are_order: bool  # Of _StridedShard: they say in which order mesh dimensions were applied.
    mesh: Identity
    local_shape: tuple[int, ...]


class Identity:
    """Compares by identity of what it holds."""

    __slots__ = ("held",)

    def __init__(self, held: Any) -> None:
        self.held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identity) and other.held is self.held

    def __hash__(self) -> int:
        return id(self.held)


# The object that describes a DTensor's layout, of which saves of one state mostly meet the same ones, and its piece on
# this rank. One call for both, without a frame of Python's: it is made for every DTensor of every save.
dtensor_parts: Callable[[Any], tuple[Any, torch.Tensor]] = operator.attrgetter("_spec", "_local_tensor")


def dtensor_layout(value: Any) -> DTensorLayout:
    spec = value._spec
    return DTensorLayout(
        value.shape,
        spec.placements,
        getattr(spec, "shard_order", None),
        getattr(spec, "use_strided_shard_as_shard_order", True) is not False,
        Identity(spec.mesh),
        value._local_tensor.shape,
    )


class Placement(NamedTuple):
    """One mesh dimension's part in a DTensor's layout. `dim` None: replicated; `factor`: of _StridedShard, else 1."""

    dim: int | None
    factor: int


def placements_of(layout: DTensorLayout) -> list[Placement] | str:
    """A text: why there are no pieces."""
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    result = []
    for placement in layout.placements:
        if isinstance(placement, Partial):
            return f"a DTensor with Partial placement ({placement}) has no values of its own yet"
        if isinstance(placement, _StridedShard):
            result.append(Placement(placement.dim, int(placement.split_factor)))
        elif isinstance(placement, Shard):
            result.append(Placement(placement.dim, 1))
        elif isinstance(placement, Replicate):
            result.append(Placement(None, 1))
        else:
            return f"a DTensor placed as {placement}, which this version does not know"
    return result


def stated_order(layout: DTensorLayout) -> dict[int, tuple[int, ...]]:
    """Tensor dimension -> the mesh dimensions that split it, in this order, where torch states one."""
    return {entry.tensor_dim: tuple(entry.mesh_dims) for entry in layout.order or ()}


def mesh_place(layout: DTensorLayout) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Sizes of the mesh and this rank's coordinate in it; None: it is not part of it."""
    mesh = layout.mesh.held
    coordinate = mesh.get_coordinate()
    return None if coordinate is None else (tuple(mesh.shape), tuple(coordinate))


def dtensor_from_local(local: torch.Tensor, like: Any) -> Any:
    """A DTensor with the layout of `like` and this local tensor."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def is_sharded_tensor(value: object) -> bool:
    """torch's older ShardedTensor. Whoever has one has imported its module."""
    module = sys.modules.get("torch.distributed._shard.sharded_tensor.api")
    return module is not None and isinstance(value, module.ShardedTensor)


LocalChunks = list[tuple[torch.Tensor, tuple[int, ...]]]  # (tensor, offsets in the global tensor)


def sharded_tensor_chunks(value: Any) -> tuple[tuple[int, ...], LocalChunks]:
    """Global shape and local pieces."""
    chunks = [(shard.tensor.detach(), tuple(shard.metadata.shard_offsets)) for shard in value.local_shards()]
    return tuple(value.metadata().size), chunks


def has_chunk_list(value: object) -> bool:
    """Whether torch.distributed.checkpoint asks the object itself for its pieces. True of DTensors, too."""
    return hasattr(type(value), "__create_chunk_list__")


def listed_chunks(value: Any) -> LocalChunks:
    """The pieces of an object that lists them; each tensor shares the memory of the object."""
    from torch.distributed.checkpoint.metadata import MetadataIndex

    result = []
    for number, chunk in enumerate(value.__create_chunk_list__()):
        tensor = value.__get_tensor_shard__(MetadataIndex("", chunk.offsets, number))
        if tensor.shape != chunk.sizes:
            raise NotPlain(
                f"{type(value).__qualname__}: its chunk list says {list(chunk.sizes)} where it has {list(tensor.shape)}"
            )
        result.append((tensor.detach(), tuple(chunk.offsets)))
    return result


class Store(Protocol):
    """What is used of torch.distributed's key-value stores, whose own types are private."""

    def set(self, key: str, value: str, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def check(self, keys: list[str], /) -> bool: ...
    def wait(self, keys: list[str], timeout: timedelta, /) -> None: ...
    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes: ...
    def multi_get(self, keys: list[str], /) -> list[bytes]: ...
    def has_extended_api(self) -> bool: ...


def store_of_group() -> Store | None:
    """The key-value store of the default process group, or None without a group."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    from torch.distributed.distributed_c10d import _get_default_store

    return cast(Store, _get_default_store())


def strides_overlap(tensor: torch.Tensor) -> bool:
    """An expanded tensor: several elements share their memory, so it cannot take different values."""
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def not_expanded(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The first entry along every dimension in which `like`, of the same shape, is expanded."""
    for dimension, (stride, size) in enumerate(zip(like.stride(), like.shape, strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dimension, 0, 1)
    return tensor


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one shape and dtype have the same bytes, NaNs included."""
    a, b = (copyable(t).contiguous().flatten().view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)


def copy_values(target: torch.Tensor, source: torch.Tensor) -> None:
    """The values of another tensor of the same shape and dtype."""
    with torch.no_grad():
        copyable(target).copy_(copyable(source))


def bump_versions(tensors: Iterable[torch.Tensor]) -> None:
    """Tells autograd that the values changed behind its back."""
    torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])


def is_module(value: object) -> bool:
    return isinstance(value, torch.nn.Module)


def loads_by_copy(module: torch.nn.Module, state: Mapping[str, Any]) -> bool:
    """Whether copying into the tensors of `state` is all that `module.load_state_dict(state)` would do.

    True only when nothing overrides or hooks saving and loading anywhere in the module, and every entry of `state` is a
    view of the module's own parameter or buffer. It spares a second pass over all bytes.
    """
    plain = torch.nn.Module
    norm = torch.nn.modules.batchnorm._NormBase
    own: dict[int, int] = {}
    for part in module.modules():
        kind = type(part)
        if kind.state_dict is not plain.state_dict or kind.load_state_dict is not plain.load_state_dict:
            return False
        if kind._load_from_state_dict not in (plain._load_from_state_dict, norm._load_from_state_dict):
            return False
        if kind._save_to_state_dict is not plain._save_to_state_dict:
            return False
        if kind.get_extra_state is not plain.get_extra_state or kind.set_extra_state is not plain.set_extra_state:
            return False
        if part._load_state_dict_pre_hooks or part._load_state_dict_post_hooks or part._state_dict_hooks:
            return False
        for tensor in (*part._parameters.values(), *part._buffers.values()):
            if tensor is not None:
                if tensor.is_meta or is_wrapper(tensor):
                    return False
                own[tensor.data_ptr()] = max(own.get(tensor.data_ptr(), -1), tensor.nbytes)
    return all(isinstance(v, torch.Tensor) and own.get(v.data_ptr()) == v.nbytes for v in state.values())
