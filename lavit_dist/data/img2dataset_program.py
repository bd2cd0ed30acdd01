"""Runs img2dataset in an environment of its own: started by its path, with that environment's interpreter, and given a job in JSON.

img2dataset can't be installed beside lavit_dist (it needs older versions of webdataset and pandas), so nothing of lavit_dist is
imported here. It fetches by `urllib.request.urlopen`, without an end to an answer that trickles, without a limit to its size, and from
`file:` too: an opener of ours, which its workers install as they start, sets these limits.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import sys
import threading
import time
import urllib.request
from pathlib import Path

TOO_SLOW = "still incomplete after"
TOO_LARGE = "larger than"
PIECE = 1 << 16


class LimitError(Exception):
    """An answer that takes too long, or is too large."""


class LimitedResponse(http.client.HTTPResponse):
    """An answer that is read whole within `max_seconds` and `max_bytes`, or not at all."""

    max_seconds: float
    max_bytes: int

    def read(self, amt: int | None = None) -> bytes:
        """The body; raises `LimitError`, or `http.client.IncompleteRead` for one that ends early."""
        if amt is not None:
            return super().read(amt)
        expected = None if self.chunked else self.length
        if expected is not None and expected > self.max_bytes:
            raise LimitError(f"{TOO_LARGE} {self.max_bytes} bytes")
        body, deadline = bytearray(), time.monotonic() + self.max_seconds
        while expected is None or len(body) < expected:
            piece = self.read1(PIECE)
            if not piece:
                break
            body += piece
            if len(body) > self.max_bytes:
                raise LimitError(f"{TOO_LARGE} {self.max_bytes} bytes")
            if time.monotonic() > deadline:
                raise LimitError(f"{TOO_SLOW} {self.max_seconds:g} seconds")
        if expected is not None and len(body) < expected:
            raise http.client.IncompleteRead(bytes(body), expected - len(body))
        return bytes(body)


class LimitedConnection(http.client.HTTPConnection):
    """A connection by http that gives limited answers."""

    response_class = LimitedResponse


class LimitedSecureConnection(http.client.HTTPSConnection):
    """The same by https, with certificates checked."""

    response_class = LimitedResponse


class LimitedHandler(urllib.request.AbstractHTTPHandler):
    """Opens http and https addresses for an opener."""

    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        """Asks by http."""
        return self.do_open(LimitedConnection, request)

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        """Asks by https."""
        return self.do_open(LimitedSecureConnection, request)


def make_opener(max_seconds: float, max_bytes: int) -> urllib.request.OpenerDirector:
    """What fetches http and https addresses, and no others; the limits are those of all answers in this process."""
    LimitedResponse.max_seconds, LimitedResponse.max_bytes = max_seconds, max_bytes
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        LimitedHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener


def end_with_parent() -> None:
    """Kills this process and all that it started as soon as the one that started it is gone, which closes standard input."""
    os.read(0, 1)  # sys.stdin would hold a lock that the interpreter needs at its end
    os.killpg(0, signal.SIGKILL)


if __name__ in ("__main__", "__mp_main__"):  # the latter in img2dataset's workers, which know the same command line
    job = json.loads(Path(sys.argv[1]).read_text())
    urllib.request.install_opener(make_opener(**job["limits"]))
    if __name__ == "__main__":
        threading.Thread(target=end_with_parent, daemon=True).start()
        from img2dataset import download

        download(**job["arguments"])
