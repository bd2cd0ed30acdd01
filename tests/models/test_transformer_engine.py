"""What Transformer Engine is given and how its result is read, with a stand-in that computes what its documentation says."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lavit_dist.errors import UserError
from lavit_dist.models.packed_attention import PackedDocuments, packed_attention
from lavit_dist.models.transformer_engine import TransformerEngineAttention, check_transformer_engine

STAND_IN = """
import torch
import torch.nn.functional as F

class DotProductAttention(torch.nn.Module):
    def __init__(self, num_attention_heads, kv_channels, num_gqa_groups, attention_dropout, qkv_format, attn_mask_type):
        super().__init__()
        assert (attention_dropout, qkv_format, attn_mask_type) == (0.0, "thd", "padding_causal")
        self.sizes = num_attention_heads, num_gqa_groups, kv_channels

    def forward(self, query, key, value, *, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv):
        assert (query.shape[1], key.shape[1], query.shape[2]) == self.sizes and cu_seqlens_q.dtype == torch.int32
        assert max_seqlen_q == max_seqlen_kv == int((cu_seqlens_q[1:] - cu_seqlens_q[:-1]).max())
        outs = []
        for start, end in zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_kv[1:].tolist()):
            q, k, v = (of[start:end].transpose(0, 1)[None] for of in (query, key, value))
            outs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
        return torch.cat(outs).flatten(1)
"""


@pytest.fixture
def transformer_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The stand-in, importable as Transformer Engine."""
    (tmp_path / "transformer_engine" / "pytorch").mkdir(parents=True)
    (tmp_path / "transformer_engine" / "__init__.py").touch()
    (tmp_path / "transformer_engine" / "pytorch" / "__init__.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "transformer_engine"]:
        del sys.modules[name]


@pytest.mark.usefixtures("transformer_engine")
def test_its_attention_is_ours() -> None:
    document_ids = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2], [5, 5, 5, 5, 5, 5, 6, -1]])
    documents = PackedDocuments.of(document_ids)
    query, key, value = torch.randn(8, 2, 4, 16), torch.randn(8, 2, 2, 16), torch.randn(8, 2, 2, 16)
    out = TransformerEngineAttention(4, 2, 16)(query, key, value, documents)
    torch.testing.assert_close(out, packed_attention(query, key, value, documents))


@pytest.mark.usefixtures("transformer_engine")
def test_it_is_refused_where_it_cant_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="needs a GPU"):
        check_transformer_engine("bf16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_transformer_engine("bf16")
    with pytest.raises(UserError, match="precision bf16"):
        check_transformer_engine("fp32")


def test_it_is_refused_where_it_isnt_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match=r"pip install 'transformer_engine\[pytorch\]'.*set attention to torch"):
        check_transformer_engine("bf16")
