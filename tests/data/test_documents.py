"""What an epoch makes of a document: a function of seed, epoch and document, and as long as the table says."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lavit_dist.data.documents import DocumentTable, arrange, caption_dropped, text_first, to_tokens
from lavit_dist.data.id_shard import IMAGE, TEXT, IdDocument, IdShard
from lavit_dist.models.vocabulary import Vocabulary

VOCABULARY = Vocabulary(50, 70)
EOS = 1
CODES, CAPTION = np.array([3, 69], np.uint16), np.array([7, 8, 9], np.uint16)
PAIR = [(IMAGE, CODES), (TEXT, CAPTION)]
IMAGE_TOKENS = [50, 55, 121, 51]


@pytest.mark.parametrize(
    ("text_leads", "drop_caption", "expected"),
    [
        (False, False, [*IMAGE_TOKENS, 7, 8, 9, EOS]),
        (True, False, [7, 8, 9, *IMAGE_TOKENS, EOS]),
        (False, True, [*IMAGE_TOKENS, EOS]),
        (True, True, [*IMAGE_TOKENS, EOS]),
    ],
)
@pytest.mark.parametrize("stored", [PAIR, PAIR[::-1]])
def test_a_pair(stored, text_leads, drop_caption, expected):
    arranged = arrange(stored, text_leads=text_leads, drop_caption=drop_caption)
    assert to_tokens(arranged, VOCABULARY, EOS).tolist() == expected


@pytest.mark.parametrize("segments", [[(TEXT, CAPTION)], [(IMAGE, CODES)], [*PAIR, (TEXT, CAPTION)], [PAIR[0], PAIR[0]]])
def test_other_documents_stay_as_they_are(segments):
    assert arrange(segments, text_leads=True, drop_caption=True) == segments


def test_codes_of_the_largest_codebook_do_not_wrap_around():
    tokens = to_tokens([(IMAGE, np.array([65535], np.uint16))], Vocabulary(32000, 65536), EOS)
    assert tokens.tolist() == [32000, 32002 + 65535, 32001, EOS]


def test_half_of_the_pairs_lead_with_text_and_the_given_share_loses_its_caption():
    hashes = np.arange(10**5, dtype=np.uint64)
    assert text_first(hashes, 0, 0).mean() == pytest.approx(0.5, abs=0.01)
    dropped = caption_dropped(hashes, 0, 0, 0.1)
    assert dropped.mean() == pytest.approx(0.1, abs=0.005)
    assert text_first(hashes, 0, 0)[dropped].mean() == pytest.approx(0.5, abs=0.02)  # one choice says nothing of the other
    assert np.mean(text_first(hashes, 0, 0) == text_first(hashes, 0, 1)) == pytest.approx(0.5, abs=0.01)


SEGMENTS = st.lists(st.tuples(st.sampled_from([TEXT, IMAGE]), st.lists(st.integers(0, 49), max_size=6)), min_size=1, max_size=4)


@given(st.lists(SEGMENTS, min_size=1, max_size=6))
def test_the_table_knows_the_length_of_every_document(tmp_path_factory, write_documents, documents):
    folder = tmp_path_factory.mktemp("shard")
    write_documents(folder, [[IdDocument(str(n), 0, segments, b"", "", ("tar", 0, 0)) for n, segments in enumerate(documents)]])
    shard = IdShard(folder / "shard-00000.arrow")
    table = DocumentTable.of([shard])
    assert [len(to_tokens(shard.segments(n), VOCABULARY, EOS)) for n in range(len(documents))] == table.full_lengths.tolist()


@given(SEGMENTS)
def test_tokens_read_back_are_the_segments(segments):
    given_segments = [(kind, np.array(ids, np.uint16)) for kind, ids in segments]
    tokens = to_tokens(given_segments, VOCABULARY, EOS).tolist()
    assert tokens.pop() == EOS
    found: list[tuple[int, list[int]]] = []
    for token in tokens:
        if token == VOCABULARY.image_start:
            found.append((IMAGE, []))
        elif token == VOCABULARY.image_end:
            found.append((TEXT, []))  # what follows, if anything does
        elif token > VOCABULARY.image_end:
            found[-1][1].append(token - VOCABULARY.code_offset)
        else:
            found = found or [(TEXT, [])]
            found[-1][1].append(token)
    assert without_empty_text(joined_text(found)) == without_empty_text(joined_text(segments))


def joined_text(segments):
    """Tokens don't tell where one text ends and the next begins."""
    joined: list[tuple[int, list[int]]] = []
    for kind, ids in segments:
        if kind == TEXT and joined and joined[-1][0] == TEXT:
            joined[-1][1].extend(ids)
        else:
            joined.append((kind, list(ids)))
    return joined


def without_empty_text(segments):
    return [segment for segment in segments if segment != (TEXT, [])]
