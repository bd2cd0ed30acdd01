"""Downloads the pictures of LAION-style metadata (Parquet files with addresses and captions) into tars of image-text pairs.

python data_prep/download.py --config configs/laion400m/download.yaml metadata=laion400m-meta run_dir=runs/laion400m
"""

from lavit_dist.config.command_line import run_entry_point
from lavit_dist.config.download import DownloadConfig
from pipelines.download import download

if __name__ == "__main__":
    run_entry_point(DownloadConfig, download, "Downloads the pictures of LAION-style metadata into tars of image-text pairs.")
