"""The statistics of an id set as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table
from rich.text import Text


def describe_stats(values: Mapping[str, Any]) -> list[Table]:
    """`IdSetStats.to_dict` as a table of quantities and one of lengths."""
    quantities = Table(box=None, show_header=False)
    for name, value in _quantities(values):
        quantities.add_row(Text(name), Text(value, justify="right"))
    columns = [name for name in values["lengths"]["document"] if name != "histogram"]
    lengths = Table(box=None, header_style="bold")
    lengths.add_column("lengths")
    for name in columns:
        lengths.add_column(name, justify="right")
    for kind, of_kind in values["lengths"].items():
        lengths.add_row(kind, *(_number(of_kind[name]) if name in of_kind else "" for name in columns))
    return [quantities, lengths]


def _quantities(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "documents", _number(values["documents"])
    yield "images", _number(values["images"])
    yield "storage, MB", f"{values['bytes'] / 1e6:,.1f}"
    yield "storage, bytes per document", f"{values['bytes_per_document']:,.0f}"
    tokens = values["tokens"]
    for name, label in (("text", "text"), ("image", "image"), ("marks", "[IMG], [/IMG], EOS")):
        yield f"tokens, {label}", f"{_number(tokens[name])} ({tokens[name] / tokens['all']:.1%})"
    outcomes = values["outcomes"]
    yield "samples of its inputs", _number(outcomes["samples"])
    yield "samples used", _number(outcomes["used"])
    for kind, label in (("quarantined", "refused"), ("filtered", "filtered"), ("damaged_inputs", "damaged inputs")):
        for reason, count in outcomes[kind].items():
            yield f"{label}, {reason}", _number(count)
    if (codes := values.get("codes")) is not None:
        yield "codes in use", f"{codes['in_use']:,} of {codes['codebook_size']:,} ({codes['share_in_use']:.1%})"
        yield "entropy of codes, bits", f"{codes['entropy_bits']:.2f}"
        yield "perplexity of codes", f"{codes['perplexity']:,.1f}"
        if codes["zipf_exponent"] is not None:
            yield "Zipf exponent of codes", f"{codes['zipf_exponent']:.2f}"
    if "images_per_second" in values:
        yield "images/s of the job", f"{values['images_per_second']:,.1f}"


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"
