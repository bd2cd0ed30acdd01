"""launcher/inspect_tokenizer.py on small untrained models: its pages, and what is refused."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from lavit_dist.config.inspect_tokenizer import InspectTokenizerConfig
from lavit_dist.data.id_shard import IMAGE, IdShard
from lavit_dist.data.pairs import list_shards, read_pairs
from lavit_dist.data.tar_reader import read_bytes
from lavit_dist.errors import UserError
from pipelines.inspect_tokenizer import run
from tests.observe.test_report import Links

ID = re.compile(r'title="keep probability [^"]*">(\d+)</(?:a|span)>')


def images_of(page: str) -> dict[str, list[int]]:
    """The ids that the page writes on each image, by its name."""
    parts = re.split(r"<h3>(\S+) <span>", page)[1:]
    return {name: [int(code) for code in ID.findall(part)] for name, part in zip(parts[::2], parts[1::2], strict=True)}


def inspect(names: list[str], **settings: object) -> str:
    run(InspectTokenizerConfig(num_threads=1, **settings), names)
    return Path(str(settings["out"]), "index.html").read_text()


@pytest.fixture(scope="module")
def tar(tiny_world: Path) -> Path:
    return list_shards(tiny_world / "pairs/heldout")[0]


@pytest.fixture(scope="module")
def files(tar: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Pictures of the tar as files."""
    folder = tmp_path_factory.mktemp("files")
    pairs, _ = read_pairs(tar)
    for pair in pairs[:3]:
        (folder / f"{pair.key}.jpg").write_bytes(read_bytes(pair.image_location))
    return sorted(map(str, folder.iterdir()))


def launch(repo_root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "launcher/inspect_tokenizer.py", *arguments, "num_threads=1"]
    return subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=180, check=False)


def test_the_page_needs_nothing_else_and_every_underlined_id_leads_somewhere(
    repo_root: Path, tiny_world: Path, files: list[str], tmp_path: Path
) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text(f"tokenizer: {tiny_world / 'tokenizer'}\npairs: {tiny_world / 'pairs/train'}\nnum_codes: 5\n")
    result = launch(repo_root, *files, "--config", str(settings), f"out={tmp_path / 'out'}")
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "out/index.html").read_text()
    links = Links(page)
    assert all(address.startswith(("data:image/", "#")) for address in links.addresses)
    assert {address[1:] for address in links.addresses if address.startswith("#")} <= links.anchors
    assert len([anchor for anchor in links.anchors if anchor.startswith("code-")]) == 5
    assert "url(" not in page
    assert "rebuilt from the tokens" in page
    assert "painted" not in page
    assert list(images_of(page)) == files
    with Image.open(tmp_path / "out/page.png") as picture:
        assert picture.width > 1000


def test_the_ids_are_those_of_pretokenize_from_a_tar_or_from_files(
    tiny_world: Path, tar: Path, files: list[str], tmp_path: Path
) -> None:
    shard = IdShard(tiny_world / "ids/heldout/shard-00000.arrow")
    expected = {
        key: next(ids for kind, ids in shard.segments(document) if kind == IMAGE).tolist()
        for document, key in enumerate(shard.column("key"))
    }
    tokenizer = str(tiny_world / "tokenizer")
    of_tar = images_of(inspect([str(tar)], tokenizer=tokenizer, out=str(tmp_path / "tar")))
    assert {name.rpartition("/")[2]: ids for name, ids in of_tar.items()} == expected
    for name, ids in images_of(inspect(files, tokenizer=tokenizer, out=str(tmp_path / "files"))).items():
        assert ids == expected[Path(name).stem]


def test_a_decoder_paints_what_its_tokenizer_saw(tiny_decoder: Path, files: list[str], tmp_path: Path) -> None:
    page = inspect(files, decoder=str(tiny_decoder / "model"), num_inference_steps=2, out=str(tmp_path))
    assert page.count("<figcaption>painted from the tokens") == len(files)


def test_the_most_probable_patches_do_not_depend_on_the_seed(tiny_world: Path, files: list[str], tmp_path: Path) -> None:
    def ids(seed: int, selection: str) -> dict[str, list[int]]:
        tokenizer = str(tiny_world / "tokenizer")
        return images_of(inspect(files, tokenizer=tokenizer, seed=seed, selection=selection, out=str(tmp_path)))

    assert ids(0, "argmax") == ids(1, "argmax")
    assert ids(0, "gumbel") != ids(1, "gumbel")
    assert ids(0, "gumbel") == ids(0, "gumbel")


def test_photographs_and_their_damaged_neighbours(photos: Path, tiny_world: Path, repo_root: Path, tmp_path: Path) -> None:
    named = sorted(map(str, (photos.parent / "images").glob("*.jpg")))[:4]
    data = Path(named[0]).read_bytes()
    (tmp_path / "cut<short>.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "words.png").write_text("not a picture")
    bad = [str(tmp_path / name) for name in ("cut<short>.jpg", "words.png", "absent.jpg")]
    result = launch(repo_root, bad[0], *named[:2], *bad[1:], *named[2:], f"tokenizer={tiny_world / 'tokenizer'}", f"out={tmp_path}")
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "index.html").read_text()
    assert list(images_of(page)) == named
    refused = page[page.index('id="refused"') :]
    assert refused.count("<tr>") == 3
    assert all(name in refused for name in ("cut&lt;short&gt;.jpg", "words.png", "absent.jpg"))
    assert Links(page).anchors >= {"images", "codes", "use", "refused"}


def test_pictures_beyond_those_to_show_lend_their_patches_and_none_is_read_twice(
    tiny_world: Path, tar: Path, tmp_path: Path
) -> None:
    settings = {"tokenizer": str(tiny_world / "tokenizer"), "out": str(tmp_path), "num_images": 2}
    pairs = {"pairs": str(tiny_world / "pairs/heldout")}
    for more, shown, in_all in (({}, 2, 12), (pairs, 2, 12), ({"num_reference": 3}, 2, 5), ({"num_reference": 0}, 2, 2)):
        page = inspect([str(tar)], **settings, **more)
        assert len(images_of(page)) == shown
        assert f"Tokens of {in_all} pictures" in page


def test_chosen_codes_are_shown_and_wrong_ones_refused(tiny_world: Path, files: list[str], tmp_path: Path) -> None:
    settings = {"tokenizer": str(tiny_world / "tokenizer"), "out": str(tmp_path / "out")}
    page = inspect(files, codes=(7, 3), **settings)
    assert re.findall(r'id="code-(\d+)"', page) == ["7", "3"]
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(UserError, match="codes holds 24, but the codebook has 24 codes; name some of 0 to 23"):
        inspect(files, codes=(3, 24), **settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("names", "settings", "named"),
    [
        (["absent.jpg"], {}, "No picture can be used of absent.jpg"),
        (["README.md", "setup.py"], {}, "No picture can be used of README.md, setup.py"),
        (["absent.tar"], {}, "absent.tar"),
        (["absent.jpg"], {"tokenizer": "/nowhere"}, "/nowhere"),
        (["absent.jpg"], {"pairs": "/nowhere"}, "/nowhere"),
    ],
)
def test_what_can_not_be_used_is_named(
    tiny_world: Path, tmp_path: Path, names: list[str], settings: dict[str, str], named: str
) -> None:
    with pytest.raises(UserError, match=re.escape(named)):
        inspect(names, **{"tokenizer": str(tiny_world / "tokenizer"), "out": str(tmp_path / "out"), **settings})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("absent.jpg",), "Neither tokenizer nor decoder"),
        (("tokenizer=/nowhere",), "Nothing to inspect"),
        (("absent.jpg", "num_imags=3"), "num_images"),
        (("absent.jpg", "{tokenizer}"), "absent.jpg"),
    ],
)
def test_a_wrong_command_is_one_sentence(
    repo_root: Path, tiny_world: Path, tmp_path: Path, arguments: tuple[str, ...], named: str
) -> None:
    filled = [argument.format(tokenizer=f"tokenizer={tiny_world / 'tokenizer'}") for argument in arguments]
    result = launch(repo_root, *filled, f"out={tmp_path / 'out'}")
    assert result.returncode == 2, result.stderr
    assert named in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
