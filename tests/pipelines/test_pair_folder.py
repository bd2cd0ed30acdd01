"""The folder that a stage of pairs makes: once, whole, and never over anything else."""

import json
from pathlib import Path

import pytest

from lavit_dist.config import build, run_entry_point
from lavit_dist.config.ingest import IngestConfig
from lavit_dist.config.make_shapes import MakeShapesConfig
from lavit_dist.errors import UserError
from pipelines.ingest import ingest
from pipelines.make_shapes import make_shapes


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "config.yaml"
    }


def make(folder: Path, **settings) -> None:
    make_shapes(
        build(
            MakeShapesConfig,
            {"run_dir": str(folder), "train_samples": 70, "heldout_samples": 9, "samples_per_shard": 40, **settings},
        )
    )


def test_shapes_are_the_same_bytes_again_and_other_bytes_for_another_seed(tmp_path):
    make(tmp_path / "one")
    make(tmp_path / "two")
    make(tmp_path / "three", seed=1)
    one = snapshot(tmp_path / "one")
    assert one == snapshot(tmp_path / "two")
    assert [str(path) for path in sorted(one) if path.suffix == ".tar"] == [
        "heldout/00000.tar",
        "train/00000.tar",
        "train/00001.tar",
    ]
    assert all(data != snapshot(tmp_path / "three")[path] for path, data in one.items() if path.suffix == ".tar")


def test_an_interrupted_set_is_made_anew_and_a_complete_one_is_left_alone(tmp_path):
    make(tmp_path)
    whole = snapshot(tmp_path)
    (tmp_path / "summary.json").unlink()
    (tmp_path / "train" / "00001.tar").unlink()
    (tmp_path / "train" / "00002.tar").write_text("left by a crash")
    make(tmp_path)
    assert snapshot(tmp_path) == whole
    times = {path: (tmp_path / path).stat().st_mtime_ns for path in whole}
    make(tmp_path)
    assert times == {path: (tmp_path / path).stat().st_mtime_ns for path in whole}


def test_a_set_is_refused_to_other_settings_and_to_a_source_that_changed(tmp_path, photos):
    make(tmp_path / "shapes")
    with pytest.raises(UserError, match="belongs to a run with seed = 0, but now seed = 5"):
        make(tmp_path / "shapes", seed=5)
    rows = [json.loads(line) for line in photos.read_text().splitlines()[:3]]
    source = tmp_path / "list.jsonl"
    config = build(IngestConfig, {"source": str(source), "run_dir": str(tmp_path / "photos"), "image_root": str(photos.parent)})
    for captions in ("one", "another"):
        source.write_text("\n".join(json.dumps({"image": str(photos.parent / row["image"]), "caption": captions}) for row in rows))
        if captions == "one":
            ingest(config)
    with pytest.raises(UserError, match="The source has changed since"):
        ingest(config)


@pytest.mark.parametrize(
    ("cls", "stage", "arguments", "message"),
    [
        (IngestConfig, ingest, ["source={tmp}/absent", "run_dir={tmp}/new"], "does not exist; name a folder"),
        (IngestConfig, ingest, ["source={tmp}/broken", "run_dir={tmp}/new"], "None of the 1 pairs"),
        (IngestConfig, ingest, ["source={tmp}/broken", "run_dir={tmp}/broken"], "holds files that this program didn't make"),
        (
            IngestConfig,
            ingest,
            ["source=x", "run_dir=y", "heldout_fraction=0.9"],
            "heldout_fraction 0.9 must lie between 0 and 0.5",
        ),
        (MakeShapesConfig, make_shapes, ["run_dir={tmp}/new", "held_out_attributes=[colour]"], "at least two different attributes"),
        (
            MakeShapesConfig,
            make_shapes,
            ["run_dir={tmp}/new", "held_out_atributes=[colour]"],
            "did you mean 'held_out_attributes'?",
        ),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(tmp_path, capsys, cls, stage, arguments, message):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.jpg").write_text("no picture")
    (tmp_path / "broken" / "a.txt").write_text("a caption")
    with pytest.raises(SystemExit) as caught:
        run_entry_point(cls, stage, "", [argument.format(tmp=tmp_path) for argument in arguments])
    assert caught.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert sorted(path.name for path in (tmp_path / "broken").iterdir()) == ["a.jpg", "a.txt"]


def test_a_folder_in_which_a_run_ended_before_it_began_is_as_good_as_empty(tmp_path):
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs/.lock").touch()
    make(tmp_path / "pairs")
    assert (tmp_path / "pairs/summary.json").exists()
