"""What becomes of a picture's download, in our words: img2dataset tells it by a status and the text of an exception."""

from __future__ import annotations

import re
from typing import NamedTuple

from lavit_dist.data.img2dataset_program import TOO_LARGE, TOO_SLOW


class Failure(NamedTuple):
    """Why there is no picture."""

    reason: str
    """The short fixed word."""
    may_pass: bool
    """Whether another try may succeed."""


NO_RESULT = Failure("no_result", may_pass=False)
"""Of a row for which img2dataset ended again and again without a word."""
UNANSWERED = ("timeout", "connection_failed", "unknown_host")
"""Reasons of which a machine without a network has nothing but."""
HTTP_CODES = {
    **dict.fromkeys((401, 402, 403, 407, 451), Failure("forbidden", may_pass=False)),
    **dict.fromkeys((404, 410), Failure("not_found", may_pass=False)),
    **dict.fromkeys((408, 425, 429), Failure("server_busy", may_pass=True)),
}
MESSAGES = (
    ("X-Robots-Tag", Failure("disallowed", may_pass=False)),
    ("infinite loop|redirection .* is not allowed|redirected to", Failure("bad_redirect", may_pass=False)),
    (f"timed out|{TOO_SLOW}", Failure("timeout", may_pass=True)),
    (TOO_LARGE, Failure("too_large", may_pass=False)),
    ("IncompleteRead", Failure("truncated_body", may_pass=True)),
    ("[Tt]emporary failure in name resolution", Failure("unknown_host", may_pass=True)),
    ("getaddrinfo|not known|No address associated", Failure("unknown_host", may_pass=False)),
    (
        "Connection (reset|refused|aborted)|Remote end closed|Broken pipe|unreachable|No route to host|EOF occurred|UNEXPECTED_EOF",
        Failure("connection_failed", may_pass=True),
    ),
    (r"certificate|\[SSL|TLS", Failure("tls_error", may_pass=False)),
    (
        "unknown url type|no host given|nonnumeric port|control characters|Invalid IPv6|label (empty|too long)|codec can't encode",
        Failure("bad_url", may_pass=False),
    ),
    (r"buf\.empty\(\)", Failure("empty_body", may_pass=False)),
    ("Image decoding error", Failure("not_an_image", may_pass=False)),
    ("IMAGE_MAX|IMAGE_PIXELS|MAX_PIXELS", Failure("image_bomb", may_pass=False)),
    ("image too small", Failure("too_small", may_pass=False)),
    ("aspect ratio too large", Failure("too_elongated", may_pass=False)),
)
RESIZE_FAILED = Failure("unreadable_image", may_pass=False)
OTHER = Failure("download_failed", may_pass=True)
"""Of what has no word here: it is worth another try, and its message is kept."""


def classify(status: str, message: str | None) -> Failure | None:
    """The failure that a row of img2dataset's result tells of; None for a picture that came."""
    if status == "success":
        return None
    message = message or ""
    for pattern, failure in MESSAGES:
        if re.search(pattern, message):
            return failure
    if found := re.search(r"HTTP Error (\d{3})", message):
        code = int(found[1])
        return HTTP_CODES.get(
            code, Failure("server_error", may_pass=True) if code >= 500 else Failure("http_error", may_pass=False)
        )
    return RESIZE_FAILED if status == "failed_to_resize" else OTHER
