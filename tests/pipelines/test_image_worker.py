"""The actor of image jobs: what decoders die of is told apart from what waits beside it, and a writer that always dies ends its shard."""

import os
from pathlib import Path

import pytest
import torch

from lavit_dist.checkpoint.official import save_visual_tokenizer
from lavit_dist.config.base import build
from lavit_dist.config.pretokenize import PretokenizeConfig
from lavit_dist.data.id_folder import IdFolder
from lavit_dist.data.id_shard import quarantine_path
from lavit_dist.data.quarantine import read_quarantine
from lavit_dist.data.shard_list import Shard
from lavit_dist.data.text_tokenizer import train_text_tokenizer
from lavit_dist.models.initialisation import initialise
from lavit_dist.models.visual_tokenizer import VisualTokenizer
from lavit_dist.parallel.ray_cluster import ray_cluster
from lavit_dist.parallel.ray_jobs import Share, run_jobs
from pipelines.image_worker import JOBS_AT_A_TIME
from pipelines.pretokenize import PretokenizeWorker, describe_encoding
from pipelines.shard_jobs import ShardJob
from tests.small_tokenizer import SMALL


@pytest.fixture
def config(tmp_path) -> PretokenizeConfig:
    torch.manual_seed(0)
    visual = VisualTokenizer(SMALL)
    initialise(visual)
    save_visual_tokenizer(visual, tmp_path / "tokenizer")
    train_text_tokenizer(["a red thing"] * 3, 300, tmp_path / "text")
    settings = {"run_dir": "", "pairs": "", "tokenizer": str(tmp_path / "tokenizer"), "text_tokenizer": str(tmp_path / "text")}
    return build(PretokenizeConfig, settings | {"batch_size": 4, "ray": {"num_cpus": 2, "num_actors": 1, "object_store_mb": 80}})


def jobs(folder: Path, tars: list[Path]) -> dict[str, ShardJob]:
    target = IdFolder.of(folder, {})
    inputs = [Shard(tar.name, str(tar), tar.stat().st_size) for tar in tars]
    made = [ShardJob(target, "train", f"shard-{number}.arrow", (tar,)) for number, tar in enumerate(inputs)]
    return {job.name: job for job in made}


def deadly_worker():
    """A class that Ray sends by value. Its decoders die of samples whose key begins with `deadly`."""

    class Deadly(PretokenizeWorker):
        def decoder(self):
            decoder = super().decoder()
            decode = decoder.decode

            def dying(tar, samples):
                if any(sample.key.startswith("deadly") for sample in samples):
                    os._exit(1)
                return decode(tar, samples)

            decoder.decode = dying
            return decoder

    return Deadly


def test_what_decoders_die_of_costs_no_other_sample(config, jpeg, write_tar, tmp_path):
    tars = []
    for number in range(2):
        keys = ["a", "b", f"deadly{number}", "c", "d", "e"]
        written = write_tar(
            [(name, data) for key in keys for name, data in ((f"{key}.jpg", jpeg()), (f"{key}.txt", b"a red thing"))]
        )
        tars.append(written.rename(tmp_path / f"{number}.tar"))
    to_do = jobs(tmp_path / "ids", tars)
    with ray_cluster(config.ray):
        share = Share(1, 0, JOBS_AT_A_TIME)
        outcomes = list(run_jobs(deadly_worker(), (config, describe_encoding(config), 1, 0.0), to_do, config.ray, share))
    assert [outcome.error for outcome in outcomes] == [None, None]
    for number, job in enumerate(to_do.values()):
        record = next(outcome.result for outcome in outcomes if outcome.name == job.name)
        assert record.documents == 5
        (refused,) = read_quarantine(quarantine_path(tmp_path / "ids" / job.file))
        assert (refused.key, refused.reason) == (f"deadly{number}", "kills_decoder")
