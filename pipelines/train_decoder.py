"""Pixel decoder training: a frozen visual tokenizer and images to a U-Net that paints, in the released layout."""

from __future__ import annotations

import logging
from collections.abc import Callable

from torch import nn

from lavit_dist.checkpoint.official import load_visual_tokenizer, tokenizer_digest
from lavit_dist.checkpoint.pixel_decoding import check_unet, load_unet, load_vae, make_scheduler, save_pixel_decoder, vae_digest
from lavit_dist.config.decoder import TrainDecoderConfig
from lavit_dist.data.id_shards import IdShards
from lavit_dist.data.latent_set import LatentBatches
from lavit_dist.data.manifest import Manifest, load_manifest
from lavit_dist.data.pair_batches import PairBatches, PairDataset
from lavit_dist.data.pairs import list_shards
from lavit_dist.engine.decoder_examples import Examples, ExamplesFromLatents, ExamplesFromPairs
from lavit_dist.engine.decoder_training import DecoderTraining
from lavit_dist.engine.loop import run_training
from lavit_dist.engine.run_folder import RunFolder
from lavit_dist.errors import check
from lavit_dist.models.pixel_decoder import Latents, PixelDecoder, PixelFolding, VaeLatents, build_unet
from lavit_dist.models.visual_tokenizer import VisualTokenizer
from lavit_dist.observe.logs import setup_logging
from lavit_dist.observe.metrics import MetricsCallback
from lavit_dist.parallel.apex import check_apex
from lavit_dist.parallel.distributed import init_distributed, rank, seed_everything, world_size
from lavit_dist.parallel.outside_faults import outside_faults_told

logger = logging.getLogger(__name__)


def run(config: TrainDecoderConfig) -> None:
    """Trains, or resumes, or says that the decoder is already there; RUN_DIR/model holds it beside the tokenizer."""
    setup_logging()
    check_apex()
    folder = RunFolder(config.run_dir, may_change=("zero_stage",))  # checkpoints don't depend on it
    folder.check_config(config)
    if folder.done:
        logger.info("%s is already there", folder.model)
        return
    tokenizer = load_visual_tokenizer(config.tokenizer)
    latents = build_latents(config)
    examples = open_examples(config, latents, tokenizer)
    seed_everything(config.seed)
    decoder = build_decoder(config, tokenizer)

    init_distributed(config.num_threads, config.faults.hang_seconds)
    folder.open(config)
    scheduler = make_scheduler(config.model)
    with outside_faults_told("while the model was built", advice=DecoderTraining.memory_advice, retry=folder.checkpoints.exists()):
        training = DecoderTraining(config, decoder, scheduler, examples())
    done = run_training(
        training,
        run_dir=folder.root,
        total_steps=config.total_steps,
        checkpoint=config.checkpoint,
        faults=config.faults,
        config=config,
        callbacks=[MetricsCallback(folder.root, config.logging)],
    )
    if done:
        folder.publish(lambda out: save_pixel_decoder(out, tokenizer, training.product(), latents, scheduler))


def open_examples(config: TrainDecoderConfig, latents: Latents, tokenizer: VisualTokenizer) -> Callable[[], Examples]:
    """Checks the data and its fit; what comes back puts models on this rank's device, once it has one, and gives examples."""
    if config.latents is None:
        size = max(config.image_size, tokenizer.config.encoder.image_size)  # what is painted, and what the tower sees
        dataset = PairDataset(list_shards(config.pairs or ""), size, max_pixels=config.max_pixels)
        pairs = PairBatches(dataset, config.global_batch_size, config.seed, rank(), world_size())
        return lambda: ExamplesFromPairs(config, pairs, latents, tokenizer)
    assert isinstance(latents, VaeLatents)  # the settings see to that
    for name in ("selection", "max_pixels", "feature_cache_bytes"):
        if getattr(config, name) != getattr(TrainDecoderConfig, name):
            logger.warning("%s has no meaning with latents, whose images were read and tokenized before", name)
    manifest = load_manifest(config.latents, config.id_cache.storage_options)
    shards = IdShards(manifest, config.id_cache)
    batches = LatentBatches(shards, config.global_batch_size, config.seed, rank(), world_size())
    manifest.check_tokenizers(visual_tokenizer=tokenizer_digest(config.tokenizer))
    check_latents(config, manifest, latents)
    shards.check_sizes()
    return lambda: ExamplesFromLatents(batches, tokenizer)


def check_latents(config: TrainDecoderConfig, manifest: Manifest, latents: VaeLatents) -> None:
    """Raises `UserError` unless a set's latents are of this run's autoencoder and size."""
    found = manifest.encoding.latents
    assert found is not None
    wanted = (config.model.latent_channels, config.latent_size, config.latent_size)
    check(
        found.shape == wanted,
        f"The latents in {manifest.folder} have the shape {found.shape}, of {found.shape[-1] * latents.factor}-pixel images, but image_size"
        f" {config.image_size} asks for {wanted}; change image_size, or run data_prep/cache_latents.py with this one.",
    )
    digest = vae_digest(latents.vae)
    check(
        found.source == digest,
        f"The latents in {manifest.folder} were made by the autoencoder {found.source[:16]}, but model.vae {config.model.vae} is"
        f" {digest[:16]}; give the one they were made by, or run data_prep/cache_latents.py with this one.",
    )


def build_latents(config: TrainDecoderConfig) -> Latents:
    """What is diffused. Raises `UserError` when the autoencoder doesn't make latents of the sizes in `config`."""
    if config.model.latent == "pixel_unshuffle":
        return PixelFolding(config.model.latent_factor)
    vae = load_vae(config.model.vae or "")
    latents = VaeLatents(vae)
    for name, found in (("latent_factor", latents.factor), ("latent_channels", vae.config["latent_channels"])):
        wanted = getattr(config.model, name)
        check(found == wanted, f"The autoencoder in model.vae {config.model.vae} has {name} {found}, but model.{name} is {wanted}.")
    return latents


def build_decoder(config: TrainDecoderConfig, tokenizer: VisualTokenizer) -> PixelDecoder:
    """A new U-Net, or that of `initial_unet`, with a new `unet_proj` of the tokenizer's sizes."""
    old = tokenizer.decoder.unet_proj
    unet_proj = nn.Linear(old.in_features, old.out_features)
    if config.initial_unet is None:
        unet = build_unet(config.model, config.latent_size, old.out_features)
    else:
        unet = load_unet(config.initial_unet)
        check_unet(unet, config.initial_unet, config.model, old.out_features)
        unet.register_to_config(sample_size=config.latent_size)
    return PixelDecoder(config.model, unet, unet_proj)
