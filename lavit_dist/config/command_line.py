"""What every entry point does first: read `--config FILE key=value …`, and turn a `UserError` into one sentence and exit code 2."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from lavit_dist.config.base import load_config
from lavit_dist.errors import Fault, UserError
from lavit_dist.files import PASSING

T = TypeVar("T")
WRONG_CONFIG = 2
"""Exit code when the user can mend the cause."""
SETTING = re.compile(r"[a-z_][a-z0-9_]*(\.[a-z_][a-z0-9_]*)*=")
FAULT = 1
"""Exit code when something outside of the program failed."""
WAIT_FOR_RANK_0 = 20.0
"""Seconds that another rank leaves rank 0 to tell what is wrong; processes start within it of one another."""


def run_entry_point(cls: type[T], run: Callable[[T], None], description: str, argv: list[str] | None = None) -> None:
    """Parses the command line into a `cls` and calls `run` with it; exits with 2 and one sentence on a `UserError`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", metavar="FILE", help="YAML file of the run; see configs/")
    add_overrides(parser)
    arguments = parser.parse_args(argv)
    exit_on_user_error(lambda: run(load_config(cls, arguments.config, arguments.overrides)))


def run_ray_entry_point(cls: type[T], run: Callable[[T], None], description: str, argv: list[str] | None = None) -> None:
    """`run_entry_point` of a job on Ray, whose `cls` has the settings `ray`: takes `--ray-address` too."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", metavar="FILE", help="YAML file of the job; see configs/")
    parser.add_argument("--ray-address", metavar="HOST:PORT", help="running Ray cluster, or `auto`; short for ray.address=…")
    add_overrides(parser)
    arguments = parser.parse_intermixed_args(argv)
    address = [f"ray.address={arguments.ray_address}"] if arguments.ray_address else []
    exit_on_user_error(lambda: run(load_config(cls, arguments.config, [*arguments.overrides, *address])))


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Adds the `key=value` arguments, and `--local_rank`, which the deepspeed launcher passes and LOCAL_RANK repeats."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the file")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)


def split_settings(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """What of a command line are settings, `key=value`, and what is anything else, each in its order."""
    settings = [argument for argument in arguments if SETTING.match(argument)]
    return settings, [argument for argument in arguments if not SETTING.match(argument)]


def exit_on_user_error(action: Callable[[], None]) -> None:
    """Runs `action`; a `UserError` becomes one sentence on standard error and exit code 2, a `Fault` one and exit code 1.

    A mistake that every rank sees is told by rank 0 alone: the others wait, and the launcher ends them when rank 0 exits. One that
    lives to the end of its wait is the only one that saw the mistake, so it tells it.
    """
    try:
        try:
            action()
        except (NotADirectoryError, IsADirectoryError, FileExistsError, PermissionError) as error:
            raise UserError(f"{error.filename} can't be used ({error.strerror}); name another place, or make it usable.") from error
        except OSError as error:
            if error.errno not in PASSING:
                raise
            raise Fault(
                f"{error.filename or 'A file'} can't be written or read at the moment ({error.strerror}); start again."
            ) from error
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        if rank == "0":
            sys.stderr.write(f"error: {error}\n")
        else:
            time.sleep(WAIT_FOR_RANK_0)
            sys.stderr.write(f"error on rank {rank}: {error}\n")
        sys.exit(WRONG_CONFIG)
    except Fault as fault:
        sys.stderr.write(f"error on rank {os.environ.get('RANK', '0')}: {fault}\n")
        sys.exit(FAULT)
