"""What pretraining makes of its settings `ids`, `sources` and `weigh_by`."""

from collections import Counter

import pytest

from lavit_dist.config.base import build
from lavit_dist.config.pretrain import PretrainConfig
from lavit_dist.data.manifest import load_manifest
from lavit_dist.data.rows import RowDataset
from lavit_dist.data.text_tokenizer import TextTokenizer
from lavit_dist.errors import UserError
from pipelines.pretrain import open_batches


@pytest.fixture
def sets(pretrain_settings, tmp_path, write_id_set):
    """Folders of documents of about 14 and 44 tokens."""
    text = TextTokenizer.load(pretrain_settings["text_tokenizer"])
    for name, codes in (("short", 5), ("long", 35)):
        shards = [[(codes + index % 5, 4) for index in range(300)]]
        write_id_set(tmp_path / name, shards, text_vocab_size=text.vocab_size, text_tokenizer=text.digest)
    return {name: {"ids": str(tmp_path / name)} for name in ("short", "long")}


def batches_of(settings, sets, **changes):
    return open_batches(
        build(PretrainConfig, settings | {"run_dir": "run", "ids": None, "sources": sets, "total_steps": 50} | changes)
    )


def test_the_short_form_has_the_rows_of_its_set_under_the_seed_of_the_run(pretrain_settings):
    mixed = batches_of(pretrain_settings, {}, ids=pretrain_settings["ids"], seed=7).rows
    alone = RowDataset(load_manifest(pretrain_settings["ids"]), mixed.vocabulary, mixed.eos_id, 128, 7, 0.1)
    for row in range(60):
        assert [tokens.tolist() for tokens in mixed.row_tokens(row)] == [tokens.tolist() for tokens in alone.row_tokens(row)]


def test_sources_have_seeds_of_their_own_which_hang_on_their_names_alone(pretrain_settings, sets):
    first = batches_of(pretrain_settings, sets).rows.sources
    second = batches_of(pretrain_settings, dict(reversed(sets.items())) | {"ids": sets["long"]}).rows.sources
    assert {name: second[name].plan_digest for name in first} == {name: first[name].plan_digest for name in first}
    assert len({rows.seed for rows in second.values()}) == 3
    assert second["ids"].seed == 0


@pytest.mark.parametrize("weigh_by", ["tokens", "documents"])
def test_weights_are_shares_of_tokens_or_documents(pretrain_settings, sets, weigh_by):
    weighted = {"short": sets["short"] | {"weight": 1}, "long": sets["long"] | {"weight": 3}}
    rows = batches_of(pretrain_settings, weighted, weigh_by=weigh_by).rows
    counts = {"tokens": Counter(), "documents": Counter()}
    for row in range(400):
        source, _ = rows.mixture.locate(row)
        documents = rows.row_tokens(row)
        counts["tokens"][source] += sum(map(len, documents))
        counts["documents"][source] += len(documents)
    found = {name: count["short"] / count.total() for name, count in counts.items()}
    assert found[weigh_by] == pytest.approx(0.25, abs=0.05)  # rows of either are not quite full
    assert all(abs(found[other] - 0.25) > 0.1 for other in found if other != weigh_by)


def test_the_ids_of_every_source_are_checked(pretrain_settings, sets, tmp_path, write_id_set):
    write_id_set(tmp_path / "foreign", [[(5, 4)]], text_tokenizer="another")
    with pytest.raises(UserError, match="foreign were made with the text_tokenizer another"):
        batches_of(pretrain_settings, sets | {"foreign": {"ids": str(tmp_path / "foreign")}})
