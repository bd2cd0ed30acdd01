"""A tar with every defect that LAION's were seen to have: each sample is refused for its own reason, and the good ones are all there."""

import io
import tarfile

import pytest
import torch
from PIL import Image

from lavit_dist.data.text_tokenizer import train_text_tokenizer
from lavit_dist.models.initialisation import initialise
from lavit_dist.models.visual_tokenizer import VisualTokenizer
from tests.encode_tar import encode_tar
from tests.small_tokenizer import SMALL


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    torch.manual_seed(0)
    visual = VisualTokenizer(SMALL)
    initialise(visual)
    text = train_text_tokenizer(["a red thing"] * 3, 300, tmp_path_factory.mktemp("text"))
    return visual.eval().requires_grad_(False), text


def large_webp(side: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side)).save(buffer, "WEBP")
    return buffer.getvalue()


def test_every_defect_has_its_reason_and_costs_no_other_sample(tokenizers, jpeg, write_tar):
    good = jpeg((90, 10, 200))
    defects = {
        "web_page": [("page.jpg", b"\n<!DOCTYPE HTML><title>403</title>"), ("page.txt", b"a")],
        "unreadable_image": [("cut.jpg", good[: len(good) // 2]), ("cut.txt", b"a")],
        "image_bomb": [("bomb.webp", large_webp(400)), ("bomb.txt", b"a")],
        "empty_caption": [("mute.jpg", good), ("mute.txt", b" \n")],
        "malformed_caption": [("code.jpg", good), ("code.txt", b"\xff\xfe")],
        "malformed_metadata": [("json.jpg", good), ("json.json", b"{'caption'}")],
        "missing_image": [("blind.txt", b"a")],
        "missing_caption": [("wordless.jpg", good)],
        "duplicate_member": [("twin.jpg", good), ("twin.jpg", good), ("twin.txt", b"a")],
        "odd_name": [("README", b"a")],
    }
    deep = [("deep.jpg", good), ("deep.json", b"[" * 100_000)]
    members = [(name, data) for key in ("a", "b", "c") for name, data in ((f"{key}.jpg", good), (f"{key}.txt", b"a red thing"))]
    for place, of_kind in enumerate(defects.values()):
        members[2 * place : 2 * place] = of_kind  # good samples lie between bad ones
    tar = write_tar([*members, *deep])
    with tarfile.open(tar, "a", errors="surrogateescape") as archive:
        archive.addfile(tarfile.TarInfo("caf\udce9.txt"))
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    documents, quarantined, filtered = encode_tar(*tokenizers, tar, max_pixels=100_000)
    assert sorted(document.key for document in documents) == ["a", "b", "c"]
    found = {(record.reason, record.key) for record in quarantined}
    expected = {(reason, of_kind[0][0].partition(".")[0]) for reason, of_kind in defects.items()}
    assert found == expected | {("not_a_file", "link.jpg"), ("odd_name", "caf\\udce9.txt"), ("malformed_metadata", "deep")}
    assert len(quarantined) == len(found)
    assert filtered == []


@pytest.mark.parametrize(("cut", "reason"), [(0, "unreadable_tar"), (300, "unreadable_tar"), (2600, "truncated_tar")])
def test_a_tar_that_ends_early_is_told_of_by_its_own_name(tokenizers, jpeg, write_tar, cut, reason):
    tar = write_tar([(name, data) for key in "abcd" for name, data in ((f"{key}.jpg", jpeg()), (f"{key}.txt", b"a"))])
    tar.write_bytes(tar.read_bytes()[:cut])
    documents, quarantined, _ = encode_tar(*tokenizers, tar)
    assert {(record.key, record.reason) for record in quarantined} >= {(tar.name, reason)}
    assert {document.key for document in documents} | {record.key for record in quarantined} <= {*"abcd", tar.name}
