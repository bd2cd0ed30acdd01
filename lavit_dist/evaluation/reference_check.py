"""Whether this code, with the weights in a folder of reference vectors, computes what the reference computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lavit_dist.checkpoint import official
from lavit_dist.checkpoint.known_references import altered_modules, known_digests
from lavit_dist.checkpoint.module_weights import check_keys, some
from lavit_dist.checkpoint.reference import (
    DIGESTS,
    KEYS,
    ListedShapes,
    altered_files,
    listed_shapes,
    read_vectors,
    reference_config,
)
from lavit_dist.checkpoint.tensor_file import BIN, TensorFile
from lavit_dist.config.model import VisualTokenizerConfig
from lavit_dist.errors import UserError, check
from lavit_dist.evaluation.reference_vectors import (
    CONTINUOUS,
    HIGHRES,
    NOISE,
    PIXELS,
    Row,
    codebook_row,
    compare_vectors,
    expected_names,
    shape,
    unseen,
    wrong,
)

KNOWN_SET = "weights of a known set"
"""The row that compares weights with the digests of a set that is known here."""


class ReferenceCheck(NamedTuple):
    """What came out of a comparison."""

    rows: list[Row]
    notes: list[str]
    """What was not compared, or no vector tells."""

    @property
    def ok(self) -> bool:
        """Whether nothing differs."""
        return all(row.ok for row in self.rows)


def check_reference(folder: Path) -> ReferenceCheck:
    """Compares the files, keys, shapes and tensors of `folder`; whatever is wrong with its content becomes a row that is not ok."""
    try:
        return _check(folder)
    except (OSError, ArithmeticError, ValueError, TypeError, RuntimeError) as error:  # content that nothing here was written for
        return ReferenceCheck([wrong("the folder", f"can't be compared: {type(error).__name__}: {error}")], [])


def _check(folder: Path) -> ReferenceCheck:
    rows = list(_digest_rows(folder))
    vectors: dict[str, Tensor] = {}
    try:
        vectors = read_vectors(folder)
        listed = listed_shapes(folder)
        config = _present(reference_config(folder), folder)
        _check_complete(folder, vectors, listed)
        opened = official.open_visual_tokenizer(folder, config)
    except UserError as error:
        return ReferenceCheck([*rows, wrong("the folder", str(error)), *_not_computed(vectors)], [])
    file_rows = list(_file_rows(folder, opened.parts, listed))
    rows += file_rows
    if not all(row.ok for row in file_rows):
        return ReferenceCheck([*rows, *_not_computed(vectors)], [])
    known = known_digests(vectors)
    if known is not None:
        altered = altered_modules(opened.parts, known)
        rows.append(Row(KNOWN_SET, "", f"altered: {some(altered)}" if altered else "equal", "", not altered))
    tokenizer = official.read_opened(opened)
    rows += [*compare_vectors(tokenizer, vectors), codebook_row(tokenizer, _stored_dtype(opened.parts))]
    unknown = sorted(vectors.keys() - {PIXELS, NOISE, *expected_names(tokenizer, vectors)})
    notes = [f"not known here, so not compared: {some(unknown)}"] if unknown else []
    if listed is None:
        notes.append(f"the folder has no {KEYS}: keys and shapes were compared with the sizes alone")
    if known is None and not (folder / DIGESTS).exists():
        notes.append(f"the folder has no {DIGESTS} (`sha256sum */*{BIN} > {DIGESTS}`), which would cover every bit")
    return ReferenceCheck(rows, [*notes, *(unseen(tokenizer, vectors) if all(row.ok for row in rows) else [])])


def _stored_dtype(parts: list[official.Part]) -> torch.dtype:
    """The type in which the codes are stored."""
    headers = next(part.file.headers for part in parts if part.stem == official.TOKENIZER_ENCODER)
    return headers["quantize.embedding.weight"].dtype or torch.float32


def _digest_rows(folder: Path) -> Iterator[Row]:
    altered = altered_files(folder)
    if altered is not None:
        yield Row(DIGESTS, "", f"altered or absent: {some(altered)}" if altered else "equal", "", not altered)


def _present(config: VisualTokenizerConfig, folder: Path) -> VisualTokenizerConfig:
    """`config` without the width of `vit_proj` where no file holds one: sizes are told of parts that a folder may leave out."""
    there = official.find_file(folder, official.UNDERSTANDING) or official.holds_projection(
        official.open_file(folder, official.TOKENIZER_ENCODER)
    )
    return config if there else dataclasses.replace(config, vit_proj_dim=None)


def _check_complete(folder: Path, vectors: Mapping[str, Tensor], listed: ListedShapes | None) -> None:
    """Raises `UserError` when a file is missing that the vectors or the list of keys tell of."""
    names = {Path(stem).name: stem for stem in (*official.REQUIRED, *official.OPTIONAL)}
    for name in listed or {}:
        check(name in names, f"{folder / KEYS} lists {name}{BIN}, which no tokenizer holds; legal are {', '.join(names)}.")
        official.open_file(folder, names[name])
    if any(name in vectors for name in HIGHRES):
        official.open_file(folder, official.HIGHRES_DECODER)
    if CONTINUOUS in vectors and not official.holds_projection(official.open_file(folder, official.TOKENIZER_ENCODER)):
        official.open_file(folder, official.UNDERSTANDING)


def _file_rows(folder: Path, parts: list[official.Part], listed: ListedShapes | None) -> Iterator[Row]:
    expected = None if listed is None else _split_projection(listed)
    for file in {id(part.file): part.file for part in parts}.values():
        own = [part for part in parts if part.file is file]
        name = file.path.name
        try:
            check_keys(file, official.wanted_tensors(file, parts))
            for part in own:
                if expected is not None:
                    _check_listed(part, expected.get(Path(part.stem).name, {}), folder / KEYS)
            _check_numbers(file)
        except UserError as error:
            yield wrong(name, str(error))
        else:
            yield Row(name, f"{len(file.headers)} tensors", "equal", "", True)


def _split_projection(listed: ListedShapes) -> ListedShapes:
    """The listed shapes by module, where `tokenizer_encoder` holds `vit_proj` by file."""
    encoder, understanding = Path(official.TOKENIZER_ENCODER).name, Path(official.UNDERSTANDING).name
    of_encoder = listed.get(encoder, {})
    projection = {key: sizes for key, sizes in of_encoder.items() if key.startswith(official.PROJECTION)}
    merger = {key: sizes for key, sizes in of_encoder.items() if key.startswith("causal_encoder.")}
    split = {**listed, encoder: {key: sizes for key, sizes in of_encoder.items() if key not in projection}}
    return {understanding: {**merger, **projection}, **split} if projection else split


def _check_listed(part: official.Part, expected: Mapping[str, tuple[int, ...]], path: Path) -> None:
    found = {key: part.file.headers[key].shape for key in part.module.state_dict()}
    different = sorted(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))
    if different:
        key = different[0]
        raise UserError(
            f"{part.file.path} differs from {path.name} in {some(different)}: {key} is {found.get(key, 'missing')} in the file and"
            f" {expected.get(key, 'missing')} in the list."
        )


def _check_numbers(file: TensorFile) -> None:
    file.check_intact()
    wild = [key for key, tensor in file.read(file.headers) if not tensor.isfinite().all()]
    check(not wild, f"{file.path} holds numbers that are not finite in {some(wild)}.")


def _not_computed(vectors: Mapping[str, Tensor]) -> list[Row]:
    return [Row(name, shape(tensor), "not computed", "", False) for name, tensor in vectors.items()]
