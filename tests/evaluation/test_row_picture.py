"""A row that is seen is the row that is trained on, and its picture has the colours of its slots."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from lavit_dist.config.documents import DocumentsConfig
from lavit_dist.data.global_batches import GlobalBatches
from lavit_dist.data.manifest import load_manifest
from lavit_dist.data.micro_batch import PADDING_DOCUMENT
from lavit_dist.data.mixed_rows import MixedRows
from lavit_dist.data.mixture import Asked
from lavit_dist.data.rows import RowDataset
from lavit_dist.data.seen_rows import Loss, Slot, see_row
from lavit_dist.evaluation.panels import LINE
from lavit_dist.evaluation.row_picture import (
    LOSSES,
    MARGIN,
    SLOTS,
    STRIP_HEIGHT,
    WIDTH,
    StripLayout,
    document_colour,
    draw_row,
    draw_strips,
)
from lavit_dist.evaluation.row_words import describe_document, describe_row, shortened
from lavit_dist.models.vocabulary import Vocabulary

VOCABULARY = Vocabulary(50, 70)
EOS = 0
ROWS_PER_STEP = 3


def open_batches(folder, seq_len, **policy) -> GlobalBatches:
    rows = RowDataset(load_manifest(folder), VOCABULARY, EOS, seq_len, 1, 0.3, DocumentsConfig(**policy), min_block_documents=16)
    return GlobalBatches(rows, ROWS_PER_STEP)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, write_id_set):
    folder = tmp_path_factory.mktemp("ids")
    random = np.random.default_rng(2)
    write_id_set(folder, [random.integers((5, 3), (40, 25), size=(size, 2)).tolist() for size in (40, 30)])
    return folder


@pytest.fixture(params=[{}, {"supervise": "second"}, {"too_long": "split"}, {"image_loss_weight": 0.0}], ids=str)
def batches(folder, request):
    return open_batches(folder, 64, **request.param)


def kind_of(token: int) -> Slot:
    if token == EOS:
        return Slot.EOS
    if token >= VOCABULARY.code_offset:
        return Slot.CODE
    return Slot.IMAGE_MARK if token in (VOCABULARY.image_start, VOCABULARY.image_end) else Slot.TEXT


def test_what_is_seen_is_what_a_step_trains_on(batches):
    for step in range(9):
        whole = batches.micro_batches(step, 0, 1, ROWS_PER_STEP)[0]
        for index in range(ROWS_PER_STEP):
            tokens, _, _, ids, modality, weight = (tensor[index] for tensor in dataclasses.astuple(whole))
            row = see_row(batches, step * ROWS_PER_STEP + index)
            assert row.step == step and row.source == "ids"
            assert torch.equal(torch.from_numpy(row.document_ids), ids)
            expected = [
                Slot.PADDING if int(owner) == PADDING_DOCUMENT else kind_of(int(token))
                for token, owner in zip(tokens, ids, strict=True)
            ]
            assert row.slots.tolist() == expected
            assert torch.equal(torch.from_numpy(row.losses) > Loss.NONE, weight > 0)
            assert torch.equal(torch.from_numpy(row.losses) == Loss.IMAGE, (weight > 0) & (modality == 1))
            assert row.num_padding == int((ids == PADDING_DOCUMENT).sum())
            for number, document in enumerate(row.documents):
                assert document.tokens.tolist() == tokens[ids == number].tolist()
                assert document.num_supervised == int((weight[ids == number] > 0).sum())


def test_each_document_is_told_with_where_it_comes_from(folder):
    batches = open_batches(folder, 64)
    dataset = batches.rows.sources["ids"]
    orders = set()
    for number in range(20):
        for document in see_row(batches, number).documents:
            shard = dataset.shards[[record.name for record in dataset.manifest.shards].index(document.shard)]
            assert shard.value("key", document.index) == document.key
            (_, codes), (_, text) = shard.segments(document.index)
            image = [VOCABULARY.image_start, *(codes.astype(int) + VOCABULARY.code_offset), VOCABULARY.image_end]
            parts = {"image": image, "text": text.tolist()}
            assert document.tokens.tolist() == [*(token for part in document.order for token in parts[part]), EOS]
            assert document.drops_caption == (document.order == ("image",))
            assert document.image is not None and document.image.shard == "00000.tar"
            orders.add(document.order)
    assert orders == {("image",), ("image", "text"), ("text", "image")}


@pytest.mark.parametrize("seq_len", [64, 500, 704, 705, 2048])
def test_every_slot_has_its_colour_in_each_strip(folder, seq_len):
    row = see_row(open_batches(folder, seq_len, supervise="second"), 1)
    layout = StripLayout(seq_len)
    assert layout.scale >= 2 and layout.slots_per_line * layout.num_lines >= seq_len
    picture = draw_strips(row)
    assert picture.size == (WIDTH, layout.height)
    pixels = np.asarray(picture)
    expected = zip(
        [document_colour(number) for number in row.document_ids.tolist()],
        [SLOTS[Slot(kind)] for kind in row.slots.tolist()],
        [LOSSES[Loss(kind)] for kind in row.losses.tolist()],
        strict=True,
    )
    for slot, colours in enumerate(expected):
        for strip, colour in enumerate(colours):
            left, top = layout.corner(slot, strip)
            for x in (left, left + layout.scale - 1):
                assert tuple(pixels[top + 1, x]) == tuple(pixels[top + STRIP_HEIGHT - 2, x]) == colour, (slot, strip)
        assert left + layout.scale <= WIDTH - MARGIN


def test_neighbouring_documents_differ_in_colour():
    assert all(document_colour(number) != document_colour(number + 1) for number in range(40))
    assert document_colour(PADDING_DOCUMENT) == LINE


def test_the_picture_has_a_card_for_each_document_and_its_picture_on_it(folder):
    row = see_row(open_batches(folder, 64), 0)
    texts = ["words"] * len(row.documents)
    red = Image.new("RGB", (300, 300), (255, 0, 0))
    pixels = np.asarray(draw_row(row, texts, [red] * len(row.documents)))
    bare = np.asarray(draw_row(row, texts, [None] * len(row.documents)))
    assert pixels.shape == bare.shape and pixels.shape[1] == WIDTH
    assert (pixels == (255, 0, 0)).all(-1).sum() == len(row.documents) * 104 * 104
    assert not (bare == (255, 0, 0)).all(-1).any()
    noted = draw_row(row, texts, [None] * len(row.documents), "no pictures")
    assert noted.height > bare.shape[0]


def test_a_row_of_more_documents_than_a_picture_has_room_for(tmp_path, write_id_set):
    write_id_set(tmp_path, [[(1, 1)] * 200])
    row = see_row(open_batches(tmp_path, 600), 0)
    assert len(row.documents) > 100
    assert draw_row(row, ["words"] * len(row.documents), [None] * len(row.documents)).height < 5000


def test_codes_are_counted_and_text_is_decoded():
    start, end, code = VOCABULARY.image_start, VOCABULARY.image_end, VOCABULARY.code_offset

    def words(*tokens: int) -> str:
        return shortened(np.array(tokens), VOCABULARY, EOS, lambda ids: " " + "".join(chr(96 + token) for token in ids))

    assert words(start, code, code + 69, code, end, 8, 9, EOS) == "[IMG] 3 codes [/IMG] hi [EOS]"
    assert words(8, 9, start, code, end, EOS) == "hi [IMG] 1 code [/IMG] [EOS]"
    assert words(start, end, start, code, code, end, EOS) == "[IMG] [/IMG] [IMG] 2 codes [/IMG] [EOS]"
    assert words(8) == "h"


def test_the_words_of_a_row_add_up(folder):
    row = see_row(open_batches(folder, 64), 4)
    filled = sum(len(document.tokens) for document in row.documents)
    assert describe_row(row).startswith(f"Row 4: step 1, epoch 0 of ids; {len(row.documents)} document")
    assert f", {filled} of 64 slots, padding {1 - filled / 64:.1%};" in describe_row(row)
    document = dataclasses.replace(row.documents[0], order=("image",), drops_caption=True, first_token=7)
    assert describe_document(document).startswith("image, caption dropped, from its token 7 on; ")


def test_a_source_in_a_mixture_is_named(folder, tmp_path, write_id_set):
    write_id_set(tmp_path, [[(9, 5)] * 30])
    rows = {name: open_batches(place, 64).rows.sources["ids"] for name, place in (("fine", tmp_path), ("pairs", folder))}
    batches = GlobalBatches(MixedRows(rows, [Asked(0, {"fine": 1.0, "pairs": 2.0})]), ROWS_PER_STEP)
    seen = [see_row(batches, number) for number in range(12)]
    assert [row.source for row in seen].count("fine") == 4
    for row in seen:
        alone = see_row(GlobalBatches(rows[row.source], ROWS_PER_STEP), row.source_row)
        assert np.array_equal(alone.slots, row.slots)
        assert [document.key for document in alone.documents] == [document.key for document in row.documents]
