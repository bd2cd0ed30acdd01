"""Every id has one meaning, and the released model's numbers come out."""

from hypothesis import given
from hypothesis import strategies as st

from lavit_dist.models.vocabulary import Vocabulary


def test_lavit_7b():
    vocabulary = Vocabulary(text_size=32000, codebook_size=16384)
    assert (vocabulary.image_start, vocabulary.image_end, vocabulary.code_offset) == (32000, 32001, 32002)
    assert vocabulary.size == 48386
    assert [table.padded_size for table in vocabulary.tables] == [32000, 16512]


@given(st.integers(1, 10**5), st.integers(1, 10**5))
def test_ids_cover_the_range_without_overlap(text_size, codebook_size):
    vocabulary = Vocabulary(text_size, codebook_size)
    parts = [range(text_size), [vocabulary.image_start], [vocabulary.image_end]]
    parts.append(range(vocabulary.code_offset, vocabulary.code_offset + codebook_size))
    assert [part[0] for part in parts] == [0, *(part[-1] + 1 for part in parts[:-1])]
    assert parts[-1][-1] == vocabulary.size - 1


@given(st.integers(1, 10**5), st.integers(1, 10**5))
def test_tables_cover_the_ids_and_can_be_shared_out(text_size, codebook_size):
    vocabulary = Vocabulary(text_size, codebook_size)
    text, visual = vocabulary.tables
    assert (text.first_id, visual.first_id) == (0, vocabulary.image_start)
    assert text.size + visual.size == vocabulary.size
    for table in (text, visual):
        assert table.padded_size % 128 == 0
        assert 0 <= table.padded_size - table.size < 128
