"""The procedural set of coloured shapes: scenes are made, drawn, and written as pairs."""

from __future__ import annotations

from pathlib import Path

from lavit_dist.config.make_shapes import MakeShapesConfig
from lavit_dist.data.pair_writer import EncodedPair, PairWriter
from lavit_dist.data.shapes import SceneMaker, make_scene_maker
from lavit_dist.data.shapes_picture import draw_scene, encode_jpeg
from lavit_dist.observe.logs import setup_logging
from pipelines.pair_folder import close_pair_folder, open_pair_folder


def make_shapes(config: MakeShapesConfig) -> None:
    """Writes RUN_DIR/{train,heldout}/*.tar; the same settings give the same bytes."""
    setup_logging()
    if not open_pair_folder(config):
        return
    maker = make_scene_maker(config.seed, config.held_out_attributes, config.held_out_fraction, config.max_objects)
    root = Path(config.run_dir)
    writers = {}
    for split, samples in (("train", config.train_samples), ("heldout", config.heldout_samples)):
        writers[split] = writer = PairWriter(root / split, config.samples_per_shard)
        for index in range(samples):
            writer.add(_make_pair(maker, split, index, config.image_size))
        writer.close()
    close_pair_folder(root, writers)


def _make_pair(maker: SceneMaker, split: str, index: int, image_size: int) -> EncodedPair:
    scene = maker.scene(split, index)
    image = encode_jpeg(draw_scene(scene, image_size))
    return EncodedPair(f"{split}-{index:07d}", image, "jpg", scene.captions, scene.metadata(image_size))
