"""Documents as an epoch has them, in plain Python: what the compiled code is held to."""

from __future__ import annotations

from lavit_dist.data.id_shard import IMAGE, TEXT
from lavit_dist.models.vocabulary import Vocabulary

Segments = list[tuple[int, list[int]]]


def arrange(segments: Segments, *, text_leads: bool, drop_caption: bool) -> Segments:
    """What is not a pair (one image, one text) stays as it is."""
    if sorted(kind for kind, _ in segments) != [TEXT, IMAGE]:
        return segments
    image, text = sorted(segments, key=lambda segment: segment[0] == TEXT)
    if drop_caption:
        return [image]
    return [text, image] if text_leads else [image, text]


def to_tokens(segments: Segments, vocabulary: Vocabulary, eos_id: int) -> list[int]:
    """Text as it is, [IMG] codes [/IMG] for an image, EOS at the end."""
    tokens: list[int] = []
    for kind, ids in segments:
        if kind == TEXT:
            tokens += [int(token) for token in ids]
        else:
            tokens += [vocabulary.image_start, *(int(code) + vocabulary.code_offset for code in ids), vocabulary.image_end]
    return [*tokens, eos_id]
