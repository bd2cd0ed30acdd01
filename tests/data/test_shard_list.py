"""The list of tars: what a setting names, and what changes it."""

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lavit_dist.data.shard_list import MISSING, Fingerprint, Shard, list_tars
from lavit_dist.errors import UserError


@pytest.fixture
def store():
    """An object store in memory with tars of other sizes each."""
    system = fsspec.filesystem("memory")
    for number in range(12):
        system.pipe(f"/bucket/laion/{number:05d}.tar", b"x" * (number + 1))
    system.pipe("/bucket/laion/readme.txt", b"")
    yield system
    system.store.clear()


def names(sources):
    return [(shard.name, shard.size) for shard in list_tars(sources, {}, "images.shards")]


def test_folders_patterns_braces_and_lists_of_local_tars(tmp_path, write_tar, monkeypatch):
    for name in ("a/0.tar", "a/1.tar", "b/0.tar"):
        write_tar([], name)
    (tmp_path / "a" / "x.txt").write_text("no tar")
    size = (tmp_path / "a" / "0.tar").stat().st_size
    assert names(str(tmp_path / "a")) == names(f"file://{tmp_path}/a") == [("0.tar", size), ("1.tar", size)]
    assert names(f"{tmp_path}/a/*.tar") == names(f"{tmp_path}/a/{{0..1}}.tar") == names(str(tmp_path / "a"))
    assert [name for name, _ in names([f"{tmp_path}/a", f"{tmp_path}/b"])] == ["a/0.tar", "a/1.tar", "b/0.tar"]
    assert [name for name, _ in names(f"{tmp_path}/{{b,a}}/*.tar")] == ["a/0.tar", "a/1.tar", "b/0.tar"]
    assert names(f"{tmp_path}/a/{{0..2}}.tar")[2] == ("2.tar", MISSING)
    monkeypatch.chdir(tmp_path)
    assert names("a/*.tar") == names("a")
    assert list_tars("a", {}, "images.shards")[0].path == str(tmp_path / "a" / "0.tar")


def test_remote_folders_patterns_and_braces_with_sizes(store):
    everything = [(f"{number:05d}.tar", number + 1) for number in range(12)]
    for source in ("memory://bucket/laion", "memory://bucket/laion/*.tar", "memory://bucket/laion/{00000..00011}.tar"):
        assert names(source) == everything
        assert all(shard.file_system is not None for shard in list_tars(source, {}, "images.shards"))
    assert names("memory://bucket/laion/{00010..00013}.tar") == [*everything[10:], ("00012.tar", MISSING), ("00013.tar", MISSING)]
    assert names("memory://bucket/laion/00003.tar") == [("00003.tar", 4)]
    assert len(names(["memory://bucket/laion/0000[0-4].tar", "memory://bucket/laion/00005.tar"])) == 6


def test_mistakes_are_told_in_a_sentence(tmp_path, store, write_tar):
    write_tar([], "0.tar")
    for source, message in {
        f"{tmp_path}/*.zip": r"matches no file; name a folder",
        f"{tmp_path}/{{0..3.tar": "can't be understood: Unbalanced braces",
        f"{tmp_path}/{{5..7}}.tar": r"None of the 3 tars .* exists",
        "memory://bucket/other/*.tar": "matches no tar",
        "memory://bucket/{5..7}.tar": r"None of the 3 tars .* exists",
        "nonsense://bucket/0.tar": "can't be listed .*Protocol not known",
        "gs://bucket/0.tar": "needs a package that is not installed: Please install gcsfs",
    }.items():
        with pytest.raises(UserError, match=message):
            names(source)
    with pytest.raises(UserError, match=r"names .*0\.tar twice"):
        names([str(tmp_path), f"{tmp_path}/0.tar"])


@given(st.data())
def test_the_fingerprint_names_the_first_tar_that_changed(data):
    sizes = data.draw(st.lists(st.integers(1, 99), min_size=1, max_size=20))
    place = data.draw(st.integers(0, len(sizes) - 1))
    shards = [Shard(f"{number:03d}.tar", "", size) for number, size in enumerate(sizes)]
    state = Fingerprint(shards).state()
    Fingerprint(shards).check(state)
    changed = [*shards[:place], Shard(f"{place:03d}.tar", "", sizes[place] + 1), *shards[place + 1 :]]
    with pytest.raises(UserError, match=rf"differs first {place:03d}\.tar"):
        Fingerprint(changed).check(state)
    with pytest.raises(UserError, match=f"had {len(sizes)} tars, where now there are {len(sizes) + 1}"):
        Fingerprint([*shards, Shard("999.tar", "", 1)]).check(state)


def test_the_fingerprint_of_very_many_tars_stays_small_and_names_a_range():
    shards = [Shard(f"{number:05d}.tar", "", 1) for number in range(41_456)]
    state = Fingerprint(shards).state()
    assert len(state["hashes"]) <= 1024
    shards[20_000] = Shard("20000.tar", "", 2)
    with pytest.raises(UserError, match=r"differs first from 19967\.tar to 20007\.tar"):
        Fingerprint(shards).check(state)
