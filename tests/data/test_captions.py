"""One caption per image and epoch: each image once, and each caption in its turn."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lavit_dist.data.captions import caption_groups, one_of_each
from lavit_dist.data.id_shard import IMAGE, TEXT, IdDocument, IdShard

HASHES = np.random.default_rng(0).integers(0, 2**63, 1000).astype(np.uint64)


def document(key: str, caption: int, source: tuple[str, int, int], *kinds: int) -> IdDocument:
    return IdDocument(key, caption, [(kind, [1]) for kind in kinds or (IMAGE, TEXT)], b"", "", source)


@given(st.lists(st.tuples(st.integers(1, 4), st.booleans()), min_size=1, max_size=20))
def test_captions_of_an_image_are_a_group(tmp_path_factory, write_documents, images):
    """Whether or not the next image lies at the same offset, in another tar."""
    documents, offset = [], 0
    for number, (captions, moves) in enumerate(images):
        offset += 512 * moves
        documents += [document(str(number), caption, (f"{number}.tar", offset, 9)) for caption in range(captions)]
    folder = tmp_path_factory.mktemp("ids")
    write_documents(folder, [documents])
    groups = caption_groups(IdShard(folder / "shard-00000.arrow"))
    assert groups.tolist() == [number for number, (captions, _) in enumerate(images) for _ in range(captions)]


def test_what_is_no_caption_of_the_same_image_is_a_group_of_its_own(tmp_path, write_documents):
    here = ("0.tar", 0, 9)
    documents = [
        document("a", 0, here),
        document("a", 2, here),  # caption 1 was refused
        document("b", 0, here),
        document("b", 0, here),
        document("c", 1, here, TEXT),
        document("c", 2, here, TEXT),
    ]
    write_documents(tmp_path, [documents, []])
    assert caption_groups(IdShard(tmp_path / "shard-00000.arrow")).tolist() == [0, 0, 1, 2, 3, 4]
    assert caption_groups(IdShard(tmp_path / "shard-00001.arrow")).tolist() == []


@given(st.lists(st.integers(1, 5), min_size=1, max_size=30), st.integers(0, 2**63 - 1), st.integers(0, 10**6), st.data())
def test_every_image_once_and_every_caption_in_its_turn(counts, seed, epoch, data):
    groups = np.repeat(np.arange(len(counts)), counts)
    usable = np.array(data.draw(st.lists(st.booleans(), min_size=len(groups), max_size=len(groups))))
    hashes = HASHES[: len(groups)]
    epochs = np.stack([one_of_each(groups, hashes, usable, seed, epoch + later) for later in range(5)])
    assert not epochs[:, ~usable].any()
    for group in np.unique(groups):
        members = np.flatnonzero((groups == group) & usable)
        assert (epochs[:, members].sum(1) == min(1, len(members))).all()
        assert (epochs[: len(members), members].sum(0) == 1).all()


def test_images_begin_with_different_captions():
    groups = np.repeat(np.arange(200), 5)
    shares = one_of_each(groups, HASHES, np.ones(1000, np.bool_), 0, 0).reshape(200, 5).mean(0)
    assert shares.min() > 0.12
    assert not np.array_equal(
        one_of_each(groups, HASHES, np.ones(1000, np.bool_), 1, 0), one_of_each(groups, HASHES, np.ones(1000, np.bool_), 0, 0)
    )
