"""The trained language model at work: codes to captions, and prompts to codes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavit_dist.checkpoint.llama_folder import LAVIT
from lavit_dist.config.generate import SamplingConfig
from lavit_dist.data.text_tokenizer import TextTokenizer
from lavit_dist.errors import UserError, check
from lavit_dist.models.vocabulary import Vocabulary

SHORTEST_IMAGE, LONGEST_IMAGE = 20 / 256, 1.0
"""Fewest and most codes of a drawn image, as shares of its patches. 20 of 256 is the released code's minimum; its maximum of 200 would
forbid images that training had in full."""

IGNORED = -100
"""Label of a position whose loss does not count, in torch's cross-entropy."""


class LanguageModel:
    """A `LlamaForCausalLM` over text and visual codes, with its vocabulary and text tokenizer."""

    def __init__(
        self, model: Any, text_tokenizer: TextTokenizer, vocabulary: Vocabulary, num_patches: int, batch_size: int
    ) -> None:
        self.model = model
        self.text_tokenizer = text_tokenizer
        self.vocabulary = vocabulary
        self.num_patches = num_patches
        self.batch_size = batch_size

    @classmethod
    def load(
        cls, folder: str | Path, *, visual_tokenizer_digest: str, num_patches: int, batch_size: int, device: torch.device
    ) -> LanguageModel:
        """Reads the product of pretrain. Raises `UserError` when it is missing, unreadable, or of another visual tokenizer."""
        folder = Path(folder)
        facts = _read_sidecar(folder)
        check(
            facts["visual_tokenizer_digest"] == visual_tokenizer_digest,
            f"The language model in {folder} was trained on the codes of the visual tokenizer {str(facts['visual_tokenizer_digest'])[:16]},"
            f" but the one given is {visual_tokenizer_digest[:16]}; give the tokenizer that its ids were made with.",
        )
        text_tokenizer = TextTokenizer.load(folder)
        vocabulary = Vocabulary(facts["text_size"], facts["codebook_size"])
        from transformers import LlamaForCausalLM
        from transformers.utils import logging as of_transformers

        of_transformers.disable_progress_bar()  # one bar per load says less than the lines around it
        try:
            model = LlamaForCausalLM.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:160]
            raise UserError(
                f"{folder} can't be read as a LlamaForCausalLM ({reason}); name RUN_DIR/model of a pretrain run."
            ) from error
        check(
            model.config.vocab_size == vocabulary.size,
            f"The language model in {folder} has {model.config.vocab_size} embeddings, but its {LAVIT} asks for"
            f" {vocabulary.size}; export it again.",
        )
        return cls(model.to(device).eval(), text_tokenizer, vocabulary, num_patches, batch_size)

    def caption(self, tokenizations: Sequence[Sequence[Tensor]], sampling: SamplingConfig) -> list[str]:
        """A caption of one line per image, by beam search over text ids alone.

        `tokenizations` holds, per time that the images were tokenized, each image's codes [token]. Every tokenization gives each image
        a caption; the one that is most probable on the average over the tokenizations is kept.
        """
        words, end = self.vocabulary, self.text_tokenizer.eos_id
        settings = {
            "max_new_tokens": sampling.max_caption_tokens,
            "min_new_tokens": 1,
            "num_beams": sampling.num_beams,
            "do_sample": False,
            "eos_token_id": end,
            "suppress_tokens": list(range(words.text_size, words.size)),
        }
        images = [[self._image(codes) for codes in tokenized] for tokenized in tokenizations]
        captions = [self._generate(of_images, settings) for of_images in images]
        if len(captions) > 1:
            endings = [[[*ids, end] for ids in of_images] for of_images in captions]
            scores = [torch.stack([self.log_likelihood(given, ending) for given in images]).mean(0) for ending in endings]
            best = torch.stack(scores).argmax(0).tolist()
        else:
            best = [0] * len(images[0])
        return [self._one_line(captions[choice][image]) for image, choice in enumerate(best)]

    def draw(self, prompts: Sequence[str], sampling: SamplingConfig) -> list[Tensor]:
        """The codes [token] of an image per prompt, sampled with classifier-free guidance (Eq. 7).

        logits = logits([IMG]) + guidance_scale x (logits(prompt [IMG]) - logits([IMG])). Only codes and [/IMG] can follow [IMG].
        Of `num_candidates` images, the one after which the prompt is most probable as a caption is kept.
        """
        words, end = self.vocabulary, self.text_tokenizer.eos_id
        settings = {
            "max_new_tokens": max(1, round(LONGEST_IMAGE * self.num_patches)),
            "min_new_tokens": max(1, round(SHORTEST_IMAGE * self.num_patches)),
            "guidance_scale": sampling.guidance_scale,
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "eos_token_id": words.image_end,
            "suppress_tokens": list(range(words.image_end)),
        }
        texts = [self.text_tokenizer.encode(prompt) for prompt in prompts for _ in range(sampling.num_candidates)]
        with torch.random.fork_rng():
            torch.manual_seed(sampling.seed)
            drawn = self._generate([[*text, words.image_start] for text in texts], settings)
        codes = [torch.tensor(ids, device=self.model.device) - words.code_offset for ids in drawn]
        if sampling.num_candidates == 1:
            return codes
        scores = self.log_likelihood([self._image(candidate) for candidate in codes], [[*text, end] for text in texts])
        best = scores.view(len(prompts), -1).argmax(1).tolist()
        return [codes[prompt * sampling.num_candidates + choice] for prompt, choice in enumerate(best)]

    @torch.inference_mode()
    def log_likelihood(self, given: Sequence[list[int]], continuations: Sequence[list[int]]) -> Tensor:
        """The log-probability [row] of each continuation's ids after the ids that are given."""
        scores = []
        for start in range(0, len(given), self.batch_size):
            batch = slice(start, start + self.batch_size)
            rows = [torch.tensor(before + after) for before, after in zip(given[batch], continuations[batch], strict=True)]
            targets = [row.clone() for row in rows]
            for target, before in zip(targets, given[batch], strict=True):
                target[: len(before)] = IGNORED
            self._check_room(max(map(len, rows)))
            ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.model.device)  # what follows a row is never seen by it
            labels = nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=IGNORED).to(self.model.device)
            logits = self.model(ids).logits[:, :-1].float()
            losses = F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], ignore_index=IGNORED, reduction="none")
            scores.append(-losses.sum(1))
        return torch.cat(scores)

    def _image(self, codes: Tensor) -> list[int]:
        words = self.vocabulary
        return [words.image_start, *(codes + words.code_offset).tolist(), words.image_end]

    def _one_line(self, ids: list[int]) -> str:
        return " ".join(self.text_tokenizer.decode(ids).split())

    @torch.inference_mode()
    def _generate(self, prompts: Sequence[list[int]], settings: dict[str, Any]) -> list[list[int]]:
        """What follows each prompt, up to and without the end token. Prompts are padded on the left; positions start after the pad."""
        from transformers import GenerationConfig

        end = settings["eos_token_id"]
        generation = GenerationConfig(pad_token_id=end, **settings)
        continuations = []
        for start in range(0, len(prompts), self.batch_size):
            batch = prompts[start : start + self.batch_size]
            longest = max(map(len, batch))
            self._check_room(longest + settings["max_new_tokens"])
            ids = torch.tensor([[end] * (longest - len(prompt)) + prompt for prompt in batch], device=self.model.device)
            mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch], device=self.model.device)
            output = self.model.generate(ids, attention_mask=mask, generation_config=generation)
            continuations += [_up_to(end, row) for row in output[:, longest:].tolist()]
        return continuations

    def _check_room(self, tokens: int) -> None:
        room = self.model.config.max_position_embeddings
        check(
            tokens <= room,
            f"A prompt and its continuation may take {tokens} tokens, but the model has {room} positions; shorten it.",
        )


def _read_sidecar(folder: Path) -> dict[str, Any]:
    path = folder / LAVIT
    try:
        facts: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        raise UserError(
            f"{folder} holds no language model: {path} is missing or damaged; name RUN_DIR/model of a pretrain run."
        ) from None
    return facts


def _up_to(end: int, ids: list[int]) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids
