"""Packs pictures and captions (a folder, a .csv, .tsv or .jsonl file, or foreign tars) into tars of checked image-text pairs.

python data_prep/ingest.py source=photos/captions.jsonl run_dir=runs/photos/pairs
"""

from lavit_dist.config.command_line import run_entry_point
from lavit_dist.config.ingest import IngestConfig
from pipelines.ingest import ingest

if __name__ == "__main__":
    run_entry_point(IngestConfig, ingest, "Packs pictures and captions into tars of checked image-text pairs.")
