"""What pretraining takes of each document, and which of its tokens it learns from."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeFloat

from lavit_dist.config.base import config
from lavit_dist.errors import check

TooLong = Literal["drop", "split", "error"]
Supervise = Literal["all", "second", "generated"]


@config
class DocumentsConfig:
    """Policies of documents and supervision. A run can't change them on its way: its folder refuses."""

    captions: Literal["all", "one"] = "all"
    """An image with several captions is in each epoch with `all` of them, one document each, or with `one`, which changes from epoch to
    epoch: in any n epochs on end each of its n captions comes up once."""
    too_long: TooLong = "drop"
    """Documents longer than seq_len: `drop` leaves them out and says how many; `error` refuses the data; `split` cuts their text into pieces
    that fill rows. An image is never cut: a document with one that doesn't fit a row is left out. A piece is a document of its own: it sees
    no other piece, its first token isn't predicted, and the last piece alone ends with EOS."""
    supervise: Supervise = "all"
    """Tokens with a loss, of those that follow another one of their document. `all`: every one. `second`: those behind the first segment,
    which is what the model is given: the caption of an image, or a text's image with its [IMG] and [/IMG]; and EOS. `generated`: all but
    those of images that are given, that is, come before the document's first text: their [IMG], codes and [/IMG] have no loss, all behind
    them has, EOS too. A document of one segment, such as an image that lost its caption, gives nothing and has the loss of `all`. Of a
    document that is cut, each token is what it is in the whole: a piece of what is given has no loss at all."""
    text_loss_weight: NonNegativeFloat = 1.0
    """Weight of a token of text, [IMG] or EOS in the loss, beside that of the other kind: weights are scaled to sum to 1 over the global
    batch. 0 is no supervision. text_loss and image_loss are told as means over tokens, whatever they weigh."""
    image_loss_weight: NonNegativeFloat = 1.0
    """Weight of a visual code or [/IMG] in the loss."""

    def validate(self) -> None:
        check(
            self.text_loss_weight + self.image_loss_weight > 0,
            "documents.text_loss_weight and documents.image_loss_weight are both 0, so that nothing would be learned; set one of them"
            " to 1.",
        )


DEFAULT_DOCUMENTS = DocumentsConfig()
