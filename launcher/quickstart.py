"""Runs the whole of training at a size for two CPU cores, from pairs to a report with pictures.

python launcher/quickstart.py --config configs/quickstart/quickstart.yaml [data=photos/captions.jsonl] [run_dir=runs/mine]
"""

from lavit_dist.config.command_line import run_entry_point
from lavit_dist.config.quickstart import QuickstartConfig
from pipelines.quickstart import run

if __name__ == "__main__":
    run_entry_point(QuickstartConfig, run, "Run every stage of training, from pairs to a report with pictures.")
