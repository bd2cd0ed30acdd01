"""A store that speaks S3's protocol, and fails now and then."""

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

EVERY = 4
"""One request of so many fails."""


class Unreliable:
    """A WSGI application that answers every few requests with an error of the server, first one and then three in a row."""

    def __init__(self, application: Any) -> None:
        self.application, self.requests, self.failures, self.on = application, itertools.count(), 0, False

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        number = next(self.requests)
        if self.on and (number % EVERY == 0 or number % (5 * EVERY) < 3):
            self.failures += 1
            start_response("503 Slow Down", [("Content-Type", "application/xml")])
            return [b"<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"]
        return self.application(environ, start_response)


@contextmanager
def unreliable_store() -> Iterator[tuple[Unreliable, dict[str, Any]]]:
    """The store, and what fsspec needs to reach it."""
    application = Unreliable(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, application, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield application, {"key": "user", "secret": "password", "endpoint_url": f"http://127.0.0.1:{server.server_port}"}
    finally:
        server.shutdown()
        thread.join()
