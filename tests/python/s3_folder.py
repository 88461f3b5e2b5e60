"""A folder as a bucket of an S3 server on loopback, to be read: lists in small pages, whole objects and ranges."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

_PAGE = 3  # Keys.


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[str]:
    """`s3://bucket` with the parameters that lead here, of a bucket that holds the folder's files."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def answer(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), "ETag": '"0"', **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            key = unquote(url.path).removeprefix("/bucket").lstrip("/")
            if not key:
                return self.answer(200, listing(folder, parse_qs(url.query)), Content_Type="application/xml")
            path = folder / key
            if not path.is_file():
                return self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
            data = path.read_bytes()
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if wanted is None:
                return self.answer(200, data)
            begin, last = int(wanted[1]), min(int(wanted[2]), len(data) - 1)
            if begin > last:
                return self.answer(416, b"<Error><Code>InvalidRange</Code></Error>")
            return self.answer(206, data[begin : last + 1], Content_Range=f"bytes {begin}-{last}/{len(data)}")

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"s3://bucket?endpoint=http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def listing(folder: Path, query: dict[str, list[str]]) -> bytes:
    """Of ListObjectsV2; where the next page begins is its token."""
    prefix = query.get("prefix", [""])[0]
    keys = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    keys = [key for key in keys if key.startswith(prefix) and key >= query.get("continuation-token", [""])[0]]
    parts = [
        f"<Contents><Key>{escape(key)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
        f"<Size>{(folder / key).stat().st_size}</Size></Contents>"
        for key in keys[:_PAGE]
    ]
    more = f"<NextContinuationToken>{escape(keys[_PAGE])}</NextContinuationToken>" if len(keys) > _PAGE else ""
    cut = f"<IsTruncated>{'true' if more else 'false'}</IsTruncated>{more}"
    return f"<ListBucketResult><Name>bucket</Name>{cut}{''.join(parts)}</ListBucketResult>".encode()
