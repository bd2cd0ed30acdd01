"""`launcher/verify.py`: a table of differences, and the exit code that tells a script."""

import shutil
import subprocess
import sys

import pytest
import torch

from lavit_dist.errors import UserError
from pipelines import verify


def run(repo_root, *arguments):
    command = [sys.executable, "launcher/verify.py", *map(str, arguments)]
    return subprocess.run(command, cwd=repo_root, capture_output=True, text=True, check=False)


def test_the_reference_is_reproduced(repo_root, reference):
    result = run(repo_root, "reference", reference)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    for name in ("encoder_features", "code_ids_plus_32002", "decoder_highres_pooled", "tokenizer_decoder.bin"):
        assert any(line.split()[:1] == [name] and line.split()[-1] == "ok" for line in lines), name
    assert "FAIL" not in result.stdout


def test_an_altered_folder_ends_with_code_1(repo_root, reference, tmp_path):
    shutil.copytree(reference, tmp_path / "altered", copy_function=shutil.copyfile)
    (tmp_path / "altered" / "visual_tokenizer").chmod(0o755)
    path = tmp_path / "altered" / "visual_tokenizer" / "tokenizer_decoder.bin"
    torch.save(torch.load(path, weights_only=True) | {"surplus": torch.zeros(1)}, path)
    result = run(repo_root, "reference", tmp_path / "altered")
    assert result.returncode == 1, result.stderr
    assert "extra keys surplus" in " ".join(result.stdout.split())
    assert result.stderr == ""


def test_another_folder_ends_with_code_2(repo_root, tmp_path):
    result = run(repo_root, "reference", tmp_path)
    assert result.returncode == 2
    assert "is no folder of reference vectors" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("name", ["a file", "nowhere"])
def test_what_is_no_folder_is_refused(tmp_path, name):
    (tmp_path / "a file").touch()
    with pytest.raises(UserError, match="no folder of reference vectors"):
        verify.reference(str(tmp_path / name))
