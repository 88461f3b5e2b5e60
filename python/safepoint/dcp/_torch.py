"""What safepoint.dcp takes from torch beyond its documented API, in one place. Each name has a test in
tests/python/test_torch_names.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    _EmptyStateDictLoadPlanner,
)

# Where a planner decides what is read and where it goes. One that leaves these as they are is served without its plan.
_LOAD_METHODS = (
    "create_local_plan",
    "create_global_plan",
    "finish_plan",
    "load_bytes",
    "resolve_tensor",
    "commit_tensor",
    "lookup_tensor",
    "transform_tensor",
)


def plans_by_default(planner: object) -> bool:
    """Whether a save planner is torch's own, so that its plan need not be looked at."""
    return type(planner) is DefaultSavePlanner


def loads_by_default(planner: object) -> bool:
    """Whether a load planner reads what its state names, and puts it there, as torch's own does."""
    if not isinstance(planner, DefaultLoadPlanner):
        return False
    set_up = (DefaultLoadPlanner.set_up_planner, _EmptyStateDictLoadPlanner.set_up_planner)
    return type(planner).set_up_planner in set_up and all(
        getattr(type(planner), name) is getattr(DefaultLoadPlanner, name) for name in _LOAD_METHODS
    )


def loads_bytes_by_default(planner: object) -> TypeGuard[DefaultLoadPlanner]:
    """Whether a load planner would unpickle what it is handed, and put it where `original_state_dict` has its place."""
    return isinstance(planner, DefaultLoadPlanner) and type(planner).load_bytes is DefaultLoadPlanner.load_bytes


def gives_objects_by_default(planner: object) -> bool:
    """Whether `resolve_data` of a save planner pickles the object of its state that the item names, no other."""
    kind = type(planner)
    return isinstance(planner, DefaultSavePlanner) and all(
        getattr(kind, name) is getattr(DefaultSavePlanner, name)
        for name in ("resolve_data", "lookup_object", "transform_object")
    )


def nested(
    flat: Mapping[str, Any], mappings: Mapping[str, Sequence[str | int]], hole: Callable[[], Any]
) -> dict[str, Any]:
    """The nested state that DCP has flattened; names without a path stay at the top.

    `hole`: makes what stands for elements of a list that are not among the names.
    """
    from torch.distributed.checkpoint._traverse import set_element

    result: dict[str, Any] = {}
    paths = [tuple(mappings.get(name, (name,))) for name in flat]
    for path, value in zip(paths, flat.values(), strict=True):
        set_element(result, path, value)
    known = {path[:depth] for path in paths for depth in range(1, len(path) + 1)}
    for above in {path[:depth] for path in known for depth in range(len(path)) if isinstance(path[depth], int)}:
        elements: Any = result
        for key in above:
            elements = elements[key]
        for index in range(len(elements)):
            if (*above, index) not in known:
                elements[index] = hole()
    return result


def place_loaded(planner: DefaultLoadPlanner, name: str, value: object) -> None:
    """Puts a value where `DefaultLoadPlanner.load_bytes` would put what it has unpickled."""
    from torch.distributed.checkpoint._traverse import set_element

    if not planner.flatten_state_dict:
        planner.state_dict[name] = value
        return
    container: Any = planner.original_state_dict
    path = planner.mappings[name]
    try:
        for key in path[:-1]:
            container = container[_key_of(container, key)]
        container[_key_of(container, path[-1])] = value
    except LookupError:  # A container that is not there yet.
        set_element(planner.original_state_dict, path, value)


def _key_of(container: Any, key: str | int) -> Any:
    """The key that torch's planner made this text of."""
    if isinstance(container, Mapping) and key not in container:
        return next((known for known in container if str(known) == key), key)
    return key
