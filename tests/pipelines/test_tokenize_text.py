"""Text corpora become id sets of text alone: whatever the actors and interruptions, and fit to be trained on beside pairs."""

import gzip
import json
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lavit_dist.config.base import build
from lavit_dist.config.pretrain import PretrainConfig
from lavit_dist.config.tokenize_text import TokenizeTextConfig
from lavit_dist.data.corpus_files import list_corpus
from lavit_dist.data.global_batches import GlobalBatches
from lavit_dist.data.id_shard import IdShard, ShardRecord, sidecar_path
from lavit_dist.data.manifest import load_manifest
from lavit_dist.data.quarantine import read_quarantine
from lavit_dist.data.seen_rows import locate_document
from lavit_dist.data.shard_list import Shard
from lavit_dist.data.text_tokenizer import TextTokenizer
from lavit_dist.errors import UserError
from pipelines import inspect_data
from pipelines.pretrain import check_codes, open_batches
from pipelines.tokenize_text import TokenizeTextWorker, describe_encoding, plan_jobs, run
from tests.data.folder_store import FolderStore

WORDS = ["a red circle", "on the left", "of a blue square", "and so on", "grüße 漢字"]
BYTES_PER_SHARD = 4000


def sentence(number: int) -> str:
    return f"{number}: " + " ".join(WORDS[number * step % len(WORDS)] for step in range(number % 17))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Three files: of several shards, with rows that are no good, and cut short."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = [json.dumps({"text": sentence(number), "id": number}) for number in range(60)]
    lines[7:7] = ["{", json.dumps({"id": 1}), json.dumps({"text": "\ud800"}), ""]
    with pa.CompressedOutputStream(str(folder / "a.jsonl.zst"), "zstd") as stream:
        stream.write("\n".join(lines).encode())
    pq.write_table(pa.table({"text": [*map(sentence, range(100, 180)), "", None]}), folder / "b.parquet", row_group_size=30)
    random = np.random.default_rng(0)
    many = "\n".join(json.dumps({"text": f"{random.integers(10**9)}"}) for _ in range(20_000)).encode()
    whole = gzip.compress(many)
    (folder / "c.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    return folder


@pytest.fixture
def settings(corpus, pretrain_settings, tmp_path):
    return {
        "run_dir": str(tmp_path / "text"),
        "corpus": [str(corpus / "a.jsonl.zst"), str(corpus / "b.parquet")],
        "text_tokenizer": pretrain_settings["text_tokenizer"],
        "heldout_fraction": 0.2,
        "min_characters": 8,
        "bytes_per_shard": BYTES_PER_SHARD,
        "ray": {"num_cpus": 2, "num_actors": 2, "object_store_mb": 80},
    }


def config_of(settings, **changes) -> TokenizeTextConfig:
    return build(TokenizeTextConfig, settings | changes)


def work(config: TokenizeTextConfig) -> dict[str, list[ShardRecord]]:
    """The job in this process, its parts in reverse order."""
    jobs = plan_jobs(Path(config.run_dir), list_corpus(config.corpus, config.storage_options), config.bytes_per_shard)
    worker = TokenizeTextWorker(config, describe_encoding(config))
    worker.start()
    found = [worker.run(job) for job in reversed(jobs)]
    return {split: [record for shards in reversed(found) for record in shards[split]] for split in found[0]}


def contents(folder: str | Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(Path(folder).glob("*/shard-*"))}


def documents(folder: Path, split: str) -> dict[str, list[int]]:
    """Ids by key."""
    found = {}
    for record in load_manifest(folder / split).shards:
        shard = IdShard(folder / split / record.name)
        for index, key in enumerate(shard.column("key")):
            ((_, ids),) = shard.segments(index)
            found[key] = ids.tolist()
    return found


def test_the_job_on_ray_equals_one_process_and_goes_on_shard_by_shard(settings, tmp_path, capfd):
    config = config_of(settings)
    run(config)
    assert "0 of 2 jobs are done already" in capfd.readouterr().err
    root = tmp_path / "text"
    made = contents(root)
    work(config_of(settings, run_dir=str(tmp_path / "again")))
    assert contents(tmp_path / "again") == made

    text = TextTokenizer.load(config.text_tokenizer)
    train, heldout = (documents(root, split) for split in ("train", "heldout"))
    assert not train.keys() & heldout.keys()
    assert 15 < len(heldout) < 45
    usable = {f"b.parquet:{number - 99}": sentence(number) for number in range(100, 180)}
    usable |= {f"a.jsonl.zst:{number + 1 + 4 * (number >= 7)}": sentence(number) for number in range(60)}
    assert train | heldout == {key: text.encode(value) for key, value in usable.items() if len(value) >= 8}
    outcomes = [record.outcomes for split in ("train", "heldout") for record in load_manifest(root / split).shards]
    assert all(one.used == record.documents for one, record in zip(outcomes, all_shards(root), strict=True))
    assert sum(one.samples for one in outcomes) == 145
    assert sum(sum(one.filtered.values()) for one in outcomes) == sum(len(value) < 8 for value in usable.values())
    bad = [record for path in root.glob("*/*.quarantine.jsonl") for record in read_quarantine(path)]
    assert {record.key: record.reason for record in bad} == {
        "a.jsonl.zst:8": "malformed_row",
        "a.jsonl.zst:9": "missing_text",
        "a.jsonl.zst:10": "lone_surrogate",
        "b.parquet:81": "empty_text",
        "b.parquet:82": "missing_text",
    }
    assert all(record.images == 0 for record in all_shards(root))

    # A run that was killed: one shard is not committed. The others are not written again, and no cluster is at this address.
    lost = root / "train/shard-00000-0001.arrow"
    sidecar_path(lost).unlink()
    stamps = {path: path.stat().st_mtime_ns for path in root.glob("*/shard-*.arrow") if path != lost}
    work(config)
    assert contents(root) == made
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    manifest = (root / "train/manifest.json").read_bytes()
    half = root / "train/.shard-00000-0001.arrow.123.tmp"
    half.touch()
    run(config_of(settings, ray={"address": "127.0.0.1:1"}))
    assert not half.exists()
    assert "2 of 2 jobs are done already" in capfd.readouterr().err
    assert (root / "train/manifest.json").read_bytes() == manifest
    with pytest.raises(UserError, match=r"belongs to a run with min_characters = 8, but now min_characters = 9"):
        run(config_of(settings, min_characters=9))


def all_shards(root: Path) -> list[ShardRecord]:
    return [record for split in ("train", "heldout") for record in load_manifest(root / split).shards]


def test_a_file_that_changed_is_done_again_and_a_damaged_one_is_told(settings, corpus, tmp_path):
    (tmp_path / "files").mkdir()
    for name in ("b.parquet", "c.jsonl.gz"):
        (tmp_path / "files" / name).write_bytes((corpus / name).read_bytes())
    config = config_of(settings, corpus=str(tmp_path / "files"), bytes_per_shard=1 << 20)
    first = work(config)
    damaged = [record.outcomes.damaged_inputs for records in first.values() for record in records if record.outcomes.damaged_inputs]
    assert damaged == [{"truncated_file": 1}]
    pq.write_table(pa.table({"text": ["another text"] * 20}), tmp_path / "files/b.parquet")
    second = work(config)
    assert sum(record.outcomes.samples for records in second.values() for record in records) > 1000
    assert {key for split in second for key in IdShard(tmp_path / "text" / split / second[split][0].name).column("key")} >= {
        f"b.parquet:{row}" for row in range(1, 21)
    }


def test_remote_files_give_the_shards_of_local_ones(settings, corpus, tmp_path):
    local = work(config_of(settings))
    assert FolderStore.protocol == "folderstore"
    urls = [f"folderstore://{path}" for path in settings["corpus"]]
    assert work(config_of(settings, corpus=urls, run_dir=str(tmp_path / "remote"))) == local
    assert contents(tmp_path / "remote") == contents(settings["run_dir"])


def test_jobs_are_cut_by_sizes_alone(tmp_path):
    sizes = [5, 3, 4, 20, 1, None, 2, 8, 2]
    files = [Shard(f"{number}.jsonl", "", size) for number, size in enumerate(sizes)]
    jobs = plan_jobs(tmp_path, files, 10)
    assert [[file.size for file in job.files] for job in jobs] == [[5, 3], [4], [20], [1], [None], [2, 8], [2]]
    assert [file for job in jobs for file in job.files] == files


def test_a_corpus_without_a_usable_text_is_refused_and_an_empty_heldout_split_told(settings, tmp_path, capfd):
    one = tmp_path / "one.jsonl"
    one.write_text(json.dumps({"text": "long enough"}))
    config = config_of(settings, corpus=str(one), heldout_fraction=0.001)
    work(config)
    run(config)
    assert not (tmp_path / "text/heldout/manifest.json").exists()
    assert "heldout holds no document" in capfd.readouterr().err
    config = config_of(settings, corpus=str(one), run_dir=str(tmp_path / "other"), text_column="body", heldout_fraction=0)
    work(config)
    with pytest.raises(UserError, match=r"train holds no document \(quarantined: 1 \(missing_text 1\)"):
        run(config)


@pytest.fixture
def mixed(settings, pretrain_settings):
    """`mixed(weights, changes)`: settings of a run over pairs and texts."""
    config = config_of(settings)
    work(config)
    run(config)
    ids = {"pairs": pretrain_settings["ids"], "text": f"{config.run_dir}/train"}

    def make(weights, **changes) -> PretrainConfig:
        sources = {name: {"ids": ids[name], "weight": weight} for name, weight in weights.items()}
        return build(
            PretrainConfig, pretrain_settings | {"run_dir": "run", "total_steps": 50, "ids": None, "sources": sources} | changes
        )

    return make


@pytest.mark.parametrize("supervise", ["all", "second", "generated"])
def test_texts_train_beside_pairs_whole_and_in_full(mixed, supervise, pretrain_settings):
    policies = {"supervise": supervise, "too_long": "split", "captions": "one"}
    config = mixed({"text": 0.5, "pairs": 0.5}, documents=policies, caption_dropout=0.9)
    batches = open_batches(config)
    assert batches.rows.vocabulary.codebook_size == 70
    assert batches.rows.encoding.visual_tokenizer == "visual"
    text = TextTokenizer.load(pretrain_settings["text_tokenizer"])
    texts = batches.rows.sources["text"]
    pieces: dict[str, dict[int, list[int]]] = defaultdict(dict)
    for row in range(texts.rows_before_epoch(1)):
        (batch,) = GlobalBatches(texts, 1).micro_batches(row, 0, 1, 1)
        spans = texts.row_spans(row)
        for number, tokens in enumerate(texts.row_tokens(row)):
            shard, index = locate_document(texts, int(spans.documents[number]))
            key = texts.shards[shard].value("key", index)
            pieces[key][int(spans.starts[number])] = tokens.tolist()
            mine = batch.document_ids[0] == number
            assert int((batch.loss_weight[0][mine] > 0).sum()) == len(tokens) - 1  # all that follows another token
        assert not batch.modality.any()
    train = documents(Path(texts.manifest.folder).parent, "train")
    seen = {key: [token for _, tokens in sorted(found.items()) for token in tokens] for key, found in pieces.items()}
    assert seen == {key: [*ids, text.eos_id] for key, ids in train.items()}
    assert all(batches.labels(step)[0] > 0 for step in range(4))
    assert inspect_data.audit_batches(batches, 1)


def test_the_viewer_shows_texts(mixed, tmp_path, capsys):
    inspect_data.show(mixed({"text": 1.0, "pairs": 1.0}), range(4), str(tmp_path / "out"), source="text")
    out = capsys.readouterr().out
    assert re.search(r"(a\.jsonl\.zst|b\.parquet):\d+  shard-\d{5}-\d{4}\.arrow, document \d+  text; ", out)
    assert "not at hand" not in out
    assert len(list((tmp_path / "out").iterdir())) == 4


def test_texts_alone_make_a_language_model_without_codes(mixed, tmp_path):
    batches = open_batches(mixed({"text": 1.0}))
    assert batches.rows.vocabulary.codebook_size == 0
    assert batches.labels(0)[1] == 0
    with pytest.raises(UserError, match="checkpoint's model has 0 visual codes, but the sources now have 70"):
        check_codes(0, open_batches(mixed({"text": 1.0, "pairs": 1.0})).rows.vocabulary)


def test_image_sets_of_other_tokenizers_and_texts_of_another_are_still_refused(mixed, pretrain_settings, tmp_path, write_id_set):
    text = TextTokenizer.load(pretrain_settings["text_tokenizer"])
    alike = {"text_vocab_size": text.vocab_size, "text_tokenizer": text.digest}
    config = mixed({"text": 1.0, "pairs": 1.0})
    for name, encoding in (("seen", alike | {"visual_tokenizer": "another"}), ("read", alike | {"text_tokenizer": "another"})):
        write_id_set(tmp_path / name, [[(5, 4)]], **encoding)
    sources = {name: {"ids": source.ids} for name, source in config.sources.items()}

    def opened(**more):
        settings = pretrain_settings | {"run_dir": "run", "total_steps": 50, "ids": None}
        return open_batches(build(PretrainConfig, settings | {"sources": sources | more}))

    with pytest.raises(UserError, match=r"visual_tokenizer is visual in .* and another in .*seen"):
        opened(seen={"ids": str(tmp_path / "seen")})
    with pytest.raises(UserError, match="read were made with the text_tokenizer another"):
        opened(read={"ids": str(tmp_path / "read")})
    assert torch.is_tensor(opened().micro_batches(0, 0, 1, 8)[0].tokens)
    with pytest.raises(UserError, match=r"run data_prep/tokenize_text\.py with this tokenizer"):
        load_manifest(config.sources["text"].ids).check_tokenizers(text_tokenizer="another")
