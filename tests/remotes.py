"""Real servers of remotes on loopback: an HTTP server with ranges and, on demand, faults; an S3 server as a process."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Fault = Callable[["_Handler", str, int], bool]
"""``(handler, path, count)``: what to do instead of answering the count-th GET of a path; True when it did something."""

NO_LIMIT = 1 << 60

S3_ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "not-to-be-told", "AWS_DEFAULT_REGION": "us-east-1"}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WebServer

    def setup(self) -> None:
        super().setup()
        with self.server.lock:
            self.server.connections += 1

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.lstrip("/")
        with self.server.lock:
            self.server.gets[path] += 1
            self.server.ranges.append((path, self.headers.get("Range", "")))
            count = self.server.gets[path]
        if self.server.fault is not None and self.server.fault(self, path, count):
            return
        file = self.server.root / path
        if not file.is_file():
            self.answer(404, b"none")
            return
        with file.open("rb") as source:
            size = os.fstat(source.fileno()).st_size
            match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            start, end = (int(match[1]), min(int(match[2]) + 1, size)) if match and self.server.honour_ranges else (0, size)
            if match and start >= size:
                self.answer(416, b"")
                return
            self.send_response(206 if match and self.server.honour_ranges else 200)
            self.send_header("Content-Length", str(end - start))
            if match and self.server.honour_ranges:
                self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
            self.end_headers()
            if self.command == "GET":
                with contextlib.suppress(OSError):
                    self.send(source.fileno(), start, end)

    def send(self, descriptor: int, start: int, end: int) -> None:
        while start < end:
            data = os.pread(descriptor, min(end - start, self.server.block_bytes), start)
            self.server.count(len(data))
            self.wfile.write(data)
            start += len(data)
            if self.server.pause_s:
                time.sleep(self.server.pause_s)

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


class WebServer(ThreadingHTTPServer):
    """Serves a directory over HTTP/1.1; counts what it is asked. Of files it sends ``limit_bytes``, and at most the rest of a
    block more, until that is set higher."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.lock = threading.Lock()
        self.gets: Counter[str] = Counter()
        self.ranges: list[tuple[str, str]] = []
        self.connections = 0
        self.sent_bytes = 0
        self.limit_bytes = NO_LIMIT
        self.honour_ranges = True
        self.block_bytes = 1 << 20
        self.pause_s = 0.0
        self.fault: Fault | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def count(self, size_bytes: int) -> None:
        """So much is about to be sent; returns when it may."""
        while True:
            with self.lock:
                if self.sent_bytes < self.limit_bytes:
                    self.sent_bytes += size_bytes
                    return
            time.sleep(0.005)

    def asked_bytes(self, since: int = 0) -> int:
        """How much of weights was asked for, by all requests but the first ``since``."""
        weights = [sent for path, sent in self.ranges[since:] if path.endswith((".bin", ".safetensors"))]
        asked = [re.fullmatch(r"bytes=(\d+)-(\d+)", sent) for sent in weights]
        return sum(int(each[2]) + 1 - int(each[1]) for each in asked if each)

    def handle_error(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def web_server(root: Path, tls: ssl.SSLContext | None = None) -> Iterator[WebServer]:
    server = WebServer(root)
    if tls is not None:  # before anything waits on its socket
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        server.limit_bytes = NO_LIMIT
        server.shutdown()
        thread.join()
        server.server_close()


def cut(
    handler: _Handler,
    status: int,
    promised: int,
    data: bytes,
    total: int | None = None,
    then: Callable[[_Handler], object] = lambda _: None,
) -> None:
    """Promise more than is sent, do something else, then close."""
    handler.send_response(status)
    handler.send_header("Content-Length", str(promised))
    if total is not None:
        start = int(re.findall(r"\d+", handler.headers["Range"])[0])
        handler.send_header("Content-Range", f"bytes {start}-{start + promised - 1}/{total}")
    handler.end_headers()
    handler.wfile.write(data)
    handler.wfile.flush()
    then(handler)
    handler.close_connection = True
    with contextlib.suppress(OSError):  # whom it answers may have gone
        handler.connection.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def s3_server(log: Path) -> Iterator[str]:
    """A moto server in a process of its own; yields its endpoint."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-u", "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
            stdout=output,
            stderr=output,
        )
    try:
        deadline = time.monotonic() + 60
        # It says where it listens once it does.
        while (found := re.search(r"Running on (http://127\.0\.0\.1:\d+)\s", log.read_text())) is None:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, "the S3 server does not begin"
            time.sleep(0.05)
        yield found[1]
    finally:
        process.terminate()
        process.wait(60)
