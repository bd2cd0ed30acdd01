"""What a run and who looks after it tell each other, without torch: files in the run folder, and an exit code.

RUN_DIR/stop            put there to ask the run to save and stop
RUN_DIR/events.jsonl    what befell it, a line per event, for who looks at it on Monday
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)
STOP = "stop"
EVENTS = "events.jsonl"
HUNG = 74
"""Exit code of a rank that found the run hanging."""


def record_event(run_dir: Path, event: str, step: int, **details: Any) -> None:
    """Appends an event: `event` names its kind, `step` says how many steps had been taken. One rank should tell it.

    A disk that doesn't take it is no reason to end what it tells of.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with (run_dir / EVENTS).open("a") as file:
            file.write(json.dumps({"time": time.time(), "event": event, "step": step, **details}) + "\n")
    except OSError as error:
        logger.warning("%s: the event %r of step %d couldn't be written: %s", run_dir / EVENTS, event, step, error)
