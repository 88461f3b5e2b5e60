"""`async_save` and `load` with the signatures of torch's, and none of their fixed costs."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, cast

import torch.distributed
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from safepoint.dcp import _torch, _writer
from safepoint.dcp._reader import Reader
from safepoint.dcp._target import CheckpointId, agreed_step
from safepoint.dcp._writer import Writer
from safepoint.errors import Closed, DeadlineExceeded, InvalidArgument

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.checkpoint.planner import LoadPlanner, SavePlanner

    from safepoint._save import Save

_SLICE_SECONDS = 0.25  # How long one wait lasts before it is looked whether the interpreter ends.


def async_save(
    state_dict: dict[str, Any],
    *,
    checkpoint_id: CheckpointId = None,
    storage_writer: Writer,
    planner: SavePlanner | None = None,
    process_group: ProcessGroup | None = None,
    **torch_options: Any,
) -> Future[Metadata]:
    """`torch.distributed.checkpoint.async_save` without its fixed cost and without any collective.

    Returns when the trainer may change its tensors (in guarded mode: at once, see `Checkpointer`). The future's result
    comes when the step has the level `memory` on all ranks; it is an empty `Metadata` (see `Writer.metadata`). Any
    number of saves may be in flight. `checkpoint_id` names the step, where the writer does not. Errors are raised here
    before anything is sent, or by the future.

    With `Writer(planning="dcp")` this is torch's own function; only then are `planner` and the other options of torch's
    (`async_checkpointer_type`, `async_stager`, `no_dist`, `use_collectives`) of any consequence.
    """
    writer = _ours(storage_writer, Writer, "async_save")
    if writer.planning == "dcp":
        if torch_options.get("async_checkpointer_type") is AsyncCheckpointerType.PROCESS:
            raise InvalidArgument(_writer.NO_PROCESS)
        result = state_dict_saver.async_save(
            state_dict,
            checkpoint_id=cast(str | None, checkpoint_id),  # torch hands it on as it is.
            storage_writer=writer,
            planner=planner,
            process_group=process_group,
            **torch_options,
        )
        # A stager of the user's own may stage into a future; what counts here is the end of the save.
        return result if isinstance(result, Future) else cast(Future[Metadata], result.upload_completion)
    if planner is not None and not _torch.plans_by_default(planner):
        raise InvalidArgument(
            f"the planner {type(planner).__qualname__} would not be asked: "
            'Writer(planning="dcp") lets DCP and its planner decide what is saved'
        )
    _check_options(torch_options)
    _check_group(writer.checkpointer._engine.identify(), process_group)
    save = writer.begin(state_dict, agreed_step(writer.step, checkpoint_id, writer.namespace))
    return _future_of(save, writer._deadline)


def load(
    state_dict: dict[str, Any],
    *,
    checkpoint_id: CheckpointId = None,
    storage_reader: Reader,
    planner: LoadPlanner | None = None,
    process_group: ProcessGroup | None = None,
    no_dist: bool = False,
) -> None:
    """`torch.distributed.checkpoint.load` without its planning and collectives: `Checkpointer.restore`, in place, or
    `safepoint.load_into` where the reader's target is a URL.

    With `Reader(planning="dcp")`, or a planner that does more than torch's own, this is torch's function.
    """
    reader = _ours(storage_reader, Reader, "load")
    if reader.planning == "dcp" or (planner is not None and type(planner) is not DefaultLoadPlanner):
        state_dict_loader.load(
            state_dict,
            checkpoint_id=checkpoint_id,
            storage_reader=reader,
            planner=planner,
            process_group=process_group,
            no_dist=no_dist,
        )
        return
    if not no_dist:
        _check_group(reader.identify(), process_group)
    reader.reset(checkpoint_id)
    reader.read_into(state_dict, allow_missing=getattr(planner, "allow_partial_load", False))


def _ours(given: Any, kind: type[Any], function: str) -> Any:
    if not isinstance(given, kind):
        raise InvalidArgument(
            f"safepoint.dcp.{function} needs a safepoint.dcp.{kind.__name__}, not {type(given).__name__}; "
            f"torch.distributed.checkpoint.{function} takes any"
        )
    return given


_TORCH_OPTIONS = frozenset({"async_checkpointer_type", "async_stager", "no_dist", "use_collectives"})


def _check_options(options: dict[str, Any]) -> None:
    if unknown := sorted(set(options) - _TORCH_OPTIONS):
        raise TypeError(f"async_save() got unexpected keyword arguments: {', '.join(unknown)}")
    if options.get("async_stager") is not None:
        raise InvalidArgument("the writer stages by itself: leave async_stager out")


def _check_group(place: tuple[int, int], group: ProcessGroup | None) -> None:
    """A smaller group saves a smaller world, which the writer must know of. `place`: its rank and world size."""
    if group is None:
        return
    of_group = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    if of_group != place:
        raise InvalidArgument(
            f"this process is rank {of_group[0]} of {of_group[1]} in the process group, and {place[0]} of "
            f"{place[1]} for the writer or reader: give it rank= and world_size="
        )


def _future_of(save: Save, deadline: float) -> Future[Metadata]:
    """Completes when the save is complete on all ranks."""
    future: Future[Metadata] = Future()
    future.set_running_or_notify_cancel()

    def wait() -> None:
        left = deadline
        while True:
            try:
                save.wait("memory", timeout=min(left, _SLICE_SECONDS))
                future.set_result(Metadata({}))
                return
            except DeadlineExceeded as error:
                left -= _SLICE_SECONDS
                if left <= 0:
                    future.set_exception(error)
                    return
                if not threading.main_thread().is_alive():
                    future.set_exception(Closed("the interpreter ended before the save was complete"))
                    return
            except Exception as error:
                future.set_exception(error)
                return

    # Not a daemon thread: the interpreter must not end under a call into the extension.
    threading.Thread(target=wait, name="safepoint-dcp").start()
    return future
