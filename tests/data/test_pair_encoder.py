"""From tars to documents: one per caption, the same in any batch, and every bad sample written down."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch

from lavit_dist.config.filter import FilterRule
from lavit_dist.config.model import CodebookConfig
from lavit_dist.data.id_shard import IMAGE, TEXT
from lavit_dist.data.text_tokenizer import train_text_tokenizer
from lavit_dist.models.inference import freeze_for_inference
from lavit_dist.models.initialisation import initialise
from lavit_dist.models.visual_tokenizer import VisualTokenizer
from tests.encode_tar import encode_tar
from tests.small_tokenizer import SMALL

CONFIG = dataclasses.replace(SMALL, codebook=CodebookConfig(size=64, dim=8))


@pytest.fixture(scope="module")
def visual():
    torch.manual_seed(0)
    visual = VisualTokenizer(CONFIG)
    initialise(visual)
    return visual.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return train_text_tokenizer(["a red thing"] * 3, 300, tmp_path_factory.mktemp("text"))


@pytest.fixture
def tar(jpeg, write_tar):
    members = []
    for index in range(7):
        metadata = {
            "similarity": 0.3 + index,
            "width": 24,
            "nsfw": True,
            "url": "x",
            "captions": ["A red thing", f"number {index}"],
        }
        members += [(f"k{index}.jpg", jpeg((30 * index, 99, 200))), (f"k{index}.json", json.dumps(metadata).encode())]
    members += [
        ("bad.jpg", b"<html>"),
        ("bad.txt", b"not a picture"),
        ("bomb.jpg", jpeg(size=(400, 300))),
        ("bomb.txt", b"too large"),
    ]
    members += [("mute.jpg", jpeg()), ("mute.txt", b" ")]
    return write_tar(members)


def encode(visual, text, tar, **settings):
    documents, quarantined, _ = encode_tar(visual, text, tar, **{"batch_size": 4, "max_pixels": 100_000, **settings})
    return documents, quarantined


def test_a_document_per_caption_shares_the_codes_of_its_image(visual, text, tar):
    documents, _ = encode(visual, text, tar)
    assert [(document.key, document.caption_index) for document in documents] == [(f"k{i}", j) for i in range(7) for j in range(2)]
    for first, second in zip(documents[::2], documents[1::2], strict=True):
        assert first.segments[0] == second.segments[0]
        kinds = [kind for kind, _ in first.segments]
        codes, caption = (ids for _, ids in first.segments)
        assert kinds == [IMAGE, TEXT]
        assert len(codes) == np.unpackbits(np.frombuffer(first.keep_mask, np.uint8)).sum()
        assert 0 <= min(codes) <= max(codes) < 64
        assert text.decode(caption) == "a red thing"
        assert first.source == second.source
        assert tar.read_bytes()[first.source[1] :][: first.source[2]].startswith(b"\xff\xd8")
    assert documents[2].scores == {"similarity": 1.3, "width": 24}


def test_bad_samples_are_written_down_with_their_reason(visual, text, tar):
    _, quarantined = encode(visual, text, tar)
    assert {record.key: record.reason for record in quarantined} == {
        "bad": "web_page",
        "bomb": "image_bomb",
        "mute": "empty_caption",
    }
    assert {record.key: record.stage for record in quarantined}["bad"] == "pretokenize"
    assert all(record.sha256 for record in quarantined if record.key != "mute")


@pytest.mark.parametrize("seed", [0, None])
@pytest.mark.parametrize("frozen", [False, True])
def test_batches_change_nothing(visual, text, tar, seed, frozen):
    if frozen:
        visual = freeze_for_inference(copy.deepcopy(visual))
    whole = encode(visual, text, tar, seed=seed, batch_size=64)
    for batch_size in (1, 3, 7):
        assert encode(visual, text, tar, seed=seed, batch_size=batch_size) == whole


@pytest.mark.parametrize("frozen", [False, True])
def test_the_order_changes_nothing(visual, text, jpeg, write_tar, frozen):
    if frozen:
        visual = freeze_for_inference(copy.deepcopy(visual))
    pairs = [[(f"k{i}.jpg", jpeg((15 * i, 200 - 9 * i, 80))), (f"k{i}.txt", b"a red thing")] for i in range(16)]
    encoded = []
    for order in (range(16), np.random.default_rng(0).permutation(16)):
        documents, _ = encode(visual, text, write_tar([member for place in order for member in pairs[place]]), batch_size=5)
        encoded.append({document.key: (document.segments, document.keep_mask) for document in documents})
    assert len(encoded[0]) == 16
    assert encoded[0] == encoded[1]


def test_the_seed_chooses_the_patches(visual, text, tar):
    masks = [[document.keep_mask for document in encode(visual, text, tar, seed=seed)[0]] for seed in (0, 1, None)]
    assert len({tuple(of_seed) for of_seed in masks}) == 3


def test_a_tar_without_pairs_gives_no_documents(visual, text, write_tar):
    assert encode(visual, text, write_tar([])) == ([], [])


def test_filters_leave_out_what_is_not_wanted_and_say_by_which_rule(visual, text, tar):
    rules = {"similarity": FilterRule(min=2.0), "image_shorter_side": FilterRule(max=24)}
    documents, quarantined, filtered = encode_tar(visual, text, tar, max_pixels=100_000, rules=rules)
    assert [document.key for document in documents] == [f"k{i}" for i in range(2, 7) for _ in range(2)]
    assert filtered == ["similarity"] * 4  # two are not alike enough, and two .txt have no such number
    assert {record.key for record in quarantined} == {"mute"}
    wide = encode_tar(visual, text, tar, max_pixels=200_000, rules={"image_width": FilterRule(max=100)})
    assert wide[2] == ["image_width"]
