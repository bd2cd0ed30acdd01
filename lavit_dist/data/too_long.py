"""What is said of documents that are longer than a row."""

from __future__ import annotations

import logging
from pathlib import Path

from lavit_dist.config.documents import TooLong
from lavit_dist.errors import check

logger = logging.getLogger(__name__)


def report_too_long(
    policy: TooLong, folder: str | Path, *, seq_len: int, documents: int, too_long: int, left_out: int, longest: int
) -> None:
    """Warns of documents that are `left_out`, tells of others that are cut, and raises `UserError` where the policy is `error`.

    `too_long` of the `documents` in `folder` have more than `seq_len` tokens with their caption, the longest `longest`.
    """
    if not too_long:
        return
    are = f"{too_long} of {documents} documents in {folder} are longer than seq_len {seq_len} (the longest has {longest} tokens)"
    check(policy != "error", f"{are}, and documents.too_long is error; raise seq_len, or set documents.too_long to drop or split.")
    if policy == "drop":
        logger.warning("%s and are left out", are)
        return
    if left_out:
        logger.warning("%s; %d of them have an image that doesn't fit a row and are left out", are, left_out)
    if too_long > left_out:
        logger.info("%s; the text of %d is cut to fit rows", are, too_long - left_out)
