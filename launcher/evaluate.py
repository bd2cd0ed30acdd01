"""python launcher/evaluate.py --config configs/quickstart/evaluate.yaml run_dir=… pairs=… ids=… decoder=… language_model=…"""

from lavit_dist.config.command_line import run_entry_point
from lavit_dist.config.evaluate import EvaluateConfig
from pipelines.evaluate import run

if __name__ == "__main__":
    run_entry_point(
        EvaluateConfig, run, "Score captions, pictures and reconstructions of held-out pairs, and the tokenizer's health."
    )
