"""The inspector's parts: where a code occurs, what its patches look like, and whose patches a picture is rebuilt from."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from lavit_dist.config.model import CodebookConfig
from lavit_dist.data.image import to_image
from lavit_dist.data.named_pictures import list_pictures, read_pictures
from lavit_dist.data.pair_writer import EncodedPair, write_shard
from lavit_dist.data.quarantine import Quarantined
from lavit_dist.evaluation.code_usage import CodeUsage
from lavit_dist.evaluation.inspection import Inspection, Inspector
from lavit_dist.evaluation.inspection_panels import OUTSIDE, maps, patch_row, thumb
from lavit_dist.evaluation.inspection_words import describe_codes
from lavit_dist.models.visual_tokenizer import VisualTokenizer
from tests.small_tokenizer import SMALL

CONFIG = dataclasses.replace(SMALL, codebook=CodebookConfig(size=8, dim=4))


@pytest.fixture(scope="module")
def tokenizer() -> VisualTokenizer:
    torch.manual_seed(0)
    return VisualTokenizer(CONFIG).requires_grad_(False).eval()


def inspect(tokenizer: VisualTokenizer, pixels: Tensor, shown: int, seed: int | None = 0) -> Inspection:
    names = [str(place) for place in range(len(pixels))]
    inspector = Inspector(tokenizer, seed=seed, num_expected=len(pixels))
    inspector.add(names[:shown], names[:shown], pixels[:shown], show=True)
    if len(pixels) > shown:
        inspector.add(names[shown:], names[shown:], pixels[shown:], show=False)
    return inspector.finish()


def pictures(count: int, seed: int = 0) -> Tensor:
    return torch.rand((count, 3, 32, 32), generator=torch.Generator().manual_seed(seed)) * 2 - 1


Batches = st.lists(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=4), min_size=1, max_size=3), min_size=1, max_size=4)


@given(Batches, st.integers(0, 5), st.integers(1, 20))
def test_code_usage_knows_every_token_and_its_place(batches: list[list[list[int]]], code: int, number: int) -> None:
    usage, everything, generator = CodeUsage(6, 3), [], torch.Generator().manual_seed(0)
    for batch in batches:
        mask = torch.zeros(len(batch), 8, dtype=torch.bool)
        for place, codes in enumerate(batch):
            mask[place, torch.randperm(8, generator=generator)[: len(codes)]] = True
            everything.append(dict(zip(mask[place].nonzero().flatten().tolist(), codes, strict=True)))
        usage.add([torch.tensor(codes) for codes in batch], mask, torch.randn(len(batch), 8, 3, generator=generator))
    tokens = [each for picture in everything for each in picture.values()]
    assert usage.counts.tolist() == [tokens.count(each) for each in range(6)]
    assert usage.pictures.tolist() == [sum(each in picture.values() for picture in everything) for each in range(6)]
    assert usage.tokens == [len(picture) for picture in everything]
    assert usage.use()[0] == len(set(tokens)) / 6
    places = usage.places(code, number)
    assert len(places) == len(set(places)) == min(number, tokens.count(code))
    assert all(everything[picture][patch] == code for picture, patch in places)
    assert len({picture for picture, _ in places}) == min(number, int(usage.pictures[code]))
    likeness = usage.likeness()
    assert ((likeness >= 0) & (likeness <= 1 + 1e-5)).all()
    ordered = usage.most_widespread(6)
    assert sorted(ordered) == sorted(set(tokens))
    assert [usage.pictures[each] for each in ordered] == sorted((usage.pictures[each] for each in ordered), reverse=True)


def test_likeness_is_one_where_a_code_stands_for_one_feature() -> None:
    usage = CodeUsage(2, 4)
    same, other = torch.eye(4)[0], torch.eye(4)[1]
    features = torch.stack([3 * same, same, same, other])[None]
    usage.add([torch.tensor([0, 0, 1, 1])], torch.ones(1, 4, dtype=torch.bool), features)
    assert usage.likeness().tolist() == pytest.approx([1, 0.5**0.5])
    assert usage.likeness_of_all() == pytest.approx(10**0.5 / 4)


@given(st.integers(0, 15), st.integers(0, 2))
def test_a_thumb_shows_the_patch_in_its_middle(tokenizer: VisualTokenizer, patch: int, context: int) -> None:
    pixels = pictures(1)
    inspection = inspect(tokenizer, pixels, 1)
    cut = thumb(inspection, 0, patch, context, 8 * (2 * context + 1))
    row, column = divmod(patch, 4)
    whole = to_image(pixels[0])
    expected = whole.crop((8 * column + 1, 8 * row + 1, 8 * column + 7, 8 * row + 7))
    found = cut.crop((8 * context + 1, 8 * context + 1, 8 * context + 7, 8 * context + 7))
    assert found.tobytes() == expected.tobytes()
    if context and patch == 0:
        assert cut.getpixel((0, 0)) == OUTSIDE


def test_a_picture_is_rebuilt_from_the_patches_of_others(tokenizer: VisualTokenizer) -> None:
    twice = pictures(2)[[0, 1, 0]]
    with_itself = inspect(tokenizer, twice, 1).images[0]
    assert with_itself.attainable is not None
    assert with_itself.attainable.tobytes() == to_image(twice[0]).tobytes(), "its double is another picture"
    of_others = inspect(tokenizer, twice[:2], 1).images[0]
    assert of_others.attainable is not None
    other = {to_image(twice[1]).crop((x, y, x + 8, y + 8)).tobytes() for y in range(0, 32, 8) for x in range(0, 32, 8)}
    rebuilt = {of_others.attainable.crop((x, y, x + 8, y + 8)).tobytes() for y in range(0, 32, 8) for x in range(0, 32, 8)}
    assert rebuilt <= other


def test_one_picture_alone_is_shown_without_what_needs_others(tokenizer: VisualTokenizer) -> None:
    image = inspect(tokenizer, pictures(1), 1).images[0]
    assert image.rebuilt is None
    assert len(list(maps(image, 1.0, 32))) == 3


def test_what_is_shown_does_not_depend_on_what_comes_with_it(tokenizer: VisualTokenizer) -> None:
    alone, together = inspect(tokenizer, pictures(1), 1).images[0], inspect(tokenizer, pictures(4), 2).images[0]
    assert torch.equal(alone.codes, together.codes)
    assert torch.equal(alone.keep_mask, together.keep_mask)
    assert torch.allclose(alone.errors, together.errors, atol=1e-5)


def test_a_code_that_nothing_got_has_a_row_without_patches(tokenizer: VisualTokenizer) -> None:
    inspection = inspect(tokenizer, pictures(1), 1)
    unused = int((inspection.usage.counts == 0).nonzero()[0])
    assert describe_codes(inspection, [unused])[0].uses == "not used by these pictures"
    assert patch_row(inspection, unused, 3, 1, 30, 2) is None


def test_pictures_are_listed_from_files_and_tars_and_what_is_not_one_is_told(tmp_path: Path) -> None:
    Image.new("RGB", (9, 5), "red").save(tmp_path / "red.png")
    (tmp_path / "words.jpg").write_text("no picture")
    pixels = (tmp_path / "red.png").read_bytes()
    write_shard(tmp_path / "some.tar", [EncodedPair(key, pixels, "png", ("red",), {}) for key in ("one", "two")])
    (tmp_path / "empty.tar").write_bytes(b"")
    names = [tmp_path / name for name in ("red.png", "words.jpg", "some.tar", "absent.jpg", "empty.tar", ".")]
    refused: list[Quarantined] = []
    found = list(read_pictures(list_pictures(names, refused), 16, 10**6, refused))
    assert [picture.key for picture, _ in found] == ["red", "one", "two"]
    assert all(pixel_values.shape == (3, 16, 16) for _, pixel_values in found)
    assert len({picture.place for picture, _ in found}) == 3
    assert {Path(record.key).name for record in refused} == {"words.jpg", "absent.jpg", "empty.tar", tmp_path.name}
