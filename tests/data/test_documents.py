"""What an epoch makes of a document: a function of seed, epoch and document, and as long as packing thought."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lavit_dist.data.document_tokens import write_tokens
from lavit_dist.data.documents import caption_dropped, text_first
from lavit_dist.data.id_shard import IMAGE, TEXT, Encoding, IdDocument, IdShard
from lavit_dist.data.id_shard_writer import write_id_shard
from lavit_dist.data.spans import Spans
from lavit_dist.models.vocabulary import Vocabulary
from tests.data.plain_documents import arrange, to_tokens

VOCABULARY = Vocabulary(50, 70)
EOS = 1
PAIR = [(IMAGE, [3, 69]), (TEXT, [7, 8, 9])]
IMAGE_TOKENS = [50, 55, 121, 51]
UNTOUCHED = -1
SEGMENTS = st.lists(st.tuples(st.sampled_from([TEXT, IMAGE]), st.lists(st.integers(0, 49), max_size=6)), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def shard_of(tmp_path_factory):
    """`shard_of(documents, vocabulary)`: an id shard of documents that are lists of segments."""

    def write(documents, vocabulary=VOCABULARY):
        path = tmp_path_factory.mktemp("shard") / "shard-00000.arrow"
        made = [IdDocument(str(index), 0, segments, b"", "", ("tar", 0, 0)) for index, segments in enumerate(documents)]
        encoding = Encoding("v", "t", "p", "s", vocabulary.text_size, vocabulary.codebook_size)
        write_id_shard(path, made, encoding=encoding, inputs=())
        return IdShard(path)

    return write


def spans_of(shard, *, text_leads, drops_caption, starts=None, lengths=None, documents=None):
    """Whole documents unless said otherwise."""
    documents = np.arange(len(shard)) if documents is None else documents
    text_leads, drops_caption = (np.broadcast_to(column, len(documents)).copy() for column in (text_leads, drops_caption))
    if lengths is None:
        arranged = zip(map(shard.segments, documents), text_leads, drops_caption, strict=True)
        lengths = np.array([len(plain_tokens(*document)) for document in arranged])
    zeros = np.zeros(len(documents), np.int64)
    return Spans(documents, text_leads, drops_caption, zeros if starts is None else starts, lengths, zeros, zeros)


def tokens_of(shard, *, vocabulary=VOCABULARY, **spans):
    """The tokens of spans, each written apart from the others."""
    spans = spans_of(shard, **spans)
    places = np.cumsum(spans.lengths + 1) - spans.lengths
    out = np.full(spans.lengths.sum() + len(spans) + 1, UNTOUCHED)
    write_tokens(out, places, shard, spans, vocabulary=vocabulary, eos_id=EOS)
    between = np.ones(len(out), bool)
    for place, length in zip(places, spans.lengths, strict=True):
        between[place : place + length] = False
    assert np.all(out[between] == UNTOUCHED)
    return [out[place : place + length].tolist() for place, length in zip(places, spans.lengths, strict=True)]


@pytest.mark.parametrize(
    ("text_leads", "drops_caption", "expected"),
    [
        (False, False, [*IMAGE_TOKENS, 7, 8, 9, EOS]),
        (True, False, [7, 8, 9, *IMAGE_TOKENS, EOS]),
        (False, True, [*IMAGE_TOKENS, EOS]),
        (True, True, [*IMAGE_TOKENS, EOS]),
    ],
)
@pytest.mark.parametrize("stored", [PAIR, PAIR[::-1]])
def test_a_pair(shard_of, stored, text_leads, drops_caption, expected):
    assert tokens_of(shard_of([stored]), text_leads=text_leads, drops_caption=drops_caption) == [expected]


@pytest.mark.parametrize(
    ("segments", "expected"),
    [
        ([(TEXT, [7])], [7, EOS]),
        ([PAIR[0]], [*IMAGE_TOKENS, EOS]),
        ([*PAIR, (TEXT, [4])], [*IMAGE_TOKENS, 7, 8, 9, 4, EOS]),
        ([PAIR[0], PAIR[0]], [*IMAGE_TOKENS, *IMAGE_TOKENS, EOS]),
        ([(TEXT, [7]), (TEXT, [8])], [7, 8, EOS]),
    ],
)
def test_other_documents_stay_as_they_are(shard_of, segments, expected):
    assert tokens_of(shard_of([segments]), text_leads=True, drops_caption=True) == [expected]


@pytest.mark.parametrize("codebook_size", [65536, 70000])
def test_codes_of_the_largest_codebook_do_not_wrap_around(shard_of, codebook_size):
    vocabulary = Vocabulary(32000, codebook_size)
    shard = shard_of([[(IMAGE, [codebook_size - 1])]], vocabulary)
    tokens = tokens_of(shard, text_leads=False, drops_caption=False, vocabulary=vocabulary)
    assert tokens == [[32000, 32002 + codebook_size - 1, 32001, EOS]]


@given(st.lists(st.tuples(SEGMENTS, st.booleans(), st.booleans()), min_size=1, max_size=8))
def test_documents_of_any_segments_are_written_side_by_side(shard_of, documents):
    segments, text_leads, drops_caption = zip(*documents, strict=True)
    shard = shard_of(segments)
    for found, *document in zip(
        tokens_of(shard, text_leads=text_leads, drops_caption=drops_caption), *zip(*documents, strict=True), strict=True
    ):
        assert found == plain_tokens(*document)


def plain_tokens(segments, text_leads, drops_caption):
    return to_tokens(arrange(segments, text_leads=text_leads, drop_caption=drops_caption), VOCABULARY, EOS)


@given(SEGMENTS, st.booleans(), st.booleans(), st.data())
def test_pieces_joined_are_the_document(shard_of, segments, text_leads, drops_caption, data):
    shard = shard_of([segments])
    whole = plain_tokens(segments, text_leads, drops_caption)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(whole) - 1)) if len(whole) > 1 else st.just(set())))
    starts = np.array([0, *cuts])
    lengths = np.diff([*starts, len(whole)])
    pieces = tokens_of(
        shard,
        text_leads=text_leads,
        drops_caption=drops_caption,
        starts=starts,
        lengths=lengths,
        documents=np.zeros(len(starts), np.int64),
    )
    assert [token for piece in pieces for token in piece] == whole


def test_a_document_of_another_length_than_planned_is_refused(shard_of):
    shard = shard_of([PAIR, PAIR])
    with pytest.raises(ValueError, match="document 1 of a shard does not have the tokens 0 to 9"):
        tokens_of(shard, text_leads=False, drops_caption=False, lengths=np.array([8, 9]))


def test_half_of_the_pairs_lead_with_text_and_the_given_share_loses_its_caption():
    hashes = np.arange(10**5, dtype=np.uint64)
    assert text_first(hashes, 0, 0).mean() == pytest.approx(0.5, abs=0.01)
    dropped = caption_dropped(hashes, 0, 0, 0.1)
    assert dropped.mean() == pytest.approx(0.1, abs=0.005)
    assert text_first(hashes, 0, 0)[dropped].mean() == pytest.approx(0.5, abs=0.02)  # one choice says nothing of the other
    assert np.mean(text_first(hashes, 0, 0) == text_first(hashes, 0, 1)) == pytest.approx(0.5, abs=0.01)
