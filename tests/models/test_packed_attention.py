"""Packed attention equals attention to each document by itself."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from lavit_dist.models.packed_attention import PackedDocuments, packed_attention

SEQ = 24


def rows_of(lengths_per_row: list[list[int]]) -> torch.Tensor:
    """Document ids [batch, seq] of rows that hold documents of these lengths; the rest of a row is padding, -1."""
    rows = []
    for lengths in lengths_per_row:
        ids = [document for document, length in enumerate(lengths) for _ in range(length)][:SEQ]
        rows.append(ids + [-1] * (SEQ - len(ids)))
    return torch.tensor(rows, dtype=torch.int32)


def separately(query, key, value, document_ids):
    """The definition: every run of equal ids attends causally to itself alone."""
    seq, batch, heads, channels = query.shape
    repeat = heads // key.shape[2]
    out = torch.empty(seq, batch, heads * channels)
    for row in range(batch):
        _, lengths = torch.unique_consecutive(document_ids[row], return_counts=True)
        start = 0
        for length in lengths.tolist():
            q, k, v = (t[start : start + length, row].transpose(0, 1) for t in (query, key, value))
            k, v = k.repeat_interleave(repeat, 0), v.repeat_interleave(repeat, 0)
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            out[start : start + length, row] = attended.transpose(0, 1).flatten(1)
            start += length
    return out


@given(st.lists(st.lists(st.integers(1, SEQ), min_size=1, max_size=6), min_size=1, max_size=3), st.sampled_from([1, 2, 4]))
def test_a_document_attends_only_to_itself(lengths, groups):
    document_ids = rows_of(lengths)
    generator = torch.Generator().manual_seed(0)
    shape = (SEQ, len(lengths), 4, 8)
    query = torch.randn(shape, generator=generator, requires_grad=True)
    key, value = (torch.randn(*shape[:2], groups, 8, generator=generator, requires_grad=True) for _ in range(2))
    packed = packed_attention(query, key, value, PackedDocuments.of(document_ids))
    expected = separately(query, key, value, document_ids)
    torch.testing.assert_close(packed, expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn(packed.shape, generator=generator)
    for ours, theirs in zip(
        torch.autograd.grad((packed * weights).sum(), (query, key, value)),
        torch.autograd.grad((expected * weights).sum(), (query, key, value)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_every_position_is_found_once():
    documents = PackedDocuments.of(rows_of([[3, 9, 1], [SEQ], [12]]))
    flat = torch.cat([bucket.flatten() for bucket in documents.buckets])
    assert torch.equal(flat[documents.unpack], torch.arange(3 * SEQ))
    assert documents.cumulative_lengths.tolist() == [0, 3, 12, 13, 24, 48, 60, 72]
    assert documents.max_length == SEQ


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the variable-length kernel runs on GPUs")
def test_the_variable_length_kernel_agrees():
    document_ids = rows_of([[5, 7, 2], [SEQ]]).cuda()
    query, key, value = (torch.randn(SEQ, 2, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    documents = PackedDocuments.of(document_ids)
    exact = packed_attention(query.float(), key.float(), value.float(), documents)
    torch.testing.assert_close(packed_attention(query, key, value, documents).float(), exact, rtol=2e-2, atol=2e-2)
