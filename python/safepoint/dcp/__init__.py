"""torch.distributed.checkpoint at memory speed. Guide: docs/dcp.md.

writer = safepoint.dcp.Writer("my-job")
for step in range(start, steps):
    train(...)
    future = safepoint.dcp.async_save(state_dict, checkpoint_id=f"step-{step}", storage_writer=writer)
torch.distributed.checkpoint.load(state_dict, storage_reader=safepoint.dcp.Reader("my-job"))
"""

from safepoint.dcp._functions import async_save, load
from safepoint.dcp._reader import Reader
from safepoint.dcp._writer import Writer

__all__ = ["Reader", "Writer", "async_save", "load"]
