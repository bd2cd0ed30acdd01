"""Being asked to stop: by SIGTERM, by SIGUSR1, or by a file in the run folder, which needs no process to be found.

DeepSpeed's launcher passes SIGTERM on to one rank after the other, with 30 seconds for each, and dies of SIGUSR1. The file is what
`launcher/supervise.py` and the Slurm scripts use.
"""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType, TracebackType

from lavit_dist.engine.events import STOP
from lavit_dist.parallel.distributed import rank

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Within its block the signals are noted, not died of. Only the main thread may enter it."""

    def __init__(self, run_dir: Path) -> None:
        self.file = run_dir / STOP
        self._signal: int | None = None

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def requested(self) -> bool:
        """Whether this rank knows of a request; rank 0 alone looks for the file."""
        return self._signal is not None or (rank() == 0 and self.file.exists())

    def honoured(self) -> None:
        """Removes the file, so that the next start isn't stopped too."""
        if rank() == 0:
            self.file.unlink(missing_ok=True)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
