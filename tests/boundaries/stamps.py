"""Shards whose every 4 KiB block says whose it is: a wrong byte shows without trusting safepoint's checksums."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BLOCK = 4096
WORDS = BLOCK // 8
DATA_BYTES = 1 << 20
HEADER_PART = 4096  # Dynamic and static part of the header, each.
LENGTH = 2 * HEADER_PART + DATA_BYTES
MAGIC = 0x53544D50

Words = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Stamp:
    """What a shard's blocks encode."""

    ns: str
    generation: int
    step: int
    attempt: bytes
    rank: int

    def blocks(self) -> Words:
        """The data of the shard: per block seven words of identity, a filling derived from them, and their checksum."""
        count = DATA_BYTES // BLOCK
        words = np.empty((count, WORDS), dtype=np.uint64)
        ns = int.from_bytes(hashlib.sha256(self.ns.encode()).digest()[:8], "little")
        halves = [int.from_bytes(self.attempt[i : i + 8], "little") for i in (0, 8)]
        words[:, 0] = np.uint64(MAGIC)
        for column, value in enumerate([ns, self.generation, self.step, *halves, self.rank], start=1):
            words[:, column] = np.uint64(value)
        words[:, 7] = np.arange(count, dtype=np.uint64)
        with np.errstate(over="ignore"):
            seed = np.bitwise_xor.reduce(words[:, :8] * _odd(8), axis=1)[:, None]
            words[:, 8:-1] = (seed + np.arange(8, WORDS - 1, dtype=np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        words[:, -1] = checksums(words)
        return words

    def header(self) -> tuple[bytes, bytes]:
        """The header of the shard, and its static part (docs/formats/shard.md)."""
        step = {
            "version": 1,
            "namespace": self.ns,
            "step": self.step,
            "generation": self.generation,
            "attempt": self.attempt.hex(),
            "rank": self.rank,
            "world_size": 2,
        }
        dynamic = '{"__metadata__":{"safepoint.step":' + _text(step) + ',"safepoint.objects":' + _text([])
        name = f"w{self.rank}"
        static = ',"format":"pt","DCP_VERSION":"1.0","DCP_SHARDING_INFO":' + _text({name: {"saved_offsets": [0]}})
        static += ',"safepoint":' + _text({"version": 1, "expected": ["w0", "w1"]}) + "},"
        entry = {"dtype": "U8", "shape": [DATA_BYTES], "data_offsets": [0, DATA_BYTES]}
        static += f'"{name}":' + json.dumps(entry, separators=(",", ":")) + "}"
        head = (2 * HEADER_PART - 8).to_bytes(8, "little") + dynamic.encode().ljust(HEADER_PART - 8)
        tail = static.encode().ljust(HEADER_PART)
        assert len(head) == len(tail) == HEADER_PART
        return head + tail, tail

    def faults(self, header: bytes, data: Words) -> list[str]:
        """What is wrong with a shard that was read, in words that name what the first bad block says it is."""
        found: list[str] = []
        if header != self.header()[0]:
            found.append(f"rank {self.rank}: the header is not that of step {self.step}")
        bad = np.flatnonzero((data != self.blocks()).any(axis=1))
        if bad.size:
            block = data[bad[0]]
            whole = bool(block[-1] == checksums(block[None, :])[0])
            said = f"generation {block[2]}, step {block[3]}, rank {block[6]}, block {block[7]}" if whole else "torn"
            found.append(f"rank {self.rank}: {bad.size} blocks of step {self.step} are wrong, block {bad[0]} is {said}")
        return found


def checksums(words: Words) -> Words:
    """Of each block, over all words but the last."""
    with np.errstate(over="ignore"):
        total: Words = (words[:, :-1] * _odd(WORDS - 1)).sum(axis=1, dtype=np.uint64)
    return total


def _odd(count: int) -> Words:
    with np.errstate(over="ignore"):
        odd: Words = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0xC2B2AE3D27D4EB4E) | np.uint64(1)
    return odd


def _text(value: object) -> str:
    return json.dumps(json.dumps(value, separators=(",", ":")))
