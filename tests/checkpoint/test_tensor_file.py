"""Files of tensors: what is written is read, whole or not at all, and never with a second copy of it in memory."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lavit_dist.checkpoint.official import ENCODER
from lavit_dist.checkpoint.tensor_file import TensorFile, write_tensors
from lavit_dist.config.model import VisionEncoderConfig
from lavit_dist.errors import UserError
from lavit_dist.models.vision_encoder import VisionEncoder

SUFFIXES = (".bin", ".safetensors")
SHAPES = st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=5)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

SIZES = {"width": 704, "layers": 16, "mlp_hidden": 3072, "head_width": 88}
"""A tower of 400 MB in fp32."""
PEAK_OF_LOADING = """
import re, sys
from pathlib import Path
from lavit_dist.checkpoint.official import load_vision_encoder
from lavit_dist.config.base import load_config
from lavit_dist.config.model import VisionEncoderConfig
from lavit_dist.models.vision_encoder import VisionEncoder

def kilobytes(of):
    return int(re.search(of + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

config = load_config(VisionEncoderConfig, None, sys.argv[2:])
VisionEncoder(load_config(VisionEncoderConfig, None, ["width=88", "layers=1"]))
before = kilobytes("VmRSS")
encoder = load_vision_encoder(sys.argv[1], config)
payload = sum(parameter.nbytes for parameter in encoder.parameters())
print((kilobytes("VmHWM") - before) * 1024 / payload, payload)
"""
"""Prints the growth of memory at its peak while a tower is loaded, over what its weights take, and that."""


@given(SHAPES, st.sampled_from(SUFFIXES), st.sampled_from(DTYPES), st.sampled_from((None, *DTYPES)))
def test_what_is_written_is_read(shapes, suffix, dtype, saved_dtype):
    tensors = {f"tensor.{number}": torch.randn(shape).to(dtype) for number, shape in enumerate(shapes)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"weights{suffix}"
        write_tensors(path, tensors, saved_dtype)
        file = TensorFile(path)
        read = dict(file.read(reversed(tensors)))
        assert read.keys() == file.headers.keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert file.headers[key] == (saved_dtype or dtype, tuple(tensor.shape))
            assert torch.equal(read[key], tensor.to(saved_dtype or dtype))
        assert not file.damaged()
        assert [path] == list(Path(folder).iterdir())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_part_of_a_large_tensor_is_written_alone(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    write_tensors(path, {"row": torch.zeros(10_000, 100)[3], "column": torch.arange(20.0).reshape(4, 5)[:, 1]})
    assert path.stat().st_size < 4000
    assert dict(TensorFile(path).read(["column"]))["column"].tolist() == [1, 6, 11, 16]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files_are_readable_by_whom_the_folder_says(tmp_path, suffix):
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    write_tensors(tmp_path / f"weights{suffix}", {"a": torch.zeros(1)})
    assert (tmp_path / f"weights{suffix}").stat().st_mode == ordinary.stat().st_mode


def test_a_flipped_bit_is_seen(tmp_path):
    path = tmp_path / "weights.bin"
    write_tensors(path, {"a": torch.ones(1000)})
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert TensorFile(path).damaged()


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("content", [b"", b"no tensors", b"PK\x03\x04 and nothing", b"\x08\0\0\0\0\0\0\0 {}"])
def test_another_file_is_refused_by_name(tmp_path, suffix, content):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"weights{suffix} is not a"):
        TensorFile(path)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process's memory is read as Linux tells it")
@pytest.mark.parametrize(("suffix", "dtype"), [(".bin", torch.bfloat16), (".safetensors", torch.float32)])
def test_loading_a_tower_takes_little_more_memory_than_its_weights(tmp_path, suffix, dtype):
    with torch.device("meta"):
        shapes = VisionEncoder(VisionEncoderConfig(**SIZES)).state_dict()
    write_tensors(tmp_path / (ENCODER + suffix), {key: torch.zeros(of.shape, dtype=dtype) for key, of in shapes.items()})
    settings = [f"{name}={size}" for name, size in SIZES.items()]
    command = [sys.executable, "-c", PEAK_OF_LOADING, str(tmp_path), *settings]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ratio, payload = map(float, output.split())
    assert payload > 3e8
    assert 0.9 < ratio < 1.6  # a second copy would be 2; maps of 64 MB and what the process itself takes vary with the machine
