"""Run configurations: typed, composed, validated."""

from lavit_dist.config.base import build, config, load_config, save_config, to_dict
from lavit_dist.config.command_line import run_entry_point

__all__ = ["build", "config", "load_config", "run_entry_point", "save_config", "to_dict"]
