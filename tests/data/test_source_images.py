"""Pictures of documents: only out of the tar that was tokenized."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lavit_dist.data.id_shard import IMAGE, Encoding, IdDocument, InputFile
from lavit_dist.data.id_shard_writer import write_id_shard
from lavit_dist.data.manifest import Manifest, write_manifest
from lavit_dist.data.picture import decode_image
from lavit_dist.data.quarantine import SampleError
from lavit_dist.data.source_images import SourceImages, image_folders
from lavit_dist.data.tar_reader import FileLocation, index_shard, read_bytes
from lavit_dist.errors import UserError


def write_tar(path: Path, colours: dict[str, int]) -> None:
    """A tar of one grey picture per key."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, colour in colours.items():
            data = io.BytesIO()
            Image.new("RGB", (8, 6), (colour,) * 3).save(data, format="PNG")
            info = tarfile.TarInfo(f"{key}.png")
            info.size = len(data.getvalue())
            tar.addfile(info, io.BytesIO(data.getvalue()))


def make_ids(root: Path, tar: Path, *, inputs: bool = True) -> tuple[Manifest, dict[str, FileLocation]]:
    """An id set root/ids/train of the pictures of a tar; their locations by key, with the tar's bare name."""
    samples = {sample.key: sample.image for sample in index_shard(tar, needs_caption=False).samples}
    found = {key: FileLocation(tar.name, image.offset, image.size) for key, image in samples.items() if image}
    documents = [
        IdDocument(key, 0, ((IMAGE, [1, 2]),), b"\xf0", "", (location.shard, location.offset, location.size))
        for key, location in found.items()
    ]
    record = write_id_shard(
        root / "ids/train/shard-00000.arrow",
        documents,
        encoding=Encoding("visual", "text", "preprocessing", "settings", 50, 70),
        inputs=[InputFile(tar.name, tar.stat().st_size, "digest")] if inputs else [],
    )
    return write_manifest(root / "ids/train", [record]), found


def pictures(manifest: Manifest, given: Path | None = None) -> SourceImages:
    return SourceImages(image_folders(manifest, str(given) if given else None), manifest)


@pytest.mark.parametrize("place", ["pairs/train", "pairs", "ids/train", "elsewhere", "elsewhere/train"])
def test_the_picture_is_the_one_in_the_tar(tmp_path, place):
    tar = tmp_path / place / "00000.tar"
    write_tar(tar, {"a": 10, "sub/b": 200})
    manifest, locations = make_ids(tmp_path, tar)
    assert locations.keys() == {"a", "sub/b"}
    source = pictures(manifest, tmp_path / "elsewhere" if place.startswith("elsewhere") else None)
    for key, location in locations.items():
        expected = decode_image(read_bytes(FileLocation(str(tar), location.offset, location.size)))
        assert np.array_equal(source.picture(key, location), expected)


def test_the_folder_that_pretokenize_read_is_looked_in(tmp_path):
    tar = tmp_path / "far/away/train/00000.tar"
    write_tar(tar, {"a": 10})
    manifest, locations = make_ids(tmp_path, tar)
    with pytest.raises(SampleError, match=r"00000.tar was looked for in .*/pairs/train, .*/pairs, .*/ids/train"):
        pictures(manifest).picture("a", locations["a"])
    (tmp_path / "ids/config.yaml").write_text(json.dumps({"pairs": str(tmp_path / "far/away")}))
    assert pictures(manifest).picture("a", locations["a"]).size == (8, 6)


@pytest.mark.parametrize("broken", ["- a list", "pairs: [", "pairs: 3"])
def test_a_config_that_cannot_be_read_is_passed_over(tmp_path, broken):
    tar = tmp_path / "pairs/00000.tar"
    write_tar(tar, {"a": 10})
    manifest, locations = make_ids(tmp_path, tar)
    (tmp_path / "ids/config.yaml").write_text(broken)
    assert pictures(manifest).picture("a", locations["a"]).size == (8, 6)


@pytest.mark.parametrize("inputs", [True, False])
@pytest.mark.parametrize("other", [{"b": 10}, {"z": 3, "a": 10}, {}])
def test_another_tar_of_that_name_is_refused_and_the_right_one_found_behind_it(tmp_path, other, inputs):
    tar = tmp_path / "first/00000.tar"
    write_tar(tar, {"a": 10})
    manifest, locations = make_ids(tmp_path, tar, inputs=inputs)
    write_tar(tmp_path / "pairs/train/00000.tar", other)
    with pytest.raises(SampleError, match=r"pairs/train/00000.tar is not the tar that was tokenized"):
        pictures(manifest).picture("a", locations["a"])
    shutil.copy(tar, tmp_path / "pairs/00000.tar")
    assert pictures(manifest).picture("a", locations["a"]).size == (8, 6)


def test_a_tar_of_another_size_is_refused(tmp_path):
    tar = tmp_path / "pairs/00000.tar"
    write_tar(tar, {"a": 10})
    manifest, locations = make_ids(tmp_path, tar)
    tar.write_bytes(tar.read_bytes() + bytes(512))
    with pytest.raises(SampleError, match="is not the tar that was tokenized"):
        pictures(manifest).picture("a", locations["a"])


def test_a_folder_that_is_none_is_refused(tmp_path):
    write_tar(tmp_path / "00000.tar", {"a": 10})
    manifest, _ = make_ids(tmp_path, tmp_path / "00000.tar")
    with pytest.raises(UserError, match=r"--images .*nowhere is no folder"):
        image_folders(manifest, str(tmp_path / "nowhere"))
