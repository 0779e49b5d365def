"""A hub on loopback: what every handler of one needs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class HubHandler(BaseHTTPRequestHandler):
    """Replies as the hub does; a subclass has `do_GET`, which also answers HEAD."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Print nothing."""

    def reply(self, status: int, body: bytes = b"", **headers: Any) -> None:
        """Send a reply; in names of headers `_` stands for `-`."""
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        """Answer as to GET, without a body."""
        self.do_GET()  # type: ignore[attr-defined]


@contextlib.contextmanager
def serving(handler: type[HubHandler], **attributes: Any) -> Iterator[Any]:
    """Run a hub; the handler finds `attributes` at its `server`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    for name, value in attributes.items():
        setattr(server, name, value)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
