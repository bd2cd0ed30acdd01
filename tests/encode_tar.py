"""A tar of pairs to documents in one process: what the actors of pretokenization do between them."""

from collections.abc import Mapping
from pathlib import Path

from lavit_dist.config.filter import FilterRule
from lavit_dist.config.images import MAX_PIXELS
from lavit_dist.data.id_shard import IdDocument
from lavit_dist.data.pair_decoder import PairDecoder
from lavit_dist.data.pair_documents import EncodedPairs
from lavit_dist.data.pair_encoder import ImageEncoder
from lavit_dist.data.pair_reader import PairReader
from lavit_dist.data.quarantine import Quarantined
from lavit_dist.data.shard_list import Shard
from lavit_dist.data.text_tokenizer import TextTokenizer
from lavit_dist.models.visual_tokenizer import VisualTokenizer


def encode_tar(
    visual: VisualTokenizer,
    text: TextTokenizer,
    tar: Path,
    *,
    seed: int | None = 0,
    batch_size: int = 16,
    max_pixels: int = MAX_PIXELS,
    rules: Mapping[str, FilterRule] | None = None,
) -> tuple[list[IdDocument], list[Quarantined], list[str]]:
    """The documents, what was refused, and the rule behind each sample that was left out."""
    decoder = PairDecoder(str(text.folder), visual.config.encoder.image_size, max_pixels, rules or {})
    reader, encoder = PairReader(decoder, 1), ImageEncoder(visual, seed=seed)
    opened = reader.open(Shard(tar.name, str(tar), tar.stat().st_size), str(tar.parent))
    documents, filtered = [], []
    quarantined = [*([opened.damage] if opened.damage else ()), *opened.refused]
    for start in range(0, len(opened.samples), batch_size):
        decoded = reader.decode(opened.place, opened.samples[start : start + batch_size])
        quarantined += decoded.quarantined
        filtered += decoded.filtered
        if decoded.pairs:
            encoded = encoder.encode([pair.key for pair in decoded.pairs], decoded.pixels)
            documents += EncodedPairs(tar.name, decoded.pairs, encoded).documents()
    return documents, quarantined, filtered
