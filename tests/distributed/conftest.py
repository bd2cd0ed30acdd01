"""Running a program on several gloo ranks: new processes, never forks of this one, with a time-out."""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lavit_dist.parallel.distributed import free_port

POLL_SECONDS = 0.1
ALL_LAYOUTS = "--all-layouts"
LAYOUTS_FOLDER = "--layouts-folder"
HOURS = 3 * 3600.0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        ALL_LAYOUTS, action="store_true", help="train on every legal layout, not on a selection; writes docs/layouts.md"
    )
    parser.addoption(
        LAYOUTS_FOLDER, type=Path, help="keep the runs there, and go on where a stopped one with the same code stopped"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption(ALL_LAYOUTS, default=False) and config.getoption("numprocesses", default=None):
        raise pytest.UsageError(
            f"{ALL_LAYOUTS} collects all differences in one process to write docs/layouts.md: run it without -n."
        )


@pytest.fixture(scope="session")
def all_layouts(request: pytest.FixtureRequest) -> bool:
    """Whether every layout is asked for. The option is there only where pytest was given this folder."""
    return bool(request.config.getoption(ALL_LAYOUTS, default=False))


@pytest.fixture(scope="session")
def layouts_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs under all settings are kept."""
    kept: Path | None = request.config.getoption(LAYOUTS_FOLDER, default=None)
    return kept.absolute() if kept else tmp_path_factory.mktemp("layouts")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption(ALL_LAYOUTS, default=False):
        for item in items:
            item.add_marker(pytest.mark.timeout(HOURS))


@pytest.fixture(scope="session")
def run_ranks() -> Callable[..., None]:
    """`run_ranks(program, world_size, *arguments, timeout=…)`: runs it as the deepspeed launcher would; fails with what ranks said."""

    def run(program: Path, world_size: int, *arguments: str, timeout: float = 120) -> None:
        shared = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        with contextlib.ExitStack() as files:  # not pipes: a full one would stop a rank that says much
            said = [files.enter_context(tempfile.TemporaryFile("w+")) for _ in range(world_size)]
            ranks = [
                subprocess.Popen(
                    [sys.executable, str(program), *arguments],
                    env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
                for rank, output in enumerate(said)
            ]
            codes = _wait(ranks, time.monotonic() + timeout)
            for output in said:
                output.seek(0)
            if codes != [0] * world_size:
                pytest.fail(f"exit codes {codes} after {timeout:.0f} s at most\n" + "\n".join(output.read() for output in said))

    return run


def _wait(ranks: list[subprocess.Popen[bytes]], deadline: float) -> list[int]:
    """Exit codes of all ranks; those that still run when one has failed, or at the deadline, are killed."""
    while any(rank.poll() is None for rank in ranks) and all(rank.poll() in (None, 0) for rank in ranks):
        if time.monotonic() > deadline:
            break
        time.sleep(POLL_SECONDS)
    for rank in ranks:
        if rank.poll() is None:
            rank.kill()
    return [rank.wait() for rank in ranks]
