"""A LLaMA in Hugging Face's layout, read tensor by tensor, so that no process need ever hold it whole.

FOLDER/config.json                                        sizes
FOLDER/model.safetensors, or pytorch_model.bin            weights, in one file
FOLDER/*.safetensors, or *.bin, and *.index.json          or in several, which the index lists
FOLDER/lavit.json                                         in an export of ours: visual rows follow the text rows
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lavit_dist.checkpoint.module_weights import some
from lavit_dist.checkpoint.tensor_file import TensorFile
from lavit_dist.config.base import build, to_dict
from lavit_dist.config.model import LlamaConfig
from lavit_dist.errors import UserError, check
from lavit_dist.files import read_json
from lavit_dist.models.llama import EMBEDDING, FINAL_NORM, HEAD, block_name, block_shapes
from lavit_dist.models.vocabulary import Vocabulary

LAVIT = "lavit.json"
WHOLE_FILES = ("model.safetensors", "pytorch_model.bin")
HARMLESS = "rotary_emb.inv_freq"
"""End of the names of a buffer that old files hold beside the weights; it follows from the sizes."""
OLD_DEFAULTS = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "vocab_size": 32000, "initializer_range": 0.02}
"""What transformers takes where a config.json doesn't say."""
NOT_COMPARED = ("init_std", "max_position_embeddings", "head_dim")
"""Settings that weights don't depend on; `head_dim` is compared as the width that it comes to."""
RESTORE = "restore it from where the model came from"


class LlamaFolder:
    """The sizes of the LLaMA in a folder, and its tensors by name. Raises `UserError` for a folder that holds anything else."""

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder)
        settings = self._settings()
        self.config = _llama_config(settings, self.path / "config.json")
        self.rows = int(settings.get("vocab_size", OLD_DEFAULTS["vocab_size"]))
        """Rows of the embedding and of the head."""
        self.tied = bool(settings.get("tie_word_embeddings", False))
        """Whether the head is the embedding."""
        self.lavit = read_json(self.path / LAVIT, "export the model again") if (self.path / LAVIT).exists() else None
        """What lavit.json says, in an export of ours."""
        self._files = {name: file for file in self._open() for name in file.headers}
        self._check_tensors()

    @property
    def vocabulary(self) -> Vocabulary | None:
        """The vocabulary of an export of ours; None in a folder of text rows alone."""
        return Vocabulary(self.lavit["text_size"], self.lavit["codebook_size"]) if self.lavit else None

    def read(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Rows `first` to `last` (not included; to the end if None) of tensor `name`, in the type that the file has, copied."""
        name = EMBEDDING if name == HEAD and self.tied else name
        tensor = self._files[name].read_rows(name, first, last)
        check(bool(tensor.isfinite().all()), f"{self._files[name].path} holds numbers that are not finite in {name}; {RESTORE}.")
        return tensor

    def dtypes(self) -> set[torch.dtype]:
        """The types of the weights."""
        return {dtype for name, file in self._files.items() if (dtype := file.headers[name].dtype) and not name.endswith(HARMLESS)}

    def check_model(self, model: LlamaConfig) -> None:
        """Raises `UserError` unless the run's `model` has the sizes of this folder; it names every setting to change."""
        theirs, ours = self.config, model
        wrong = {
            field.name: (getattr(theirs, field.name), getattr(ours, field.name))
            for field in dataclasses.fields(LlamaConfig)
            if field.name not in NOT_COMPARED and getattr(theirs, field.name) != getattr(ours, field.name)
        }
        if theirs.head_width != ours.head_width:
            wrong["head_dim"] = (theirs.head_width, ours.head_width)
        changes = ", ".join(f"model.{name} to {_plain(there)} (it is {_plain(here)})" for name, (there, here) in wrong.items())
        check(not wrong, f"init_from {self.path} holds another LLaMA than the settings describe; set {changes}.")

    def _settings(self) -> dict[str, Any]:
        path = self.path / "config.json"
        check(
            path.is_file(),
            f"{self.path} is no Hugging Face LLaMA folder: it has no config.json; name a folder that LlamaForCausalLM reads.",
        )
        settings = read_json(path, RESTORE)
        kind = settings.get("model_type")
        check(kind == "llama", f"{path} describes a model of type {kind}, but only llama can be read; name a LLaMA's folder.")
        for name, plain in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu"), ("quantization_config", None)):
            value = settings.get(name, plain)
            check(value == plain, f"{path} has {name} {value}, which this LLaMA hasn't (only {plain}); name another folder.")
        return settings

    def _open(self) -> list[TensorFile]:
        for whole in WHOLE_FILES:  # in the order in which transformers looks for them
            if (self.path / whole).exists():
                return [_open_mapped(self.path / whole)]
            index = self.path / f"{whole}.index.json"
            if index.exists():
                names = sorted(set(read_json(index, RESTORE).get("weight_map", {}).values()))
                absent = [name for name in names if not (self.path / name).is_file()]
                check(bool(names) and not absent, f"{index} names files that are missing: {some(absent)}; {RESTORE}.")
                return [_open_mapped(self.path / name) for name in names]
        raise UserError(
            f"{self.path} holds no weights: there is neither {' nor '.join(WHOLE_FILES)}, nor an index of several; name another folder."
        )

    def _check_tensors(self) -> None:
        found = {name: file.headers[name] for name, file in self._files.items() if not name.endswith(HARMLESS)}
        wanted = self._shapes()
        missing = sorted(wanted.keys() - found.keys() - ({HEAD} if self.tied else set()))
        extra = sorted(found.keys() - wanted.keys())
        wrong = [
            f"{name} {list(found[name].shape)} for {list(shape)}"
            for name, shape in wanted.items()
            if name in found and found[name].shape != shape
        ]
        integers = [name for name in wanted if name in found and found[name].dtype is None]
        check(
            not (missing or extra or wrong or integers),
            f"The weights in {self.path} are not those of its config.json: missing {some(missing)}; extra {some(extra)}; misshapen"
            f" {some(wrong)}; not floating-point {some(integers)}; {RESTORE}.",
        )

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        table = (self.rows, self.config.hidden_size)
        shapes = {EMBEDDING: table, FINAL_NORM: table[1:], HEAD: table}
        for index in range(self.config.num_layers):
            shapes |= {block_name(index, name): shape for name, shape in block_shapes(self.config).items()}
        return shapes


def _open_mapped(path: Path) -> TensorFile:
    """The file, unless every tensor read of it would load it whole."""
    file = TensorFile(path)
    check(
        file.mappable,
        f"{path} has torch's format of before 1.6, of which nothing can be read without the rest; save the model again as safetensors, with"
        " from_pretrained and save_pretrained of transformers.",
    )
    return file


def _llama_config(settings: dict[str, Any], path: Path) -> LlamaConfig:
    """The model of a config.json of any version of transformers; raises `UserError` for rotary positions that it hasn't."""
    rope = dict(settings.get("rope_parameters") or settings.get("rope_scaling") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    stretched = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    check(
        kind in ("default", "linear", "llama3"),
        f"{path} scales rotary positions by {kind}, but only default, linear and llama3 can be read; name another folder.",
    )
    missing = [
        name for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size") if name not in settings
    ]
    check(not missing, f"{path} doesn't say {', '.join(missing)}; {RESTORE}.")
    defaults = OLD_DEFAULTS | settings
    values = {
        "hidden_size": settings["hidden_size"],
        "num_layers": settings["num_hidden_layers"],
        "num_attention_heads": settings["num_attention_heads"],
        "num_key_value_heads": settings.get("num_key_value_heads") or settings["num_attention_heads"],
        "head_dim": settings.get("head_dim"),
        "ffn_hidden_size": settings["intermediate_size"],
        "max_position_embeddings": settings.get("max_position_embeddings", 2048),
        "rms_norm_eps": defaults["rms_norm_eps"],
        "rope_theta": rope.get("rope_theta", defaults["rope_theta"]),
        "rope_scaling": None
        if kind == "default"
        else {"rope_type": kind}
        | {name: rope[name] for name in stretched if name in rope and (kind == "llama3" or name == "factor")},
        "init_std": defaults["initializer_range"],
    }
    return build(LlamaConfig, values, source=str(path))


def _plain(value: Any) -> Any:
    return to_dict(value) if dataclasses.is_dataclass(value) else value
