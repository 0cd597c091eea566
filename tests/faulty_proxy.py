"""A TCP proxy before a real S3 server: it spoils answers when it is told to, and notes what was asked for."""

import re
import socket
import socketserver
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import Final
from urllib.parse import urlsplit

DELAY_S: Final = 3.0
_CHUNK: Final = 2**16
_RESET_AT_CLOSE: Final = struct.pack("ii", 1, 0)  # of SO_LINGER
_NOT_PASSED_ON: Final = re.compile(rb"\r\n(?:connection|expect):[^\r]*", re.IGNORECASE)  # and never signed


class Fault(StrEnum):
    """What becomes of a request."""

    DELAY = "delay"
    """It is passed on after `DELAY_S`."""
    RESET = "reset"
    """It is not passed on; the connection is reset."""
    TRUNCATE = "truncate"
    """It is passed on; of the answer comes half."""
    SLOW_DOWN = "503"
    FORBIDDEN = "403"


def _error(status: str, code: str, message: str) -> bytes:
    body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
    return f"HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


_ERRORS: Final = {
    Fault.SLOW_DOWN: _error("503 Slow Down", "SlowDown", "Reduce your request rate."),
    Fault.FORBIDDEN: _error("403 Forbidden", "AccessDenied", "Access Denied."),
}


@dataclass(frozen=True)
class Exchange:
    """A request as it is about to be answered: like `GET /bucket/key`, at a time of the monotonic clock."""

    request: str
    at: float
    fault: Fault | None


class FaultyProxy(socketserver.ThreadingTCPServer):
    """Speaks for a server from an endpoint of its own on 127.0.0.1.

    Args:
        server: Endpoint of the server that it stands before, `http://HOST:PORT`.
        latency_s: Seconds that every request waits.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, server: str, latency_s: float) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.endpoint = "http://{}:{}".format(*self.server_address)
        self.exchanges: list[Exchange] = []
        self._server = urlsplit(server)
        self._latency_s = latency_s
        self._faults: deque[Fault] = deque()
        self._held, self._to_pass = "", 0
        self._released = threading.Event()

    def spoil(self, fault: Fault, requests: int) -> None:
        """Let so many requests meet the fault: the next ones, after those that were told of before."""
        self._faults.extend([fault] * requests)

    def hold(self, text: str, after: int) -> None:
        """Let requests that have this text wait until they are released, but for so many first ones."""
        self._held, self._to_pass = text, after
        self._released.clear()

    def release(self) -> None:
        """Answer what is held, and hold nothing more."""
        self._held = ""
        self._released.set()

    def take(self, request: str) -> Fault | None:
        """Hold a request for as long as it has to wait, and say what becomes of it."""
        try:
            fault = self._faults.popleft()
        except IndexError:
            fault = None
        if self._held and self._held in request:
            self._to_pass -= 1
            if self._to_pass < 0:
                self._released.wait()
        time.sleep(self._latency_s + (DELAY_S if fault is Fault.DELAY else 0))
        self.exchanges.append(Exchange(request, time.monotonic(), fault))
        return fault

    def ask(self, request: bytes) -> bytes:
        """The server's answer, whole."""
        with socket.create_connection((self._server.hostname, self._server.port)) as server:
            server.sendall(request)
            return b"".join(iter(lambda: server.recv(_CHUNK), b""))


class _Connection(socketserver.StreamRequestHandler):
    """One request, after which the connection ends, so that an answer's end is the connection's."""

    server: FaultyProxy

    def handle(self) -> None:
        with suppress(OSError):  # either side has hung up
            head = self._head()
            if not head:
                return
            request = self._whole(head)
            fault = self.server.take(" ".join(head.decode("latin-1").split(" ", 2)[:2]))
            if fault is Fault.RESET:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_AT_CLOSE)
                self.connection.close()
                return
            answer = _ERRORS.get(fault) or self.server.ask(request)
            self.wfile.write(answer[: len(answer) // 2] if fault is Fault.TRUNCATE else answer)

    def _head(self) -> bytes:
        """The request's line and headers; empty where the client has left."""
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            if not (line := self.rfile.readline()):
                return b""
            head += line
        return head[:-4]

    def _whole(self, head: bytes) -> bytes:
        """The request with its body, for a connection that ends with the answer."""
        if re.search(rb"(?i)\r\nexpect: *100-continue", head):
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
        body = self.rfile.read(int(length[1])) if length else b""
        return _NOT_PASSED_ON.sub(b"", head) + b"\r\nConnection: close\r\n\r\n" + body


@contextmanager
def faulty_proxy(server: str, latency_s: float = 0.0) -> Iterator[FaultyProxy]:
    """A proxy that serves while the block lasts."""
    with FaultyProxy(server, latency_s) as proxy:
        threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True).start()
        yield proxy
        proxy.shutdown()
