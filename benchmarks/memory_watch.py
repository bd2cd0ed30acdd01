"""How much memory the processes of a Ray job have to themselves."""

import threading
from collections import defaultdict

import psutil

SECONDS_BETWEEN_LOOKS = 0.1


class MemoryWatch(threading.Thread):
    """The peak of what each process below one has to itself, by what it does, MiB."""

    def __init__(self, root: int) -> None:
        super().__init__(daemon=True)
        self.root, self.peaks, self.over = root, defaultdict[str, float](float), threading.Event()

    def run(self) -> None:
        while not self.over.wait(SECONDS_BETWEEN_LOOKS):
            try:
                driver = psutil.Process(self.root)
                for process in (driver, *driver.children(recursive=True)):
                    self._look(process, "driver" if process == driver else None)
            except psutil.Error:
                continue

    def _look(self, process: psutil.Process, name: str | None) -> None:
        try:
            title = " ".join(process.cmdline())
            name = name or (title.split("::")[1].split(".")[0].strip(" \0") if title.startswith("ray::") else None)
            if name is not None and "IDLE" not in name:
                memory = process.memory_info()
                self.peaks[name] = max(self.peaks[name], (memory.rss - memory.shared) / 2**20)
        except psutil.Error:
            pass
