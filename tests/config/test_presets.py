"""Every file in configs/ is a legal run once its paths are given, and models are as large as their names and comments say."""

import dataclasses
from pathlib import Path

import pytest

from lavit_dist.config.base import load_config
from lavit_dist.config.cache_latents import CacheLatentsConfig
from lavit_dist.config.decoder import TrainDecoderConfig
from lavit_dist.config.evaluate import EvaluateConfig
from lavit_dist.config.generate import GenerateConfig
from lavit_dist.config.ingest import IngestConfig
from lavit_dist.config.inspect_tokenizer import InspectTokenizerConfig
from lavit_dist.config.make_shapes import MakeShapesConfig
from lavit_dist.config.pretokenize import PretokenizeConfig
from lavit_dist.config.pretrain import PretrainConfig
from lavit_dist.config.quickstart import QuickstartConfig
from lavit_dist.config.report import ReportConfig
from lavit_dist.config.text_tokenizer import TrainTextTokenizerConfig
from lavit_dist.config.tokenize_text import TokenizeTextConfig
from lavit_dist.config.tokenizer import TrainTokenizerConfig
from lavit_dist.config.tower import TrainTowerConfig
from lavit_dist.models.llama import block_parameters
from lavit_dist.models.vocabulary import Vocabulary
from lavit_dist.parallel.topology import Layout

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
CLASSES = {
    "cache_latents": CacheLatentsConfig,
    "ci": QuickstartConfig,
    "decoder": TrainDecoderConfig,
    "evaluate": EvaluateConfig,
    "generate": GenerateConfig,
    "ingest": IngestConfig,
    "inspect": InspectTokenizerConfig,
    "pretokenize": PretokenizeConfig,
    "pretrain": PretrainConfig,
    "quickstart": QuickstartConfig,
    "report": ReportConfig,
    "shapes": MakeShapesConfig,
    "text_tokenizer": TrainTextTokenizerConfig,
    "tokenizer": TrainTokenizerConfig,
    "tokenizer_naive": TrainTokenizerConfig,
    "tokenize_text": TokenizeTextConfig,
    "tower": TrainTowerConfig,
}
PARTS = {"encoder", "sampling"}
"""Files that are no run, but the `base:` of several."""
FILES = sorted(path for path in CONFIGS.rglob("*.yaml") if path.stem not in PARTS)
LAVIT = Vocabulary(32000, 16384)


def load(path: Path, *overrides: str):
    """The configuration in `path`, with a path for every setting that has to be given one."""
    cls = PretrainConfig if path.parent.name == "ladder" else CLASSES[path.stem]
    needed = [field for field in dataclasses.fields(cls) if field.default is field.default_factory is dataclasses.MISSING]
    given = [field.name for field in needed if field.type == "str"] + ["ids"] * (cls is PretrainConfig)
    return load_config(cls, path, [*(f"{name}=given" for name in given), *overrides])


def parameters(config: PretrainConfig) -> tuple[int, int]:
    """Without and with the vocabulary's rows in embedding and head."""
    model = config.model
    body = model.num_layers * block_parameters(model) + model.hidden_size
    rows = sum(table.padded_size for table in LAVIT.tables)
    assert rows == 48512
    return body, body + 2 * rows * model.hidden_size


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_it_is_a_legal_run(path: Path) -> None:
    more = (
        ["images.shards=given"] if path.stem.startswith("tokenizer") else ["corpus=given"] if path.stem == "tokenize_text" else []
    )
    load(path, *more)


@pytest.mark.parametrize(
    ("name", "named", "without", "with_vocabulary"),
    [
        ("ladder/20m", 20e6, 18.98e6, 68.66e6),
        ("ladder/125m", 125e6, 126.51e6, 225.86e6),
        ("ladder/1b", 1e9, 1011.96e6, 1210.66e6),
        ("lavit-7b/pretrain", 6.74e9, 6476.27e6, 6873.68e6),
        ("lavit-13b/pretrain", 13.02e9, 12688.18e6, 13184.95e6),
    ],
)
def test_models_have_the_size_of_their_names(name: str, named: float, without: float, with_vocabulary: float) -> None:
    body, whole = parameters(load(CONFIGS / f"{name}.yaml"))
    assert (body, whole) == pytest.approx((without, with_vocabulary), rel=1e-4)
    assert body == pytest.approx(named, rel=0.06)  # Llama counts 32,000 rows twice in 6.74 and 13.02 billion


@pytest.mark.parametrize(("name", "most_gpus"), [("lavit-7b", 128), ("lavit-13b", 256)])
def test_pipelines_stay_full_on_as_many_gpus_as_the_comment_says(name: str, most_gpus: int) -> None:
    config = load(CONFIGS / name / "pretrain.yaml")
    gpus = 8
    while gpus <= most_gpus:
        layout = Layout.of(config.parallel, gpus)
        layout.check_batch(config.global_batch_size, config.micro_batch_size)
        micro_batches = config.global_batch_size // config.micro_batch_size // layout.data_size
        assert micro_batches >= 8 * layout.pipe_size
        gpus *= 2


@pytest.mark.parametrize("name", ["20m", "125m", "1b"])
def test_rungs_see_20_tokens_per_parameter(name: str) -> None:
    config = load(CONFIGS / "ladder" / f"{name}.yaml")
    tokens = config.total_steps * config.global_batch_size * config.seq_len
    assert tokens == pytest.approx(20 * parameters(config)[0], rel=0.03)
    compute = 6 * parameters(config)[0] * tokens
    assert config.optimizer.learning_rate == pytest.approx(0.3118 * compute**-0.125, rel=0.02)
    batch = config.global_batch_size * config.seq_len
    assert 0.7 < batch / (0.2920 * compute**0.3271) < 1.4
