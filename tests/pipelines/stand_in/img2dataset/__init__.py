"""Stands in for img2dataset 1.47 where that isn't installed: the same files from the same addresses, by the same `urllib` calls.

`tests/pipelines/test_download.py` runs the same tests with both. An address with `/poison` stands for a picture that kills the worker which
decodes it: its piece is lost, and the others are done. One with `/standstill` waits for ever.
"""

import hashlib
import io
import json
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

FIELDS = [("row", pa.int64()), ("shard", pa.int64()), ("url", pa.string()), ("status", pa.string()), ("error_message", pa.string())]
FIELDS += [(name, pa.int32()) for name in ("width", "height", "original_width", "original_height")]
FIELDS += [("sha256", pa.string()), ("jpg", pa.binary())]


def download(
    *,
    url_list: str,
    output_folder: str,
    number_sample_per_shard: int,
    thread_count: int,
    timeout: float,
    image_size: int,
    resize_only_if_bigger: bool,
    **_: object,
) -> None:
    Path(output_folder).mkdir()
    number, killed = 0, False
    for path in sorted(Path(url_list).glob("*.parquet")):
        rows = pq.read_table(path).to_pylist()
        for start in range(0, len(rows), number_sample_per_shard):
            piece = rows[start : start + number_sample_per_shard]
            if any("/poison" in row["url"] for row in piece):
                killed = True
                continue
            with ThreadPoolExecutor(thread_count) as pool:
                done = list(pool.map(lambda row: row | _fetch(row["url"], timeout, image_size, resize_only_if_bigger), piece))
            stem = f"{output_folder}/{number:05d}"
            pq.write_table(pa.Table.from_pylist(done, schema=pa.schema(FIELDS)), f"{stem}.parquet")
            Path(f"{stem}_stats.json").write_text(json.dumps({"count": len(done)}))
            number += 1
    if killed:
        sys.exit(1)


def _fetch(url: str, timeout: float, image_size: int, only_if_bigger: bool) -> dict[str, object]:
    if "/standstill" in url:
        time.sleep(3600)
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            if "noai" in response.headers.get("X-Robots-Tag", ""):
                raise ValueError("Use of image disallowed by X-Robots-Tag directive")
            data = response.read()
    except Exception as error:
        return {"status": "failed_to_download", "error_message": str(error)}
    try:
        return {"status": "success", "sha256": hashlib.sha256(data).hexdigest(), **_resize(data, image_size, only_if_bigger)}
    except ValueError as error:
        return {"status": "failed_to_resize", "error_message": str(error)}


def _resize(data: bytes, image_size: int, only_if_bigger: bool) -> dict[str, object]:
    if not data:
        raise ValueError("OpenCV: error: (-215:Assertion failed) !buf.empty() in function 'imdecode_'\n")
    try:
        image = Image.open(io.BytesIO(data))
    except OSError:
        raise ValueError("Image decoding error") from None
    width, height = image.size
    if width * height > 1_000_000:
        raise ValueError(
            "OpenCV: error: (-215:Assertion failed) pixels <= CV_IO_MAX_IMAGE_PIXELS in function 'validateInputImageSize'\n"
        )
    if min(width, height) > image_size or not only_if_bigger:
        scale = image_size / min(width, height)
        image = image.resize((round(width * scale), round(height * scale)))
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=95)
    sizes = {"width": image.width, "height": image.height, "original_width": width, "original_height": height}
    return sizes | {"jpg": buffer.getvalue()}
