"""Pictures that a command line names: image files, and tars of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from lavit_dist.data.image import preprocess
from lavit_dist.data.picture import decode_image
from lavit_dist.data.quarantine import Quarantined, SampleError
from lavit_dist.data.tar_reader import FileLocation, index_shard, read_bytes

TAR = ".tar"
STAGE = "read_picture"


@dataclass(frozen=True)
class NamedPicture:
    """A picture that hasn't been read yet."""

    name: str
    """What to call it in front of people."""
    key: str
    """What the noise of its patch selection depends on: a sample's key, or a file's name without its suffix."""
    location: Path | FileLocation

    @property
    def place(self) -> tuple[Path, int]:
        """Where its bytes begin: the same for two names of one picture."""
        if isinstance(self.location, FileLocation):
            return Path(self.location.shard).resolve(), self.location.offset
        return self.location.resolve(), 0

    def read(self, size: int, max_pixels: int) -> Tensor:
        """The tower's input [3, size, size]. Raises `SampleError` for what is no readable picture."""
        return preprocess(decode_image(self._bytes(), max_pixels), size)

    def _bytes(self) -> bytes:
        try:
            if isinstance(self.location, FileLocation):
                return read_bytes(self.location)
            return self.location.read_bytes()
        except OSError as error:
            raise SampleError("missing_image", f"it can't be opened ({error.strerror})") from error


def list_pictures(names: Iterable[str | Path], refused: list[Quarantined]) -> list[NamedPicture]:
    """The pictures that `names` stand for, in their order; a record of what can't be used in tars among them goes to `refused`."""
    pictures: list[NamedPicture] = []
    for path in map(Path, names):
        if path.suffix.lower() != TAR:
            pictures.append(NamedPicture(str(path), path.stem, path))
            continue
        index = index_shard(path, needs_caption=False)
        refused += [
            record if record.key == path.name else replace(record, key=f"{path.name}/{record.key}") for record in index.quarantined
        ]
        pictures += [
            NamedPicture(f"{path.name}/{sample.key}", sample.key, sample.image)
            for sample in index.samples
            if sample.image is not None
        ]
    return pictures


def read_pictures(
    pictures: Iterable[NamedPicture], size: int, max_pixels: int, refused: list[Quarantined]
) -> Iterator[tuple[NamedPicture, Tensor]]:
    """Each picture that can be read, with the tower's input; a record of each other goes to `refused`."""
    for picture in pictures:
        try:
            yield picture, picture.read(size, max_pixels)
        except SampleError as error:
            refused.append(Quarantined.of(picture.name, STAGE, error))
