"""Where images come from, in which order, and whether they are altered on the way."""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from pydantic import NonNegativeInt, PositiveInt

from lavit_dist.config.base import config
from lavit_dist.errors import check

MAX_PIXELS = 89_478_485
"""Default size above which a picture counts as a decompression bomb: Pillow's own `MAX_IMAGE_PIXELS`."""
PILLOW_LIMIT = 2 * MAX_PIXELS
"""Above this many pixels Pillow itself refuses to open a picture."""


def check_max_pixels(max_pixels: int, name: str = "max_pixels") -> None:
    """Raises `UserError` for a limit that Pillow would not let take effect."""
    check(
        0 < max_pixels <= PILLOW_LIMIT,
        f"{name} {max_pixels} must be at least 1 and at most {PILLOW_LIMIT}, above which Pillow refuses to open a picture.",
    )


@config
class RandomCropConfig:
    """A random rectangle of the picture, squashed to the tower's square: the crop of Inception's training."""

    min_scale: float = 0.2
    """Smallest share of the picture's area."""
    max_scale: float = 1.0
    """Largest share of the picture's area."""
    max_aspect_ratio: float = 4 / 3
    """Largest ratio of the crop's longer to its shorter side; the ratio is drawn evenly on a log scale."""

    def validate(self) -> None:
        check(
            0 < self.min_scale <= self.max_scale <= 1,
            f"random_crop.min_scale {self.min_scale} and max_scale {self.max_scale} must lie between 0 and 1, in this order.",
        )
        check(self.max_aspect_ratio >= 1, f"random_crop.max_aspect_ratio {self.max_aspect_ratio} must be at least 1.")


@config
class AugmentationConfig:
    """What is done to a picture beyond the squash to a square. The paper does nothing, and nothing is the default."""

    random_crop: RandomCropConfig | None = None
    """Show a random part of each picture instead of the whole."""
    horizontal_flip: bool = False
    """Mirror a picture, left for right, every other time."""
    views: PositiveInt | None = None
    """How many different views of each picture there are, which take turns over the epochs; None draws a new one in every epoch.
    With a number the features of all views can be cached."""

    @property
    def on(self) -> bool:
        """Whether a picture can look different from epoch to epoch."""
        return self.random_crop is not None or self.horizontal_flip

    def validate(self) -> None:
        check(
            self.on or self.views is None,
            f"augmentation.views {self.views} has no meaning while nothing alters the pictures; set random_crop or horizontal_flip, or"
            " leave views out.",
        )


@config
class ImagesConfig:
    """Images out of WebDataset tars on a local disk or in a store that fsspec can reach; captions are passed over."""

    shards: str | tuple[str, ...]
    """The tars: a folder, a pattern (`*`, `?`, `{00000..00099}`), or a URL of either (`s3://bucket/laion/{00000..41455}.tar`); or a
    list of those."""
    order: Literal["indexed", "streamed"] = "indexed"
    """`indexed` reads the headers of local tars at the start and shuffles over all images. `streamed` takes any number of tars, local
    or remote: `streams` readers go each through its own shuffled tars, with the images of a tar shuffled."""
    streams: PositiveInt = 16
    """For `streamed`: readers over all ranks, whose samples alternate in a batch. The order of images depends on it; it must be a
    multiple of the number of ranks and divide global_batch_size. Each rank's share of them reads as many tars at a time."""
    cache_folder: str | None = None
    """For `streamed`: local folder in which remote tars are kept while they are read; None takes the system's folder for temporary
    files. What a run leaves there when it is killed, the next one removes."""
    cache_bytes: PositiveInt = 1 << 34
    """For `streamed`: room for fetched tars per rank, bytes."""
    fetch_attempts: PositiveInt = 4
    """For `streamed`: how often a remote tar is tried before it is passed over; the wait between tries doubles from one second."""
    storage_options: dict[str, str | int | float | bool | None] = field(default_factory=dict)
    """For `streamed`: what fsspec's file system is opened with, such as `anon` or `endpoint_url`; credentials belong into its own files."""
    decode_threads: PositiveInt = 4
    """Pictures decoded at a time, per rank."""
    prefetch_batches: PositiveInt = 2
    """Batches that are kept ready, per rank."""
    pixel_cache_bytes: NonNegativeInt = 1 << 30
    """For `indexed`: memory per rank for pictures that have been decoded, bytes, so that a small set is decoded once."""
    max_pixels: PositiveInt = MAX_PIXELS
    """Largest picture that is decoded, pixels (Pillow's own limit); larger ones are passed over."""
    augmentation: AugmentationConfig = AugmentationConfig()

    def validate(self) -> None:
        check(bool(self.shards), "images.shards is empty; name a folder of tars, a pattern, a URL, or a list of those.")
        check_max_pixels(self.max_pixels, "images.max_pixels")
