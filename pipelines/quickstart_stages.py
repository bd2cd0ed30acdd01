"""The stages of the quickstart in their order: which program, which settings, what it makes and what it makes it from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lavit_dist.config.base import load_config
from lavit_dist.config.decoder import TrainDecoderConfig
from lavit_dist.config.evaluate import EvaluateConfig
from lavit_dist.config.ingest import IngestConfig
from lavit_dist.config.make_shapes import MakeShapesConfig
from lavit_dist.config.pretokenize import PretokenizeConfig
from lavit_dist.config.pretrain import PretrainConfig
from lavit_dist.config.quickstart import QuickstartConfig
from lavit_dist.config.report import ReportConfig
from lavit_dist.config.text_tokenizer import TrainTextTokenizerConfig
from lavit_dist.config.tokenizer import TrainTokenizerConfig
from lavit_dist.config.tower import TrainTowerConfig
from lavit_dist.errors import UserError, check
from lavit_dist.parallel.apex import check_apex
from lavit_dist.parallel.topology import Layout


@dataclass(frozen=True)
class Stage:
    """One program of the chain."""

    name: str
    """What its settings file, its overrides and its log are called."""
    title: str
    """What it makes, in words."""
    program: tuple[str, ...]
    """How it is started, without its settings."""
    arguments: tuple[str, ...]
    """Its settings: `--config FILE` and `key=value`."""
    config: Any
    """The same, resolved."""
    products: tuple[Path, ...]
    """What is there when it is done."""
    processes: int = 0
    """How many processes the deepspeed launcher starts of it; 0 starts the program itself."""
    depends_on_outside: bool = False
    """Whether it must look at its sources again even when its products are there, since others may change them."""

    @property
    def command(self) -> tuple[str, ...]:
        """The command as one types it."""
        return (*self.program, *self.arguments)

    @property
    def folder(self) -> str:
        """Where its products are."""
        return str(self.config.run_dir)

    @property
    def done(self) -> bool:
        """Whether everything that it makes is there."""
        return all(product.exists() for product in self.products)


class _Planner:
    """Makes stages from what differs between them."""

    def __init__(self, config: QuickstartConfig) -> None:
        self.config = config

    def stage(
        self,
        name: str,
        title: str,
        program: str,
        cls: type,
        products: Sequence[str],
        *,
        folder: str = "",
        processes: int = 0,
        depends_on_outside: bool = False,
        nested: Mapping[str, str | Path] = MappingProxyType({}),
        **settings: str | Path,
    ) -> Stage:
        values = {**settings, **nested}
        overrides = [f"run_dir={self.config.root / folder}", *(f"{key}={value}" for key, value in values.items())]
        overrides += getattr(self.config.overrides, name)
        preset = Path(self.config.presets) / f"{name}.yaml"
        try:
            resolved: Any = load_config(cls, preset, overrides)
        except UserError as error:
            raise UserError(f"Stage {name}: {error}") from error
        return Stage(
            name=name,
            title=title,
            program=("deepspeed", "--quiet", "--num_gpus", str(processes), program) if processes else ("python", program),
            arguments=("--config", str(preset), *overrides),
            config=resolved,
            products=tuple(self.config.root / folder / product for product in products),
            processes=processes,
            depends_on_outside=depends_on_outside,
        )


def plan_stages(config: QuickstartConfig) -> list[Stage]:
    """All stages with their settings, resolved and checked. Raises `UserError` for a wrong one before anything has run."""
    check_apex()
    stages = _plan(config)
    by_name = {stage.name: stage.config for stage in stages}
    pretrain, decoder = by_name["pretrain"], by_name["decoder"]
    check(
        not config.data or by_name["ingest"].heldout_fraction > 0,
        "Stage ingest: heldout_fraction is 0, but the quickstart evaluates held-out pairs; set it above 0.",
    )
    layout = Layout.of(pretrain.parallel, config.pretrain_processes)
    layout.check_batch(pretrain.global_batch_size, pretrain.micro_batch_size)
    check(
        decoder.global_batch_size % config.decoder_processes == 0,
        f"Stage decoder: global_batch_size {decoder.global_batch_size} can't be shared out to decoder_processes"
        f" {config.decoder_processes}; choose a number that divides it.",
    )
    return stages


def _plan(config: QuickstartConfig) -> list[Stage]:
    root, stage = config.root, _Planner(config).stage
    pairs, text_tokenizer, tower, tokenizer = (
        root / "pairs",
        root / "text_tokenizer",
        root / "tower/model",
        root / "tokenizer/model",
    )
    if config.data:
        make_pairs = stage(
            "ingest",
            "pairs",
            "data_prep/ingest.py",
            IngestConfig,
            ["summary.json"],
            folder="pairs",
            depends_on_outside=True,
            source=config.data,
        )
    else:
        make_pairs = stage("shapes", "pairs", "data_prep/make_shapes.py", MakeShapesConfig, ["summary.json"], folder="pairs")
    return [
        make_pairs,
        stage(
            "text_tokenizer",
            "text tokenizer",
            "data_prep/train_text_tokenizer.py",
            TrainTextTokenizerConfig,
            ["tokenizer.json"],
            folder="text_tokenizer",
            pairs=pairs,
        ),
        stage(
            "tower",
            "vision tower",
            "launcher/train_tower.py",
            TrainTowerConfig,
            ["model"],
            folder="tower",
            pairs=pairs / "train",
            text_tokenizer=text_tokenizer,
        ),
        stage(
            "tokenizer",
            "visual tokenizer",
            "launcher/train_tokenizer.py",
            TrainTokenizerConfig,
            ["model"],
            folder="tokenizer",
            tower=tower,
            nested={"images.shards": pairs / "train"},
        ),
        stage(
            "pretokenize",
            "ids of all pairs, on Ray",
            "data_prep/pretokenize.py",
            PretokenizeConfig,
            ["train/manifest.json", "heldout/manifest.json"],
            folder="ids",
            pairs=pairs,
            tokenizer=tokenizer,
            text_tokenizer=text_tokenizer,
        ),
        stage(
            "pretrain",
            "language model",
            "launcher/pretrain.py",
            PretrainConfig,
            ["model"],
            folder="pretrain",
            processes=config.pretrain_processes,
            ids=root / "ids/train",
            text_tokenizer=text_tokenizer,
            visual_tokenizer=tokenizer,
        ),
        stage(
            "decoder",
            "pixel decoder",
            "launcher/train_decoder.py",
            TrainDecoderConfig,
            ["model"],
            folder="decoder",
            processes=config.decoder_processes,
            pairs=pairs / "train",
            tokenizer=tokenizer,
        ),
        stage(
            "evaluate",
            "captions, pictures, scores",
            "launcher/evaluate.py",
            EvaluateConfig,
            ["results.json"],
            folder="evaluation",
            pairs=pairs,
            ids=root / "ids",
            decoder=root / "decoder/model",
            language_model=root / "pretrain/model",
        ),
        stage("report", "report", "launcher/report.py", ReportConfig, ["report.html"], depends_on_outside=True),
    ]
