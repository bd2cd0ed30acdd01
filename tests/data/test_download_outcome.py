"""Messages that img2dataset 1.47 wrote down, and what they are in our words. `tests/pipelines/test_download.py` has those of a real server."""

import pytest

from lavit_dist.data.download_outcome import classify


@pytest.mark.parametrize(
    ("message", "reason", "may_pass"),
    [
        ("<urlopen error [Errno -2] Name or service not known>", "unknown_host", False),
        ("<urlopen error [Errno -3] Temporary failure in name resolution>", "unknown_host", True),
        ("<urlopen error timed out>", "timeout", True),
        ("<urlopen error [Errno 111] Connection refused>", "connection_failed", True),
        ("[Errno 104] Connection reset by peer", "connection_failed", True),
        ("<urlopen error [Errno 101] Network is unreachable>", "connection_failed", True),
        ("<urlopen error [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: certificate has expired>", "tls_error", False),
        ("<urlopen error [SSL: UNEXPECTED_EOF_WHILE_READING] EOF occurred in violation of protocol>", "connection_failed", True),
        ("<urlopen error unknown url type: ftp>", "bad_url", False),
        ("URL can't contain control characters. 'a b' (found at least ' ')", "bad_url", False),
        ("HTTP Error 429: Too Many Requests", "server_busy", True),
        ("HTTP Error 522: <none>", "server_error", True),
        ("HTTP Error 410: Gone", "not_found", False),
        ("HTTP Error 400: Bad Request", "http_error", False),
        ("something that nobody has seen", "download_failed", True),
        (None, "download_failed", True),
    ],
)
def test_failed_downloads(message, reason, may_pass):
    assert classify("failed_to_download", message) == (reason, may_pass)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("image too small", "too_small"),
        ("aspect ratio too large", "too_elongated"),
        ("Image decoding error", "not_an_image"),
        ("OpenCV: something", "unreadable_image"),
    ],
)
def test_pictures_that_came_and_can_not_be_used(message, reason):
    assert classify("failed_to_resize", message) == (reason, False)


def test_a_picture_is_no_failure():
    assert classify("success", None) is None
