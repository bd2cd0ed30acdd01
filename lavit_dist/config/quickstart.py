"""Settings of `make quickstart`."""

from __future__ import annotations

from pathlib import Path

from lavit_dist.config.base import config
from lavit_dist.errors import check


@config
class StageOverrides:
    """Settings, `key=value` each, that replace those of a stage's own file."""

    shapes: tuple[str, ...] = ()
    ingest: tuple[str, ...] = ()
    text_tokenizer: tuple[str, ...] = ()
    tower: tuple[str, ...] = ()
    tokenizer: tuple[str, ...] = ()
    pretokenize: tuple[str, ...] = ()
    pretrain: tuple[str, ...] = ()
    decoder: tuple[str, ...] = ()
    evaluate: tuple[str, ...] = ()
    report: tuple[str, ...] = ()


@config
class QuickstartConfig:
    """Runs every stage of training in order, each by its own entry point, and renders the report."""

    data: str | None = None
    """Pictures with captions: a folder, a .csv, .tsv or .jsonl file, or tars; None generates scenes of coloured shapes."""
    run_dir: str | None = None
    """Folder of everything that is made; None is runs/quickstart, with the name of `data` behind it where that is given."""
    presets: str = "configs/quickstart"
    """Folder with one settings file per stage."""
    overrides: StageOverrides = StageOverrides()
    pretrain_processes: int = 4
    """Processes of the language model's training: its tensor x pipeline x data parallel sizes."""
    decoder_processes: int = 2
    """Processes of the decoder's training, all data-parallel."""

    @property
    def root(self) -> Path:
        """The folder of everything that is made."""
        return Path(self.run_dir or ("runs/quickstart" + (f"-{Path(self.data).stem}" if self.data else "")))

    def validate(self) -> None:
        for name in ("pretrain_processes", "decoder_processes"):
            check(getattr(self, name) >= 1, f"{name} {getattr(self, name)} must be at least 1.")
        check(
            Path(self.presets).is_dir(),
            f"presets {self.presets} is not a folder; run this from the project's root, or name the folder.",
        )
