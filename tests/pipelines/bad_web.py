"""A web server on this machine whose pictures are as one finds them: some there, some gone, some slow, cut off or no pictures at all."""

import io
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image

KINDS = {
    "good": None,
    "small": None,
    "heals": None,
    "gone": "not_found",
    "private": "forbidden",
    "broken": "server_error",
    "slow": "timeout",
    "drip": "timeout",
    "closed": "connection_failed",
    "page": "not_an_image",
    "empty": "empty_body",
    "cut": "truncated_body",
    "loop": "bad_redirect",
    "huge": "too_large",
    "bomb": "image_bomb",
    "noai": "disallowed",
}
"""The first part of a path, and the reason that it ends in; None for a picture."""
WORTH_ANOTHER_TRY = ("broken", "slow", "drip", "closed", "cut")
CODES = {"gone": 404, "private": 403, "broken": 503}
SLOW = 2.0
"""Seconds before a slow answer, or between two bytes of one that drips."""
MAX_BYTES = 1_000_000
MAX_PIXELS = 1_000_000


def encode(image: Image.Image, form: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


class Handler(BaseHTTPRequestHandler):
    """`/KIND/ANYTHING` answers as `KINDS` says; `/good/300x200` with a picture of that size."""

    server: "BadWeb"
    picture = encode(Image.effect_noise((300, 200), 50).convert("RGB"), "JPEG")
    small = encode(Image.new("RGB", (40, 20), "red"), "PNG")
    bomb = encode(Image.new("1", (1100, 1000)), "PNG")

    def do_GET(self) -> None:
        kind = self.path.split("/")[1]
        with self.server.lock:
            self.server.requests[self.path] += 1
            first = self.server.requests[self.path] == 1
        if kind in CODES or (kind == "heals" and first):
            self.send_error(CODES.get(kind, 500))
        elif kind == "closed":
            self.close_connection = True
        elif kind == "loop":
            self.answer(b"", 302, Location=self.path)
        elif kind == "slow":
            time.sleep(SLOW)
            self.answer(self.picture)
        elif kind == "drip":
            self.answer(self.picture[:1], length=len(self.picture))
            self.drip()
        elif kind == "cut":
            self.answer(self.picture[:1000], length=len(self.picture))
        elif kind == "huge":
            self.answer(b"", length=10**12)
        elif kind == "noai":
            self.answer(self.picture, **{"X-Robots-Tag": "noai"})
        else:
            bodies = {"page": b"<html>sorry</html>", "empty": b"", "bomb": self.bomb, "small": self.small}
            self.answer(bodies.get(kind, self.picture))

    def answer(self, body: bytes, code: int = 200, length: int | None = None, **headers: str) -> None:
        self.send_response(code)
        for name, value in {"Content-Type": "image/jpeg", "Content-Length": str(length or len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def drip(self) -> None:
        """Sends bytes apart by less than any time-out, until the other side has had enough."""
        try:
            for _ in range(200):
                time.sleep(0.1)
                self.wfile.write(b"x")
        except OSError:
            pass

    def log_message(self, *_: object) -> None:
        pass


class BadWeb(ThreadingHTTPServer):
    """The server, and how often each path was asked for."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: Counter[str] = Counter()
        self.lock = threading.Lock()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: object) -> None:
        """Clients that hang up are expected."""


@contextmanager
def serving() -> Iterator[BadWeb]:
    """A `BadWeb` that answers during the block."""
    with BadWeb() as web:
        thread = threading.Thread(target=web.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield web
        web.shutdown()
        thread.join()
