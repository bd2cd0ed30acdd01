"""Typed run configurations: frozen dataclasses filled from YAML files (`base:` composes them) and `key=value` overrides.

A configuration is data. Every class of it is declared `@config` and holds plain values, tuples and other such classes; its
`validate` method holds the checks across fields. Unknown keys and wrong types are refused before anything else happens.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import dataclass_transform

from lavit_dist.errors import UserError
from lavit_dist.files import write_atomically

T = TypeVar("T")
Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""What every random generator takes."""
SECRET = re.compile(r"secret|password|passwd|token|credential|(^|_)(key|sas)($|_)", re.IGNORECASE)
"""Names of options of stores whose values are nobody's business."""


@dataclass_transform(kw_only_default=True, frozen_default=True)
def config(cls: type[T]) -> type[T]:
    """Declares a configuration class: a frozen, keyword-only dataclass that refuses unknown keys."""
    cls.__pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)  # type: ignore[attr-defined]
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


def load_config(cls: type[T], path: str | Path | None, overrides: Sequence[str] = ()) -> T:
    """Reads `path` (with the files that its `base:` names beneath it), applies `key.sub=value` overrides, checks, builds `cls`.

    Raises `UserError` for a missing file, a malformed line, an unknown key, a wrong type, or values that contradict each other.
    """
    source = str(path) if path else "the command line"
    layers = [_read(Path(path), seen=())] if path else []
    for override in overrides:
        key, separator, _ = override.partition("=")
        if not separator or not key:
            raise UserError(f"The argument {override!r} is not of the form key=value; write for example train.steps=100.")
    try:
        layers.append(OmegaConf.from_dotlist(list(overrides)))
        values = OmegaConf.to_container(OmegaConf.merge(*layers), resolve=True)
    except (
        OmegaConfBaseException,
        yaml.YAMLError,
        TypeError,
        ValueError,
        IndexError,
    ) as error:  # OmegaConf lets some of its own through
        raise UserError(f"{source} can't be resolved: {_one_line(error)}") from error
    return build(cls, values, source=source)


def build(cls: type[T], values: Any, *, source: str = "the configuration") -> T:
    """Builds the configuration class `cls` from plain nested `values`; the checks of every class inside it have run."""
    try:
        built = TypeAdapter(cls).validate_python(_over_defaults(cls, values))
    except ValidationError as error:
        raise UserError(_explain(cls, error, source)) from error
    _validate(built)
    return built


def to_dict(value: Any) -> dict[str, Any]:
    """The plain nested form of a configuration, ready for YAML or JSON."""
    return cast("dict[str, Any]", TypeAdapter(type(value)).dump_python(value, mode="json"))


def save_config(value: Any, path: Path) -> None:
    """Writes the resolved configuration as YAML; `load_config` reads it back to an equal value, but for secrets, which are left out."""
    # OmegaConf's own dump quotes what its loader, unlike PyYAML's, takes for a number, such as 0E0.
    write_atomically(path, OmegaConf.to_yaml(OmegaConf.create(without_secrets(to_dict(value)))).encode())


def without_secrets(values: dict[str, Any]) -> dict[str, Any]:
    """`values` without those of `storage_options` whose names are those of secrets, at any depth."""
    kept: dict[str, Any] = {}
    for name, value in values.items():
        if name == "storage_options" and isinstance(value, dict):
            value = {option: setting for option, setting in value.items() if not SECRET.search(option)}
        kept[name] = without_secrets(value) if isinstance(value, dict) else value
    return kept


def words_without_secrets(words: Iterable[str]) -> list[str]:
    """A command line on which the values of such options are left out."""
    return [f"{word.partition('=')[0]}=…" if _is_secret(word) else word for word in words]


def secrets_hidden(words: Iterable[str]) -> Callable[[str], str]:
    """A function that leaves the values of such options of a command line out of a text that repeats them."""
    values = {word.partition("=")[2] for word in words if _is_secret(word)} - {""}

    def hide(text: str) -> str:
        for value in values:
            text = text.replace(value, "…")
        return text

    return hide


def _is_secret(word: str) -> bool:
    name, given, _ = word.partition("=")
    _, of_store, option = name.rpartition("storage_options")
    return bool(given and of_store) and (not option or SECRET.search(option) is not None)


def _read(path: Path, seen: tuple[Path, ...]) -> DictConfig:
    """One YAML file merged over its bases; `base` is a path or a list of paths relative to the file that names them."""
    if path.resolve() in seen:
        raise UserError(f"{path} is its own base by way of {', '.join(map(str, seen))}; remove one of these `base:` entries.")
    try:
        document = OmegaConf.load(path)
    except FileNotFoundError:
        raise UserError(
            f"The configuration file {path} doesn't exist; see configs/ for those that come with the project."
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"The configuration file {path} can't be read: {_one_line(error)}.") from error
    if not isinstance(document, DictConfig):
        raise UserError(f"The configuration file {path} holds a list; it must hold `key: value` lines.")
    bases = document.pop("base", [])
    names: Iterable[str] = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, str | ListConfig | list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"`base` in {path} is {bases!r}; it must be the name of a YAML file, or a list of such names.")
    layers = [_read(path.parent / name, (*seen, path.resolve())) for name in names]
    return cast("DictConfig", OmegaConf.merge(*layers, document))


def _over_defaults(cls: type, values: Any) -> Any:
    """`values` with every part that it gives only partly filled up from the default that `cls` has for that part."""
    if not isinstance(values, dict):
        return values
    filled = dict(values)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.default) and isinstance(values.get(field.name), dict):
            part = values[field.name]
            filled[field.name] = _over_defaults(type(field.default), {**to_dict(field.default), **part})
    return filled


def _validate(value: Any) -> None:
    for field in dataclasses.fields(value):
        child = getattr(value, field.name)
        parts = child.values() if isinstance(child, dict) else child if isinstance(child, tuple) else (child,)
        for item in parts:
            if dataclasses.is_dataclass(item):
                _validate(item)
    if hasattr(value, "validate"):
        value.validate()


def _explain(cls: type, error: ValidationError, source: str) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{source}: unknown key {where!r}; {_suggest(where, _legal_keys(cls))}"
    if first["type"] in ("missing", "missing_argument"):
        return f"{source}: {where!r} is not set; give it in the file or as {where}=VALUE."
    return f"{source}: {where} = {first.get('input')!r} is not legal: {first['msg'][:1].lower()}{first['msg'][1:]}."


def _suggest(unknown: str, legal: list[str]) -> str:
    """The nearest legal key: a misspelt one of the same part, or one of that name elsewhere; else all that are legal there."""
    parent, _, name = unknown.rpartition(".")
    found_names = [key.rpartition(".")[2] for key in legal if fnmatch(parent, key.rpartition(".")[0])]
    siblings = {found: f"{parent}.{found}".lstrip(".") for found in found_names}
    near = difflib.get_close_matches(name, siblings, n=1, cutoff=0.6)
    found = [siblings[near[0]]] if near else [key for key in legal if key.rpartition(".")[2] == name]
    return f"did you mean {' or '.join(map(repr, found))}?" if found else f"legal here: {', '.join(siblings.values())}."


def _legal_keys(cls: type, prefix: str = "") -> list[str]:
    """The keys of `cls` and of all configurations in it; `*` stands for the names of a mapping."""
    hints = get_type_hints(cls)
    keys = []
    for field in dataclasses.fields(cls):
        name = prefix + field.name
        keys.append(name)
        for nested, between in _configs_in(hints[field.name]):
            keys += _legal_keys(nested, f"{name}.{between}")
    return keys


def _configs_in(hint: Any) -> Iterator[tuple[type, str]]:
    """Configuration classes that a field of type `hint` may hold, and what stands between its name and their keys."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        yield hint, ""
    elif get_origin(hint) is dict:
        yield from ((nested, f"*.{between}") for nested, between in _configs_in(get_args(hint)[1]))
    else:
        for choice in get_args(hint):
            yield from _configs_in(choice)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")
