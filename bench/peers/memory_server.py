"""A stand-in for the service behind Amazon SageMaker HyperPod's managed tiered checkpointing, on loopback.

    python -m bench.peers.memory_server PORT_FILE

It speaks what the client library 1.1.3 asks for and keeps bodies in buffers that it uses again. It measures the client,
not the service: nothing is replicated, checked or stored.
"""

from __future__ import annotations

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit


class _Namespace:
    def __init__(self, ranks: int, retain: int) -> None:
        self.ranks = ranks
        self.retain = retain
        self.shards: dict[str, dict[int, tuple[bytearray, str]]] = {}  # Rank -> step -> bytes and their metadata.


_lock = threading.Lock()
_namespaces: dict[str, _Namespace] = {}
_free: list[bytearray] = []  # Touched already; the smallest one that fits is taken.


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""

    def _answer(self, code: int, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _parts(self) -> tuple[list[str], dict[str, list[str]]]:
        split = urlsplit(self.path)
        return split.path.strip("/").split("/")[2:], parse_qs(split.query)

    def do_GET(self) -> None:
        parts, query = self._parts()
        with _lock:
            namespace = _namespaces.get(parts[1])
            if namespace is None:
                return self._answer(404, {})
            if parts[0] == "namespaces":
                return self._answer(200, {"num_ranks": namespace.ranks, "steps_to_retain_per_rank": namespace.retain})
            if parts[2] == "latest":
                steps = sorted({step for shards in namespace.shards.values() for step in shards}, reverse=True)
                return self._answer(200, steps[: int(query["limit"][0])])
            shard = namespace.shards.get(parts[2], {}).get(int(parts[3]))
        if shard is None:
            return self._answer(404, {})
        self.send_response(200)
        self.send_header("Content-Length", str(len(shard[0])))
        self.send_header("Shard-Meta", shard[1])
        self.end_headers()
        self.wfile.write(shard[0])

    def do_POST(self) -> None:
        parts, query = self._parts()
        if parts[0] == "namespaces":
            retain = int(query["steps_retained"][0])
            with _lock:
                _namespaces.setdefault(parts[1], _Namespace(int(query["num_ranks"][0]), retain))
            return self._answer(200, {})
        body = self._body(int(self.headers.get("Content-Length", 0)))
        with _lock:
            namespace = _namespaces[parts[1]]
            shards = namespace.shards.setdefault(parts[2], {})
            shards[int(parts[3])] = (body, self.headers.get("Shard-Meta", "{}"))
            while len(shards) > namespace.retain:
                _free.append(shards.pop(min(shards))[0])
        self._answer(200, {})

    def _body(self, size: int) -> bytearray:
        with _lock:
            fitting = [buffer for buffer in _free if len(buffer) == size]
            body = fitting[0] if fitting else bytearray(size)
            _free[:] = [buffer for buffer in _free if buffer is not body]
        view = memoryview(body)
        while view:
            view = view[self.rfile.readinto(view) :]
        return body


def main() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    path = Path(sys.argv[1])
    path.with_suffix(".part").write_text(str(server.server_port))
    path.with_suffix(".part").rename(path)
    server.serve_forever()


if __name__ == "__main__":
    main()
