"""A set is what its manifest says; sets that mix tokenizers, or are damaged, are refused."""

import dataclasses
import json

import pytest

from lavit_dist.data.manifest import MANIFEST, load_manifest, write_manifest
from lavit_dist.errors import UserError


@pytest.fixture
def manifest(tmp_path, write_id_set):
    return write_id_set(tmp_path, [[(5, 3), (4, 2)], [(6, 1)]])


def test_a_manifest_comes_back(manifest):
    assert load_manifest(manifest.folder) == manifest
    assert [shard.documents for shard in manifest.shards] == [2, 1]


def test_the_fingerprint_names_the_content_alone(manifest, tmp_path, write_id_set):
    assert write_id_set(tmp_path / "same", [[(5, 3), (4, 2)], [(6, 1)]]).fingerprint == manifest.fingerprint
    assert write_id_set(tmp_path / "other", [[(5, 3), (4, 2)], [(6, 2)]]).fingerprint != manifest.fingerprint
    assert write_manifest(manifest.folder, manifest.shards[::-1]).fingerprint == manifest.fingerprint


@pytest.mark.parametrize("field", ["visual_tokenizer", "text_tokenizer", "preprocessing", "settings"])
def test_shards_of_different_encodings_are_refused(manifest, field):
    path = manifest.folder / MANIFEST
    content = json.loads(path.read_text())
    content["shards"][1]["encoding"][field] = "another"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"mixes encodings: {field} is .* in shard-00000\.arrow but another in shard-00001\.arrow"):
        load_manifest(manifest.folder)


def test_a_mixture_is_not_even_written(manifest):
    other = dataclasses.replace(manifest.shards[1], encoding=dataclasses.replace(manifest.encoding, visual_tokenizer="another"))
    with pytest.raises(UserError, match="mixes encodings"):
        write_manifest(manifest.folder, [manifest.shards[0], other])
    assert load_manifest(manifest.folder) == manifest


def test_another_tokenizer_is_refused_with_both_digests(manifest):
    manifest.check_tokenizers(visual_tokenizer="visual", text_tokenizer="text")
    with pytest.raises(UserError, match="visual_tokenizer visual, but this run uses newer"):
        manifest.check_tokenizers(visual_tokenizer="newer")
    with pytest.raises(UserError, match="text_tokenizer text, but this run uses newer"):
        manifest.check_tokenizers(text_tokenizer="newer")


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"format_version": 1, "shards": [{}]}', b'{"format_version": 99, "shards": []}']
)
def test_what_is_no_manifest_is_refused(tmp_path, content):
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(UserError, match=str(tmp_path / MANIFEST)):
        load_manifest(tmp_path)


def test_a_folder_without_a_manifest_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no id set"):
        load_manifest(tmp_path)


def test_a_set_without_documents_is_refused(tmp_path, write_id_set):
    with pytest.raises(UserError, match="holds no document"):
        write_id_set(tmp_path, [[], []])
