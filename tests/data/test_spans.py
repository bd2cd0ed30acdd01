"""The spans of an epoch: they cover each document, fit rows, never cut an image, and know from columns alone which tokens have a loss."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lavit_dist.config.documents import DocumentsConfig
from lavit_dist.data.documents import full_lengths
from lavit_dist.data.id_shard import IMAGE, TEXT, IdDocument, IdShard
from lavit_dist.data.spans import IMAGE_EXTRAS, Spans, epoch_spans, usable
from lavit_dist.models.vocabulary import Vocabulary
from tests.data.plain_documents import arrange, to_tokens

VOCABULARY = Vocabulary(50, 70)
EOS = 0
TEXT_IDS = st.lists(st.integers(1, 49), max_size=30)
CODES = st.lists(st.integers(0, 69), max_size=9)
SEGMENT = st.one_of(st.tuples(st.just(TEXT), TEXT_IDS), st.tuples(st.just(IMAGE), CODES))
DOCUMENTS = st.lists(st.lists(SEGMENT, min_size=1, max_size=5), min_size=1, max_size=8)
SEED, EPOCH, CAPTION_DROPOUT = 3, 2, 0.3


@pytest.fixture(scope="session")
def shard_of(tmp_path_factory, write_documents):
    """`shard_of(documents)`: a shard of the documents with these segments."""

    def make(documents) -> IdShard:
        folder = tmp_path_factory.mktemp("ids")
        write_documents(folder, [[IdDocument(str(n), 0, each, b"", "", ("tar", n, 0)) for n, each in enumerate(documents)]])
        return IdShard(folder / "shard-00000.arrow")

    return make


def spans_of(shard: IdShard, seq_len: int, **policy: str) -> Spans:
    config = DocumentsConfig(**policy)
    can_be = usable(shard, full_lengths(shard), seq_len, config.too_long)
    return epoch_spans(shard, can_be, config, seq_len=seq_len, seed=SEED, epoch=EPOCH, caption_dropout=CAPTION_DROPOUT)


def arranged(shard: IdShard, spans: Spans, index: int):
    leads, drops = bool(spans.text_leads[index]), bool(spans.drops_caption[index])
    return arrange(shard.segments(int(spans.documents[index])), text_leads=leads, drop_caption=drops)


@given(DOCUMENTS, st.integers(1, 40))
def test_pieces_cover_their_document_and_never_cut_an_image(shard_of, documents, seq_len):
    shard = shard_of(documents)
    spans = spans_of(shard, seq_len, too_long="split")
    assert (np.diff(spans.documents) >= 0).all()
    for document, of_document in itertools.groupby(range(len(spans)), lambda index: spans.documents[index]):
        indices = list(of_document)
        tokens = to_tokens(arranged(shard, spans, indices[0]), VOCABULARY, EOS)
        pieces = [tokens[spans.starts[index] : spans.starts[index] + spans.lengths[index]] for index in indices]
        assert list(itertools.chain(*pieces)) == tokens, document
        assert len(pieces) == 1 or len(tokens) > seq_len
        assert all(0 < len(piece) <= seq_len for piece in pieces)
        assert [EOS in piece for piece in pieces] == [False] * (len(pieces) - 1) + [True]
        assert len(pieces) == 1 or len(pieces[-1]) > 1
        for piece in pieces:
            borders = [token for token in piece if token in (VOCABULARY.image_start, VOCABULARY.image_end)]
            assert borders == [VOCABULARY.image_start, VOCABULARY.image_end] * (len(borders) // 2)
            assert not len(borders) or piece[0] <= VOCABULARY.image_start


@given(DOCUMENTS, st.integers(2, 40))
def test_what_is_left_out_is_what_does_not_fit(shard_of, documents, seq_len):
    shard = shard_of(documents)
    lengths = [len(to_tokens(shard.segments(n), VOCABULARY, EOS)) for n in range(len(documents))]
    images = [max((len(ids) for kind, ids in document if kind == IMAGE), default=-IMAGE_EXTRAS) for document in documents]
    for policy in ("drop", "error"):
        dropped = spans_of(shard, seq_len, too_long=policy)
        assert dropped.documents.tolist() == [n for n, length in enumerate(lengths) if length <= seq_len]
        assert not dropped.starts.any()
    split = spans_of(shard, seq_len, too_long="split")
    assert np.unique(split.documents).tolist() == [n for n, codes in enumerate(images) if codes + IMAGE_EXTRAS <= seq_len]


@pytest.mark.parametrize(
    ("document", "lengths"),
    [
        ([(TEXT, [1] * 100)], [40, 40, 21]),
        ([(TEXT, [1] * 79)], [40, 40]),
        ([(TEXT, [1] * 80)], [40, 39, 2]),  # EOS alone would be a piece with nothing to predict
        ([(TEXT, [1] * 40)], [39, 2]),
        ([(TEXT, [1] * 39)], [40]),
        ([(TEXT, [1] * 30), (IMAGE, [2] * 20), (TEXT, [1] * 5)], [30, 28]),  # the image begins a row of its own
        ([(TEXT, [1] * 18), (IMAGE, [2] * 20), (TEXT, [1] * 5)], [40, 6]),
        ([(IMAGE, [2] * 20), (IMAGE, [2] * 16)], [22, 19]),  # EOS goes with the last image
        ([(TEXT, [1] * 40), (TEXT, [])], [39, 2]),
    ],
)
def test_rows_of_40_are_filled_from_the_left(shard_of, document, lengths):
    assert spans_of(shard_of([document]), 40, too_long="split").lengths.tolist() == lengths


def labels_by_hand(segments, supervise):
    """(whether it has a loss behind another token, whether it is of an image) for each token of a document."""
    segments = [segment for segment in segments if segment[0] == IMAGE or len(segment[1])]
    kinds = [kind for kind, _ in segments]
    flags = []
    for number, (kind, ids) in enumerate(segments):
        learned = {
            "all": True,
            "second": number > 0 or len(segments) == 1,
            "generated": kind == TEXT or TEXT in kinds[:number] or TEXT not in kinds,
        }[supervise]
        if kind == IMAGE:
            flags += [(learned, False)] + [(learned, True)] * (len(ids) + 1)
        else:
            flags += [(learned, False)] * len(ids)
    return [*flags, (True, False)]


@pytest.mark.parametrize("supervise", ["all", "second", "generated"])
@given(documents=DOCUMENTS, seq_len=st.integers(2, 60))
def test_spans_know_which_tokens_have_a_loss(shard_of, documents, seq_len, supervise):
    shard = shard_of(documents)
    spans = spans_of(shard, seq_len, too_long="split", supervise=supervise)
    for index in range(len(spans)):
        start, length = int(spans.starts[index]), int(spans.lengths[index])
        flags = labels_by_hand(arranged(shard, spans, index), supervise)[start : start + length]
        learned = [False] + [has_loss for has_loss, _ in flags[1:]]
        assert learned == [place >= spans.given[index] for place in range(length)]
        of_image = sum(has_loss and image for has_loss, (_, image) in zip(learned, flags, strict=True))
        assert spans.labels[index].tolist() == [sum(learned) - of_image, of_image]


@given(st.permutations(range(9)), st.integers(0, 8))
def test_spans_follow_the_order_of_their_documents(order, missing):
    numbers = np.array([n for n in range(9) if n != missing for _ in range(1 + n % 3)])
    spans = Spans(*[numbers] * 3, np.arange(len(numbers)), *[numbers] * 3)
    found = spans[spans.shuffled_by(np.argsort(order))]
    assert found.documents.tolist() == [n for n in order if n != missing for _ in range(1 + n % 3)]
    assert all((np.diff(found.starts[found.documents == n]) > 0).all() for n in order)
