"""Offline tokenization: tars of pairs to id shards; see `pipelines.image_jobs` for the folders."""

from __future__ import annotations

from lavit_dist.checkpoint.official import tokenizer_digest, visual_tokenizer_config
from lavit_dist.config.pretokenize import PretokenizeConfig
from lavit_dist.data.id_shard import Encoding
from lavit_dist.data.pair_decoder import PairDecoder
from lavit_dist.data.pair_encoder import ImageEncoder
from lavit_dist.data.text_tokenizer import TextTokenizer
from lavit_dist.observe.logs import setup_logging
from pipelines.image_jobs import preprocessing_digest, run_image_jobs, settings_digest
from pipelines.image_worker import ImageWorker


def run(config: PretokenizeConfig) -> None:
    """Makes the shards that are missing or no longer match their inputs and tokenizers, then the manifests."""
    setup_logging()
    run_image_jobs(config, PretokenizeWorker, lambda: describe_encoding(config), models=("tokenizer", "text_tokenizer"))


def describe_encoding(config: PretokenizeConfig) -> Encoding:
    """What turns pairs into ids under `config`; reads digests and sizes, no weights. Raises `UserError` for what is missing."""
    visual = visual_tokenizer_config(config.tokenizer)
    text = TextTokenizer.load(config.text_tokenizer)
    return Encoding(
        visual_tokenizer=tokenizer_digest(config.tokenizer),
        text_tokenizer=text.digest,
        preprocessing=preprocessing_digest(visual.encoder.image_size),
        settings=settings_digest(config),
        text_vocab_size=text.vocab_size,
        codebook_size=visual.codebook.size,
    )


class PretokenizeWorker(ImageWorker):
    """Makes shards of captioned images."""

    config: PretokenizeConfig

    def decoder(self) -> PairDecoder:
        config = self.config
        image_size = visual_tokenizer_config(config.tokenizer).encoder.image_size
        return PairDecoder(config.text_tokenizer, image_size, config.max_pixels, config.filter)

    def models(self) -> ImageEncoder:
        return ImageEncoder(self.tokenizer(), seed=self.selection_seed)
