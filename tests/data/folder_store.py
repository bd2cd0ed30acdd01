"""A store for tests that several processes can use: a folder, whose downloads are logged and can be slow, cut off or altered."""

import time
from pathlib import Path

import fsspec
from fsspec import AbstractFileSystem


class FolderStore(AbstractFileSystem):
    """`folderstore:///tmp/x/ids` is the folder /tmp/x/ids. Files beside it steer what happens: see `steer`."""

    protocol = "folderstore"
    cachable = False

    @classmethod
    def _strip_protocol(cls, path):
        return path.removeprefix("folderstore://").rstrip("/")

    def ls(self, path, detail=True, **options):
        log(Path(path) / "any", "ls")
        found = [self._info(entry) for entry in sorted(Path(path).iterdir())]
        return found if detail else [entry["name"] for entry in found]

    def info(self, path, **options):
        path = self._strip_protocol(path)
        log(path, "info")
        return self._info(Path(path))

    def _info(self, path):
        return {"name": str(path), "size": path.stat().st_size, "type": "directory" if path.is_dir() else "file"}

    def _open(self, path, mode="rb", **options):
        log(path, "open")
        if steered(path, "parts") == "no":
            raise ValueError("this store gives whole files alone")
        return Path(path).open(mode)

    def get_file(self, rpath, lpath, **options):
        source = Path(self._strip_protocol(rpath))
        content = source.read_bytes()
        log(source, f"get {source.name}")
        middle = len(content) // 2
        with Path(lpath).open("wb") as file:
            file.write(content[:middle])
            file.flush()
            time.sleep(float(steered(source, "seconds") or 0))
            left = int(steered(source, "faults") or 0)
            if left:
                steer(source.parent, faults=left - 1)
                if steered(source, "fault") == "cut":
                    return
                content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
            file.write(content[middle:])


def steer(folder, **settings):
    """`seconds` that a download takes; how many downloads have `faults`, and whether the `fault` is `cut` or `flip`; whether the store
    gives `parts` of files."""
    for name, value in settings.items():
        (Path(folder).parent / f"store.{name}").write_text(str(value))


def steered(path, name):
    file = Path(path).parent.parent / f"store.{name}"
    return file.read_text() if file.exists() else None


def log(path, event):
    with (Path(path).parent.parent / "store.log").open("a") as file:
        file.write(event + "\n")


def logged(folder):
    """What was asked of the store in `folder`, since the last call."""
    file = Path(folder).parent / "store.log"
    events = file.read_text().splitlines() if file.exists() else []
    file.unlink(missing_ok=True)
    return events


fsspec.register_implementation("folderstore", FolderStore, clobber=True)
