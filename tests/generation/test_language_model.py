"""What the language model may say: text after a picture, codes after a prompt, each row as if it were alone."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lavit_dist.config.generate import SamplingConfig
from lavit_dist.data.text_tokenizer import train_text_tokenizer
from lavit_dist.errors import UserError
from lavit_dist.generation.language_model import LanguageModel
from lavit_dist.models.vocabulary import Vocabulary

CODES, PATCHES = 24, 16
PROMPTS = ["a red circle", "there is a large blue square on the left, on a plain grey background", "a star"]


@pytest.fixture(scope="module")
def language_model(tmp_path_factory) -> LanguageModel:
    text = train_text_tokenizer(PROMPTS, 300, tmp_path_factory.mktemp("text"))
    vocabulary = Vocabulary(text.vocab_size, CODES)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary.size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.4,
    )
    return LanguageModel(LlamaForCausalLM(config).eval(), text, vocabulary, PATCHES, batch_size=4)


def pictures(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(CODES, (length,), generator=generator) for length in lengths]


@pytest.mark.parametrize("num_beams", [1, 3])
def test_captions_hold_text_alone(language_model, monkeypatch, num_beams):
    spoken = []
    decode = language_model.text_tokenizer.decode
    monkeypatch.setattr(language_model.text_tokenizer, "decode", lambda ids: spoken.append(ids) or decode(ids))
    sampling = SamplingConfig(num_beams=num_beams, max_caption_tokens=12)
    captions = language_model.caption([pictures(3, 9, 1, 16, 5)], sampling)
    assert len(captions) == 5
    assert all(0 < len(ids) <= 12 for ids in spoken)
    assert all(0 <= token < language_model.vocabulary.text_size for ids in spoken for token in ids)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("seed", range(3))
def test_pictures_hold_codes_alone(language_model, guidance_scale, seed):
    sampling = SamplingConfig(seed=seed, guidance_scale=guidance_scale, temperature=2.0, top_k=0)
    drawn = language_model.draw(PROMPTS * 2, sampling)
    assert len(drawn) == 6
    assert all(1 <= len(codes) <= PATCHES for codes in drawn)
    assert all(0 <= code < CODES for codes in drawn for code in codes.tolist())


def test_the_same_seed_draws_the_same_and_leaves_the_stream_alone(language_model):
    torch.manual_seed(5)
    first = language_model.draw(PROMPTS, SamplingConfig(seed=1))
    after = torch.rand(1)
    torch.manual_seed(6)
    second = language_model.draw(PROMPTS, SamplingConfig(seed=1))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch.manual_seed(5)
    assert torch.rand(1) == after
    other = language_model.draw(PROMPTS, SamplingConfig(seed=2))
    assert any(not torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_padded_row_is_captioned_as_if_it_were_alone(language_model):
    images = pictures(2, 14, 7)
    sampling = SamplingConfig(num_beams=1, max_caption_tokens=10)
    together = language_model.caption([images], sampling)
    alone = [caption for image in images for caption in language_model.caption([[image]], sampling)]
    assert together == alone


def test_the_first_code_follows_equation_7(language_model):
    """With one code allowed by top_k the draw is the arg-max of l(IMG) + a (l(prompt, IMG) - l(IMG)), also in padded rows."""
    words, scale = language_model.vocabulary, 2.5
    drawn = language_model.draw(PROMPTS, SamplingConfig(guidance_scale=scale, top_k=1, num_candidates=1))
    with torch.no_grad():
        alone = language_model.model(torch.tensor([[words.image_start]])).logits[0, -1]
        for prompt, codes in zip(PROMPTS, drawn, strict=True):
            ids = torch.tensor([[*language_model.text_tokenizer.encode(prompt), words.image_start]])
            for position in range(min(3, len(codes))):
                prefix = codes[:position][None] + words.code_offset
                given = language_model.model(torch.cat([ids, prefix], 1)).logits[0, -1]
                alone = language_model.model(torch.cat([torch.tensor([[words.image_start]]), prefix], 1)).logits[0, -1]
                guided = alone + scale * (given - alone)
                allowed = guided[words.code_offset : words.size]
                if position == 0 or guided[words.image_end] < allowed.max():
                    assert codes[position] == allowed.argmax()


def test_guidance_of_1_is_the_plain_model(language_model):
    words = language_model.vocabulary
    drawn = language_model.draw(PROMPTS[:1], SamplingConfig(guidance_scale=1, top_k=1))[0]
    ids = torch.tensor([[*language_model.text_tokenizer.encode(PROMPTS[0]), words.image_start]])
    with torch.no_grad():
        logits = language_model.model(ids).logits[0, -1, words.code_offset : words.size]
    assert drawn[0] == logits.argmax()


def test_log_likelihood_is_the_sum_over_the_continuation_alone(language_model):
    given, after = [[3, 4, 5], [6], [7, 8]], [[9, 10], [11, 12, 13, 14, 15], [16]]
    scores = language_model.log_likelihood(given, after)
    for row, (before, ids) in enumerate(zip(given, after, strict=True)):
        with torch.no_grad():
            log_probs = language_model.model(torch.tensor([before + ids])).logits[0].log_softmax(-1)
        by_hand = sum(log_probs[len(before) - 1 + place, token] for place, token in enumerate(ids))
        torch.testing.assert_close(scores[row], by_hand, rtol=1e-4, atol=1e-4)


def test_the_candidate_that_explains_the_prompt_best_is_drawn(language_model):
    words, end = language_model.vocabulary, language_model.text_tokenizer.eos_id

    def score(prompt: str, codes: torch.Tensor) -> float:
        image = [words.image_start, *(codes + words.code_offset).tolist(), words.image_end]
        return float(language_model.log_likelihood([image], [[*language_model.text_tokenizer.encode(prompt), end]]))

    sampling = {"seed": 3, "temperature": 2.0, "top_k": 0}
    single = language_model.draw([prompt for prompt in PROMPTS for _ in range(4)], SamplingConfig(num_candidates=1, **sampling))
    chosen = language_model.draw(PROMPTS, SamplingConfig(num_candidates=4, **sampling))
    for index, prompt in enumerate(PROMPTS):
        candidates = single[4 * index : 4 * index + 4]
        best = max(candidates, key=lambda codes, prompt=prompt: score(prompt, codes))
        assert torch.equal(chosen[index], best)


def test_the_caption_kept_is_the_one_most_probable_over_all_tokenizations(language_model, monkeypatch):
    spoken = []
    decode = language_model.text_tokenizer.decode
    monkeypatch.setattr(language_model.text_tokenizer, "decode", lambda ids: spoken.append(ids) or decode(ids))
    words, end = language_model.vocabulary, language_model.text_tokenizer.eos_id
    tokenizations = [pictures(5, 9), [codes.flip(0) for codes in pictures(5, 9)], pictures(7, 4)]
    sampling = SamplingConfig(num_beams=1, max_caption_tokens=6)
    for tokenized in tokenizations:
        language_model.caption([tokenized], sampling)
    candidates, spoken[:] = [spoken[index : index + 2] for index in (0, 2, 4)], []
    language_model.caption(tokenizations, sampling)
    for image, kept in enumerate(spoken):
        given = [[words.image_start, *(t[image] + words.code_offset).tolist(), words.image_end] for t in tokenizations]
        scores = [language_model.log_likelihood(given, [[*ids[image], end]] * 3).mean().item() for ids in candidates]
        assert kept == candidates[scores.index(max(scores))][image]


def test_a_prompt_longer_than_the_model_is_refused(language_model):
    with pytest.raises(UserError, match="128 positions"):
        language_model.draw(["a red circle " * 60], SamplingConfig())
