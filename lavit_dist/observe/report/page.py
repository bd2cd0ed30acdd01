"""The page: what it shows, as plain values, and its rendering."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image


@dataclass(frozen=True)
class Score:
    """One line of the score table."""

    name: str
    value: str
    target: str = ""
    """What is asked for, in words; empty when nothing is."""
    passed: bool | None = None
    """Whether it is reached; None when nothing is asked for."""
    note: str = ""
    """How it is measured."""


@dataclass(frozen=True)
class Shown:
    """A picture with words: drawn for a prompt, captioned, painted back from its tokens, or with its kept patches."""

    image: str
    """Data URI."""
    words: str
    beside: str = ""
    """Data URI of a second picture to its right."""
    truth: str = ""
    """What `words` should say."""
    seen: str = ""
    """What the judge names in the picture."""
    right: bool | None = None
    """The verdict; None when there is none."""


@dataclass(frozen=True)
class Chart:
    """A drawing with a title."""

    image: str
    """Data URI."""
    title: str


@dataclass(frozen=True)
class StageRow:
    """One line of the table of stages."""

    title: str
    time: str
    memory: str
    command: str


@dataclass(frozen=True)
class Settings:
    """The resolved settings of a stage, as YAML."""

    name: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Page:
    """Everything that the report shows; what is empty is left out."""

    title: str
    summary: str
    scores_note: str = ""
    scores: Sequence[Score] = ()
    pictures: Sequence[Shown] = ()
    captions: Sequence[Shown] = ()
    reconstructions: Sequence[Shown] = ()
    patches: Sequence[Shown] = ()
    tokens: Sequence[Chart] = ()
    training: Sequence[Chart] = ()
    stages: Sequence[StageRow] = ()
    settings: Sequence[Settings] = ()


def render(page: Page) -> str:
    """The page as HTML that needs nothing outside itself."""
    return render_template("report.html.j2", {field.name: getattr(page, field.name) for field in fields(page)})


def render_template(name: str, values: Mapping[str, Any]) -> str:
    """The template `name` of this folder, filled with `values`."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name).render(values)


def picture_uri(picture: Image.Image) -> str:
    """A picture as a data URI."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
