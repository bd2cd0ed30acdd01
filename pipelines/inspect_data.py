"""The data viewer: rows as pretraining sees them, in words and pictures, and the proof that an epoch has every document once.

OUT/row-000000.png    one row each: its slots by document, kind of token and loss, and its documents
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.text import Text

from lavit_dist.config.pretrain import PretrainConfig
from lavit_dist.data.epoch_audit import NAMED, EpochAudit, audit_epoch
from lavit_dist.data.global_batches import GlobalBatches
from lavit_dist.data.mixed_rows import MixedRows
from lavit_dist.data.mixture import Asked
from lavit_dist.data.quarantine import SampleError
from lavit_dist.data.seen_rows import SeenDocument, see_row
from lavit_dist.data.source_images import SourceImages, image_folders
from lavit_dist.data.text_tokenizer import TextTokenizer
from lavit_dist.errors import check
from lavit_dist.evaluation.row_picture import document_colour, draw_row
from lavit_dist.evaluation.row_words import describe_document, describe_row, describe_source, shortened
from lavit_dist.files import write_atomically
from lavit_dist.observe.logs import setup_logging
from pipelines.pretrain import open_batches


def show(config: PretrainConfig, rows: range, output: str, images: str | None = None, source: str | None = None) -> None:
    """Prints `rows` of the run, or of one source alone, and writes their pictures to the folder `output`.

    Raises `UserError` for rows that the run doesn't come to.
    """
    setup_logging()
    batches = _of_source(open_batches(config, verify=False), source)
    _check_rows(config, batches, rows, source)
    text_tokenizer = TextTokenizer.load(config.text_tokenizer)
    pictures = {
        name: SourceImages(image_folders(dataset.manifest, images), dataset.manifest)
        for name, dataset in batches.rows.sources.items()
    }
    console = Console(highlight=False, soft_wrap=True)
    for number in rows:
        row = see_row(batches, number)
        texts = [
            shortened(document.tokens, batches.rows.vocabulary, batches.rows.eos_id, text_tokenizer.decode)
            for document in row.documents
        ]
        found = [_picture(pictures[row.source], document) for document in row.documents]
        absent = [reason for reason in found if isinstance(reason, str)]
        note = f"{len(absent)} of its pictures are not at hand: {absent[0]}." if absent else ""
        path = Path(output) / f"row-{number:06d}.png"
        buffer = io.BytesIO()
        draw_row(row, texts, [image if isinstance(image, Image.Image) else None for image in found], note).save(
            buffer, format="PNG"
        )
        write_atomically(path, buffer.getvalue())
        _print_row(console, describe_row(row), row.documents, texts, note)
        console.print(Text(f"      {path}\n"))


def audit(config: PretrainConfig, epoch: int, source: str | None = None) -> bool:
    """Walks an epoch of each id set of the run, or of one, prints what it holds, and returns whether all is as it should be."""
    setup_logging()
    return audit_batches(_of_source(open_batches(config), source), epoch)


def audit_batches(batches: GlobalBatches, epoch: int) -> bool:
    """`audit` of what is open."""
    console, to_user = Console(highlight=False, soft_wrap=True), Console(stderr=True)
    holds = True

    def shown(rows: range) -> Iterable[int]:
        return track(rows, "walking rows", console=to_user, transient=True, disable=not to_user.is_terminal)

    for name, dataset in batches.rows.sources.items():
        found = audit_epoch(dataset, epoch, shown)
        print_audit(console, found, name, dataset.manifest.folder)
        holds &= found.ok
    return holds


def print_audit(console: Console, audit: EpochAudit, name: str, folder: Path | str) -> None:
    """What an epoch was found to hold, and the first offenders."""
    lines = {
        "rows": f"{audit.rows:,}",
        "documents": f"{audit.documents:,}" + (f", {audit.cut:,} of them cut" if audit.cut else ""),
        "left out": ", ".join(f"{count:,} ({reason})" for reason, count in audit.left_out.items()) or "none",
        "padding": f"{audit.padding / max(audit.slots, 1):.3%} of {audit.slots:,} slots",
        "with a loss": f"{audit.text_labels:,} of text, [IMG] and EOS, {audit.image_labels:,} of codes and [/IMG]",
    }
    console.print(Text(f"{name}: epoch {audit.epoch} of {folder}", "bold"))
    for what, found in lines.items():
        console.print(Text(f"  {what:<12}{found}"))
    for offence in audit.offences:
        console.print(Text(f"  {offence}", "red"))
    if audit.num_offences > NAMED:
        console.print(Text(f"  and {audit.num_offences - NAMED:,} more", "red"))
    verdict = (
        Text("every document that fits comes exactly once, and no row is over length", "green")
        if audit.ok
        else Text(f"FAIL: {audit.num_offences:,} things are wrong", "bold red")
    )
    console.print(Text("  ").append_text(verdict))


def _of_source(batches: GlobalBatches, source: str | None) -> GlobalBatches:
    """The rows of one source alone, if it is named."""
    if source is None:
        return batches
    names = batches.rows.sources
    check(source in names, f"--source {source} is no source of this run; choose of {', '.join(names)}.")
    return GlobalBatches(MixedRows({source: names[source]}, [Asked(0, {source: 1.0})]), batches.global_batch_size)


def _check_rows(config: PretrainConfig, batches: GlobalBatches, rows: range, source: str | None) -> None:
    """A source alone has endless rows; a run ends."""
    if source is None:
        total = config.total_steps * config.global_batch_size
        check(
            rows.stop <= total,
            f"--rows {rows.start}:{rows.stop} ends behind the run's {total:,} rows, total_steps x global_batch_size; name rows below that,"
            " or --source to see those of one id set.",
        )
        batches.check_suffice(-(-rows.stop // config.global_batch_size))


def _picture(pictures: SourceImages, document: SeenDocument) -> Image.Image | str | None:
    """The picture of a document; a string that says why it can't be had; None where it has none."""
    if document.image is None:
        return None
    try:
        return pictures.picture(document.key, document.image)
    except SampleError as error:
        return error.message


def _print_row(console: Console, title: str, documents: tuple[SeenDocument, ...], texts: list[str], note: str) -> None:
    console.print(Text(title, "bold"))
    if note:
        console.print(Text(f"      {note}", "yellow"))
    for number, (document, words) in enumerate(zip(documents, texts, strict=True)):
        red, green, blue = document_colour(number)
        badge = Text(f"{number + 1:>4}", f"bold rgb({red},{green},{blue})")
        console.print(badge + Text(f"  {document.key}  {describe_source(document)}  {describe_document(document)}"))
        console.print(Text(f"      {words}", "dim"))
