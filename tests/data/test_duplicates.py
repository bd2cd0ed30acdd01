"""Copies of images are found whatever shard they are in, and leave the set with their captions; nothing else does."""

from __future__ import annotations

import io
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lavit_dist.config.id_cache import IdCacheConfig
from lavit_dist.data.captions import caption_groups
from lavit_dist.data.deduplicate import deduplicate
from lavit_dist.data.duplicates import LARGEST_DISTANCE, find_copies
from lavit_dist.data.id_set_check import find_flaws
from lavit_dist.data.id_shards import IdShards
from lavit_dist.data.manifest import Manifest
from lavit_dist.data.picture import decode_image, perceptual_hash
from lavit_dist.errors import UserError
from tests.data.id_sets import Tar, close_hash, sets, write_set, write_texts


def distance(one: int, other: int) -> int:
    return (one ^ other).bit_count()


def slowly(hashes: list[int], max_distance: int, kept: list[int]) -> list[bool]:
    """`find_copies` of hashes after those of `kept`, by comparing each with all that stay."""
    copies = []
    for each in hashes:
        copies.append(any(distance(each, other) <= max_distance for other in kept))
        if not copies[-1]:
            kept.append(each)
    return copies


@given(seed=st.integers(0, 1 << 32), size=st.integers(0, 60), max_distance=st.integers(0, LARGEST_DISTANCE))
@settings(max_examples=60, deadline=None)
def test_every_copy_is_found_and_nothing_else(seed, size, max_distance):
    random = np.random.default_rng(seed)
    hashes = [close_hash(random) ^ (int(random.integers(2)) << 63) for _ in range(size)]
    assert find_copies(np.array(hashes, np.uint64), max_distance).tolist() == slowly(hashes, max_distance, [])


def images(manifest: Manifest) -> list[int]:
    """The hash of each image, in order."""
    found = []
    for shard in IdShards(manifest):
        _, first = np.unique(caption_groups(shard), return_index=True)
        found += [shard.value("image_hash", int(document)) for document in first]
    return found


def documents(manifest: Manifest) -> list[dict]:
    return [document for shard in IdShards(manifest) for document in shard.batch.to_pylist()]


@given(shards=sets, others=sets, max_distance=st.integers(0, LARGEST_DISTANCE), against=st.booleans())
@settings(max_examples=25, deadline=None)
def test_a_set_loses_its_copies_with_all_their_captions(shards, others, max_distance, against):
    with TemporaryDirectory() as folder:
        old = write_set(Path(folder) / "old", shards)
        other = [write_set(Path(folder) / "other", others, name="o")] if against else []
        kept = [each for manifest in other for each in images(manifest)]
        copies = slowly(images(old), max_distance, kept)
        if all(copies):
            with pytest.raises(UserError, match="holds no document"):
                deduplicate(old, Path(folder) / "new", max_distance=max_distance, against=other)
            assert not (Path(folder) / "new").exists()
            return
        new = deduplicate(old, Path(folder) / "new", max_distance=max_distance, against=other)
        assert find_flaws(new, IdCacheConfig()) == []
        of_image = iter(copies)
        expected, image, is_copy = [], None, False
        for document in documents(old):
            if (document["source_shard"], document["source_offset"]) != image:
                image, is_copy = (document["source_shard"], document["source_offset"]), next(of_image)
            if not is_copy:
                expected.append(document)
        assert documents(new) == expected
        for before, after in zip(old.shards, new.shards, strict=True):
            assert after.outcomes.samples == before.outcomes.samples
            assert before.outcomes.used - after.outcomes.used == after.outcomes.filtered.get("duplicate", 0)
            assert after.outcomes.used == after.images
        again = deduplicate(new, Path(folder) / "again", max_distance=max_distance, against=other)
        assert again.fingerprint == new.fingerprint


def test_texts_stay(tmp_path):
    texts = write_texts(tmp_path / "texts", 5)
    assert deduplicate(texts, tmp_path / "new", max_distance=2).fingerprint == texts.fingerprint


def test_distances_that_are_none_are_refused(tmp_path):
    manifest = write_set(tmp_path / "ids", [[Tar([1])]])
    for wrong in (-1, LARGEST_DISTANCE + 1):
        with pytest.raises(UserError, match=f"--max-distance {wrong} must lie between 0 and 4"):
            deduplicate(manifest, tmp_path / "new", max_distance=wrong)


def test_copies_of_photographs_have_close_hashes_and_other_photographs_far_ones(photos: Path):
    pictures = [decode_image(path.read_bytes()) for path in sorted((photos.parent / "images").iterdir())]
    hashes = [perceptual_hash(picture) for picture in pictures]
    for picture, own in zip(pictures, hashes, strict=True):
        for copy in (
            picture.resize((picture.width // 2, picture.height // 2)),
            saved(picture, "JPEG", quality=50),
            saved(picture, "WEBP"),
        ):
            assert distance(own, perceptual_hash(copy)) <= 2
    for place, own in enumerate(hashes):
        assert min((distance(own, other) for other in hashes[:place]), default=64) > LARGEST_DISTANCE


def saved(picture: Image.Image, kind: str, **options: int) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return decode_image(buffer.getvalue())
