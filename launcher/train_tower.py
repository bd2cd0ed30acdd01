"""deepspeed launcher/train_tower.py --config configs/quickstart/tower.yaml run_dir=… pairs=…"""

from lavit_dist.config.command_line import run_entry_point
from lavit_dist.config.tower import TrainTowerConfig
from pipelines.train_tower import run

if __name__ == "__main__":
    run_entry_point(TrainTowerConfig, run, "Train a small vision tower with CLIP's contrastive loss.")
