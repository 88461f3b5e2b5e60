"""safepoint's C++ client library. Private: use the safepoint package."""

from collections.abc import Callable, Sequence
import types
from typing import Annotated, Any, TypeAlias

from typing_extensions import Buffer


def kernel_name() -> str:
    """Name of the copy loop in use on this CPU."""

def crc32c(data: Buffer, crc: int = 0) -> int:
    """CRC32C of `data`, continuing `crc`, the checksum of what came before."""

def new_id() -> bytes:
    """16 random bytes."""

class DaemonInfo:
    """The daemon of the newest connection."""

    @property
    def node(self) -> bytes:
        """Node id, 16 bytes."""

    @property
    def boot(self) -> bytes:
        """16 bytes that change when the keeper, and so the memory, was replaced."""

    @property
    def incarnation(self) -> int:
        """How many workers the keeper has started."""

    @property
    def extent_bytes(self) -> int:
        """Unit of the pool."""

    @property
    def pool_bytes_max(self) -> int:
        """Bound of the pool."""

    @property
    def lease_seconds(self) -> float:
        """How long a lease lasts without a renewal."""

    @property
    def retain(self) -> int:
        """Complete steps kept per namespace."""

    @property
    def pid(self) -> int:
        """
        Process id of the keeper, which lives as long as the daemon, as the daemon sees it.
        """

    @property
    def private(self) -> bool:
        """Started by a client library for this user."""

    @property
    def store(self) -> str:
        """URL of the durable tier, without credentials; empty: there is none."""

    @property
    def version(self) -> str:
        """Version of the daemon."""

Id: TypeAlias = Annotated[bytes, 16]

class AttemptInfo:
    """One try at saving one step."""

    @property
    def attempt(self) -> Id:
        """16 bytes."""

    @property
    def nonce(self) -> Id:
        """Of the launch that wrote it, 16 bytes."""

    @property
    def generation(self) -> int:
        """Incarnation of the job."""

    @property
    def step(self) -> int:
        """Training step."""

    @property
    def try_number(self) -> int:
        """Which try at the step."""

    @property
    def world_size(self) -> int:
        """Ranks at save time."""

    @property
    def sealed_ranks(self) -> int:
        """Ranks whose shard is sealed."""

    @property
    def bytes(self) -> int:
        """Sum of the sealed shards' lengths."""

    @property
    def state(self) -> str:
        """open, complete, closed, corrupt or retired."""

    @property
    def level(self) -> str:
        """How safe it is: none, memory, replicated or durable."""

    @property
    def pinned(self) -> bool:
        """Held by an operator or a reader."""

    @property
    def reason(self) -> str:
        """Why it is closed, corrupt or not complete; empty otherwise."""

class NamespaceInfo:
    """The identity under which checkpoints of a job live."""

    @property
    def ns(self) -> str:
        """Its name."""

    @property
    def generation(self) -> int:
        """The current one."""

    @property
    def bytes(self) -> int:
        """Held for it."""

    @property
    def complete_steps(self) -> int:
        """Complete steps held."""

class Generation:
    """An opened generation."""

    @property
    def generation(self) -> int:
        """Fencing number, from 1."""

    @property
    def parent(self) -> bytes | None:
        """Attempt that it continues from, 16 bytes."""

    @property
    def parent_step(self) -> int | None:
        """Step of the parent."""

class SealResult:
    """A sealed shard."""

    @property
    def record(self) -> bytes:
        """Identity of the seal record, 32 bytes."""

    @property
    def complete(self) -> bool:
        """The whole attempt is complete by this seal."""

class Transfer:
    """A save in progress. It goes on when this object is dropped."""

    def wait_copied(self, timeout: float | None) -> None:
        """
        Waits until the caller's memory is free to change. Raises the copy's error; DeadlineExceeded: still running.
        """

    def wait_sealed(self, timeout: float | None) -> SealResult:
        """
        Waits until the shard is sealed. Raises the copy's or the seal's error; DeadlineExceeded: still running.
        """

    def release(self) -> None:
        """
        Lets a save that was started with hold=True be sealed. Without effect on another one; to decide otherwise, abort its lease.
        """

    @property
    def copied(self) -> bool:
        """The copy ended well."""

    @property
    def sealed(self) -> bool:
        """The shard is sealed."""

    @property
    def copy_seconds(self) -> float:
        """Duration of the copy; 0 while it runs."""

class Lease:
    """
    Room for one shard in the daemon's memory. Dropped without a start, it is aborted.
    """

    @property
    def attempt(self) -> bytes:
        """16 bytes."""

    @property
    def length(self) -> int:
        """Of the shard, in bytes."""

    @property
    def address(self) -> int:
        """Where the slot is mapped. Valid while this object lives."""

    @property
    def capacity(self) -> int:
        """Bytes mapped at `address`."""

    @property
    def mapping(self) -> int:
        """
        Number of the mapping at `address`; of all mappings of this process, no other has it.
        """

    @property
    def slot(self) -> int:
        """Id of the slot; a later lease on the same slot has the same address."""

    def start(self, header: Buffer, segments: Buffer, *, static_offset: int, structure: bytes, threads: int = 0, hold: bool = False) -> Transfer:
        """
        Copies header and segments (uint64 N x 3: source address, shard offset, size), which tile the shard in order, and seals it, in the background. The sources must stay alive and unchanged until wait_copied returned. hold: the seal waits for Transfer.release.
        """

    def start_in_place(self, header: Buffer, segments: Buffer, *, static_offset: int, structure: bytes, threads: int = 0, hold: bool = False) -> Transfer:
        """As start, but what header and segments leave is in the lease already."""

    def abort(self, reason: str) -> None:
        """
        Promises that nothing writes any more; other ranks see the reason. Cancels a transfer in progress and waits for its end.
        """

class ShardReader:
    """
    One sealed shard. Every byte that it gives out was checked against the seal record.
    """

    @property
    def rank(self) -> int:
        """Whose shard it is."""

    @property
    def length(self) -> int:
        """Bytes."""

    @property
    def header_bytes(self) -> int:
        """Where the data begins."""

    @property
    def static_offset(self) -> int:
        """
        Where the part of the header begins that does not change from step to step.
        """

    @property
    def structure(self) -> bytes:
        """SHA-256 of that part, 32 bytes."""

    @property
    def record(self) -> bytes:
        """Identity of the seal record, 32 bytes."""

    @property
    def from_store(self) -> bool:
        """It is read from the durable tier; else from memory."""

    @property
    def blocks(self) -> int:
        """Blocks of 1 MiB, the last one may be shorter."""

    def header(self) -> bytes:
        """The safetensors header: 8 length bytes and the JSON text. Corrupt."""

    def read(self, segments: Buffer, *, threads: int = 0) -> int:
        """
        Copies ranges (uint64 N x 3: shard offset, size, target address); returns the number of bytes. Corrupt names the first bad block.
        """

    def read_bytes(self, offset: int, size: int) -> bytes:
        """A range of the shard. Corrupt."""

    def verify(self, first_block: int, count: int) -> list[int]:
        """Those of these blocks that are corrupt."""

    def copy_to_file(self, fd: int) -> None:
        """
        Writes the shard to the file, from its offset 0 on. Corrupt: the file has the part before the bad block.
        """

class ReadPin:
    """One attempt, held for reading until it is closed. A context manager."""

    @property
    def info(self) -> AttemptInfo:
        """The attempt."""

    def shard(self, rank: int) -> ShardReader:
        """A reader of one rank's shard. NotFound, Corrupt, Closed."""

    def report_corrupt(self, rank: int, block: int) -> bool:
        """
        Has the daemon read the block again; whether it is corrupt there, too. The shard is out of use then.
        """

    def close(self) -> None:
        """Lets go of the attempt."""

    def __enter__(self) -> ReadPin: ...

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, traceback: types.TracebackType | None) -> None: ...

class StepName:
    """Names one whole step of a store."""

    @property
    def ns(self) -> str:
        """Namespace."""

    @property
    def step(self) -> int:
        """Training step."""

    @property
    def attempt(self) -> Id:
        """16 bytes."""

    @property
    def modified(self) -> int:
        """When its manifest was made, by the store's clock: seconds since 1970."""

class StoredObject:
    """One object of a store, whoever wrote it."""

    @property
    def key(self) -> str:
        """Its name below the store's URL."""

    @property
    def size(self) -> int:
        """Bytes."""

class StoredPin:
    """
    One whole step of a store; its shards are read from there. A context manager, like ReadPin.
    """

    @property
    def info(self) -> AttemptInfo:
        """The attempt."""

    @property
    def uid(self) -> int:
        """User id of the job that saved it."""

    def shard(self, rank: int) -> ShardReader:
        """A reader of one rank's shard. NotFound, Corrupt, Incomplete."""

    def report_corrupt(self, rank: int, block: int) -> bool:
        """Nobody is told: a store has no quarantine. False."""

    def close(self) -> None:
        """Does nothing: what is in a store stays there."""

    def __enter__(self) -> StoredPin: ...

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, traceback: types.TracebackType | None) -> None: ...

class Store:
    """A durable tier: steps as objects of a file system or an object store."""

    def __init__(self, url: str) -> None:
        """InvalidArgument: no URL of a store. NotFound, Denied."""

    @property
    def url(self) -> str:
        """Without credentials."""

    def steps(self, ns: str = '') -> list[StepName]:
        """
        The whole steps of one namespace or of all, ascending by namespace and step. Unavailable, Denied.
        """

    def open(self, name: StepName) -> StoredPin:
        """One of its steps. NotFound, Corrupt, Incomplete."""

    def objects(self, prefix: str = '', cursor: str = '') -> tuple[list[StoredObject], str]:
        """
        One page of the objects whose keys begin with `prefix`, ascending, and the cursor of the next page, empty after the last; but for keys that no store of ours could have. NotFound, Unavailable, Denied.
        """

    def read(self, key: str, offset: int, size: int) -> bytes:
        """A range of one object, unchecked. NotFound; Corrupt: it ends before."""

    def listing(self, ns: str = '') -> tuple[list[StepName], list[tuple[StepName, str]]]:
        """
        As steps; and what is left of steps that will never be whole, and why: deletions that were cut short, and what nobody has finished writing in a week. Unavailable, Denied.
        """

    def delete(self, name: StepName) -> None:
        """
        Deletes a step: its manifest first, so that it is never half there; then what else of it is ours. Denied, Unavailable.
        """

def judge_retention(newest_first: Sequence[tuple[int, int]], keep_last: int, keep_every: int, keep_for: int) -> list[tuple[bool, str]]:
    """
    What a rule says of the steps (number, when made) of one namespace and user: whether each stays, and why. 0: no such rule; keep_for in seconds.
    """

class StartOptions:
    """How to start a private daemon."""

    def __init__(self, *, daemon_path: str, arguments: Sequence[str], lock_path: str, log_path: str) -> None:
        """
        `arguments` are those after the program's name. Of all processes that use one `lock_path`, one starts the daemon.
        """

class Client:
    """
    One session with the node's daemon. Thread-safe. Not usable in a forked child (raises Unavailable). Deadlines and timeouts are seconds from now.
    """

    def __init__(self, socket_path: str, *, client_name: str = '', start: StartOptions | None = None, deadline: float = 30.0) -> None:
        """
        Connects. When nobody listens and `start` is given, starts a private daemon; Unavailable otherwise. `deadline` also holds for every call that takes none.
        """

    @property
    def daemon(self) -> DaemonInfo:
        """The daemon of the newest connection."""

    @property
    def socket_path(self) -> str:
        """Where it is connected."""

    @property
    def mappings(self) -> list[int]:
        """Numbers of the slots' mappings that are there now."""

    @property
    def started_daemon(self) -> bool:
        """This client started the private daemon."""

    def open_generation(self, ns: str, nonce: bytes, world_size: int, rank: int, *, parent: bytes | None = None, fresh: bool = False, deadline: float) -> Generation:
        """
        Opens the generation of a launch; the same nonce gives the same generation.
        """

    def prepare_slots(self, ns: str, length: int, count: int, *, deadline: float) -> int:
        """
        Announces shards of `length` bytes; returns how many slots are ready and mapped in this process.
        """

    def reserve(self, ns: str, generation: int, nonce: bytes, step: int, try_number: int, world_size: int, rank: int, length: int, *, deadline: float) -> Lease:
        """
        Room for one shard, before any byte is copied. NoSpace, Fenced, Closed.
        """

    def wait(self, ns: str, attempt: bytes, level: str, *, timeout: float | None) -> str:
        """
        Waits until the attempt has the level; the level it has ("none": retired since). DeadlineExceeded, Closed, Corrupt.
        """

    def latest(self, ns: str, level: str = 'memory') -> AttemptInfo:
        """The newest complete attempt. NotFound, Lost, Unavailable."""

    def list_steps(self, ns: str) -> list[AttemptInfo]:
        """What can be restored, newest first, then whatever else is known."""

    def list_namespaces(self) -> list[NamespaceInfo]:
        """Those of this user."""

    def open_read(self, ns: str, *, step: int | None = None, attempt: bytes | None = None, nonce: bytes | None = None, sequence: int = 0) -> ReadPin:
        """
        Chooses and holds one attempt. With a nonce all ranks of the launch get the same one for the same sequence number.
        """

    def pin_step(self, ns: str, attempt: bytes, on: bool) -> None:
        """Keeps an attempt until it is let go again."""

    def make_durable(self, ns: str, attempt: bytes) -> None:
        """
        Asks for level durable. Unavailable: the daemon has no durable tier. Closed: the attempt has ended.
        """

    def status(self) -> str:
        """The daemon's status, JSON."""

    def close(self, *, timeout: float | None = None) -> None:
        """
        Lets running transfers finish for up to so many seconds (None: the client's deadline), then ends the session; five more where the daemon does not answer.
        """

class WalkRules:
    """
    What Python decides in a walk (functions of safepoint._state), and the classes whose kind is known.
    """

    def __init__(self, *, kinds: dict[type, str], kind_of: Callable[..., str], open_container: Callable[..., object], open_leaf: Callable[..., object], add_leaf: Callable[..., object], stored_value: Callable[..., object], too_deep: Callable[..., object], depth_max: int, long_min: int) -> None: ...

    def walk(self, flat: object, kind: str, state: object, expected: Sequence[object] | None) -> bool:
        """
        Fills an empty `Flat`. True: it has the `expected` tokens of an earlier walk, these very objects. Raises what the state's own methods raise.
        """

class TensorReader:
    """Reads what a save has to know about tensors."""

    def __init__(self, *, table: object | None, classes: Sequence[type], is_negative: Callable[..., bool], is_conjugate: Callable[..., bool], describe: Callable[..., object]) -> None:
        """
        `table`: torch.Tensor.__dlpack_c_exchange_api__, or None. `classes` of tensors that may be read by it; the others, and what it refuses, are told by `describe`: (address, dtype, device, shape, contiguous, negative, conjugate).
        """

    @property
    def has_table(self) -> bool:
        """There is a table of a version that is known here."""

class TensorTable:
    """
    Layout and addresses of a list of tensors, as of now. The columns have one item per tensor.
    """

    def __init__(self, reader: TensorReader, tensors: Sequence[object]) -> None:
        """Raises what reading an attribute of a tensor raises."""

    def match(self, tensors: Sequence[object]) -> bytes | None:
        """
        Addresses (uint64) of other tensors that have dtypes, devices, shapes, contiguity, negative and conjugate bits of these. None: they do not.
        """

    def __len__(self) -> int: ...

    @property
    def addresses(self) -> bytes:
        """uint64, as data_ptr()."""

    @property
    def nbytes(self) -> bytes:
        """uint64."""

    @property
    def contiguous(self) -> bytes:
        """bool."""

    @property
    def negative(self) -> bytes:
        """bool."""

    @property
    def conjugate(self) -> bytes:
        """bool."""

    @property
    def plain(self) -> bytes:
        """bool: read by the table."""

    @property
    def dtypes(self) -> list[Any]:
        """List of torch.dtype."""

    @property
    def devices(self) -> list[Any]:
        """List of torch.device."""

    @property
    def shapes(self) -> list[Any]:
        """List of tuples."""

def static_part(entries: list[tuple[str, str, tuple[int, ...], tuple[int, ...], int, int]], safepoint: str) -> bytes:
    """
    The static part of a header. Entries: (key, dtype, shape, offsets, begin, end of the data); `safepoint`: the JSON text of that name.
    """

def split_header(header: bytes, static_offset: int) -> tuple[str, str, int] | None:
    """
    The texts of DCP_SHARDING_INFO and safepoint, and where the tensors begin. None: the header is not in the form that `static_part` gives it.
    """

def read_pieces(header: bytes, offset: int, rank: int, piece_class: type, paths: dict[str, Any]) -> dict[str, list[Any]] | None:
    """
    The tensors from there on, each as if it were whole: by key, one piece each. None: as above, or keys need more than plain ASCII.
    """

def describe(tokens: Sequence[object], names: object, leaf: type, path_element: Callable[..., object], name_leaf: Callable[..., object]) -> None:
    """
    Fills an empty `Names` from the tokens of a walk. `leaf`: the class of its leaves, with five fields; the functions are those of safepoint._state.
    """
