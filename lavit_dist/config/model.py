"""The sizes of the models. Defaults are those of the released LaVIT (arXiv 2309.04669); configs/ holds the small ones."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from lavit_dist.config.base import config
from lavit_dist.errors import check

MLP_RATIO = 4.3637
"""Hidden channels of the feed-forward layers over the width, rounded down, in every released module."""


@config
class VisionEncoderConfig:
    """The frozen EVA-CLIP vision transformer (ViT-G/14 in the release, `eva_vitg_psz14.bin`)."""

    image_size: PositiveInt = 224
    """Height and width of the input, pixels."""
    patch_size: PositiveInt = 14
    """Height and width of a patch, pixels."""
    width: PositiveInt = 1408
    """Channels of a patch feature."""
    layers: PositiveInt = 40
    """Transformer blocks."""
    head_width: PositiveInt = 88
    """Channels of one attention head."""
    mlp_hidden: PositiveInt = 6144
    """Hidden channels of the feed-forward layers: int(width x 4.3637) in the release."""
    layer_norm_eps: PositiveFloat = 1e-6
    """Epsilon of every layer norm."""
    head_out: PositiveInt = 1024
    """Channels of the contrastive projection `head`."""

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of an image: 256 in the release."""
        return self.grid**2

    def validate(self) -> None:
        check(
            self.image_size % self.patch_size == 0,
            f"encoder.image_size {self.image_size} is not a multiple of encoder.patch_size {self.patch_size}; choose a multiple.",
        )
        check(
            self.width % self.head_width == 0,
            f"encoder.width {self.width} is not a multiple of encoder.head_width {self.head_width}; choose a head_width that divides it.",
        )


@config
class MergerConfig:
    """The token merger (`causal_encoder.*` in `tokenizer_encoder.bin`)."""

    layers: PositiveInt = 12
    """Blocks of causal self-attention, cross-attention to dropped patches, and feed-forward."""
    heads: PositiveInt = 16
    """Attention heads."""
    mlp_hidden: PositiveInt = 6144
    """Hidden channels of the feed-forward layers."""
    layer_norm_eps: PositiveFloat = 1e-5
    """Epsilon of every layer norm."""


@config
class CodebookConfig:
    """The vector quantizer (`quantize.*` in `tokenizer_encoder.bin`)."""

    size: PositiveInt = 16384
    """Number of codes, K."""
    dim: PositiveInt = 32
    """Channels of a code."""
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Weight of the past in the moving averages that make the codes (BEiT-2's quantizer, which LaVIT credits)."""
    revive_below: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """A code whose moving count of hits falls below this share of the codes' mean is moved onto a vector of the batch; 0 never does."""
    learning: Literal["ema", "gradient"] = "ema"
    """How codes learn: by moving averages of the vectors they are nearest to, as the authors did; or, as in the first VQ-VAE, by the
    gradient of their distance to them, which collapses (official issue 29) and is here for comparison."""
    initialisation: Literal["kmeans", "random"] = "kmeans"
    """Where codes begin when the quantizer comes on: at k-means centres of vectors, as the authors did, or at random."""


@config
class TokenizerDecoderConfig:
    """The bidirectional query decoder (`tokenizer_decoder.bin`)."""

    depth: PositiveInt = 12
    """Blocks of self-attention, cross-attention to codes, and feed-forward."""
    heads: PositiveInt = 16
    """Attention heads."""
    mlp_hidden: PositiveInt = 6144
    """Hidden channels of the feed-forward layers."""
    layer_norm_eps: PositiveFloat = 1e-5
    """Epsilon of every layer norm."""
    unet_dim: PositiveInt = 768
    """Channels of the U-Net's condition (`unet_proj`): 768 in Stable Diffusion 1.5."""
    highres_dims: tuple[PositiveInt, PositiveInt] = (768, 1280)
    """Channels of the two parts of the SDXL-shaped condition (`unet_proj_1`, `unet_proj_2`)."""
    pooled_dim: PositiveInt = 1280
    """Channels of the SDXL-shaped pooled condition (`unet_attnpool`)."""


@config
class VisualTokenizerConfig:
    """The dynamic discrete visual tokenizer: encoder, selector, merger, quantizer, decoder."""

    encoder: VisionEncoderConfig = VisionEncoderConfig()
    merger: MergerConfig = MergerConfig()
    codebook: CodebookConfig = CodebookConfig()
    decoder: TokenizerDecoderConfig = TokenizerDecoderConfig()
    vit_proj_dim: PositiveInt | None = None
    """Channels of the language model's inputs, which `vit_proj` (`visual_weight.bin`) makes of merged features; None where there is none."""

    def validate(self) -> None:
        width = self.encoder.width
        for name, heads in (("merger", self.merger.heads), ("decoder", self.decoder.heads)):
            check(width % heads == 0, f"{name}.heads {heads} does not divide encoder.width {width}; choose a divisor of {width}.")
        check(width % 4 == 0, f"encoder.width {width} is not a multiple of 4, as the selector's layers need; choose one that is.")


@config
class RopeScalingConfig:
    """Rotary angles stretched over longer contexts than a model was first trained on, in Hugging Face's terms."""

    rope_type: Literal["linear", "llama3"]
    """`linear` divides every position; `llama3` (Llama 3.1) the slow rotations alone."""
    factor: Annotated[float, Field(ge=1)]
    """How much longer the context is."""
    low_freq_factor: PositiveFloat = 1.0
    """`llama3`: wavelengths above original length / this are stretched in full."""
    high_freq_factor: PositiveFloat = 4.0
    """`llama3`: wavelengths below original length / this stay."""
    original_max_position_embeddings: PositiveInt = 8192
    """`llama3`: the context of the first training, tokens."""

    def validate(self) -> None:
        check(
            self.low_freq_factor < self.high_freq_factor,
            f"model.rope_scaling.low_freq_factor {self.low_freq_factor} must be below high_freq_factor {self.high_freq_factor}.",
        )


@config
class LlamaConfig:
    """The language model: LLaMA with rotary positions, RMSNorm, SwiGLU and untied embeddings."""

    hidden_size: PositiveInt = 4096
    """Channels of the residual stream."""
    num_layers: PositiveInt = 32
    """Decoder layers."""
    num_attention_heads: PositiveInt = 32
    """Query heads."""
    num_key_value_heads: PositiveInt = 32
    """Key and value heads; fewer than the query heads is grouped-query attention."""
    head_dim: PositiveInt | None = None
    """Channels of a head; None is hidden_size / num_attention_heads, as in every released LLaMA."""
    ffn_hidden_size: PositiveInt = 11008
    """Hidden channels of the feed-forward layers."""
    max_position_embeddings: PositiveInt = 2048
    """Longest document, tokens."""
    rms_norm_eps: PositiveFloat = 1e-5
    """Epsilon of every RMSNorm (Llama-2)."""
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary angles."""
    rope_scaling: RopeScalingConfig | None = None
    """None leaves the rotary angles as they are (LLaMA, Llama 2 and 3.0)."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights; output projections take it divided by sqrt(2 x layers)."""

    @property
    def head_width(self) -> int:
        """Channels of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def validate(self) -> None:
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        check(
            self.head_dim is not None or self.hidden_size % heads == 0,
            f"model.hidden_size {self.hidden_size} is not a multiple of model.num_attention_heads {heads}; choose a multiple, or set"
            " model.head_dim.",
        )
        check(
            self.head_width % 2 == 0,
            f"A head has {self.head_width} channels, but rotary positions turn pairs; choose an even number.",
        )
        check(
            heads % groups == 0,
            f"model.num_attention_heads {heads} is not a multiple of model.num_key_value_heads {groups}; choose a divisor of {heads}.",
        )


@config
class PixelDecoderConfig:
    """The diffusion decoder: a diffusers U-Net conditioned on reconstructed patch features (Eq. 5 of the paper)."""

    block_out_channels: tuple[PositiveInt, ...] = (320, 640, 1280, 1280)
    """Channels at each resolution, finest first."""
    layers_per_block: PositiveInt = 2
    """Residual blocks at each resolution."""
    cross_attention: tuple[bool, ...] = (True, True, True, False)
    """Which resolutions attend to the condition, finest first; the middle block always does."""
    attention_head_dim: PositiveInt = 8
    """diffusers' `attention_head_dim` (for SD 1.5: the number of heads, by a misnomer of that library)."""
    norm_num_groups: PositiveInt = 32
    """Groups of every group norm."""
    latent: Literal["vae", "pixel_unshuffle"] = "vae"
    """What is diffused: latents of an AutoencoderKL, or pixels folded into channels (lossless; for small images without a VAE)."""
    latent_factor: PositiveInt = 8
    """Pixels per latent position along one side."""
    latent_channels: PositiveInt = 4
    """Channels of a latent; 3 x latent_factor squared for `pixel_unshuffle`."""
    vae: str | None = None
    """Folder of a diffusers AutoencoderKL, for `latent: vae`."""
    concatenate_condition: bool = False
    """Also lay the condition over the latent, each patch's channels at its place, as further input channels (Palette, arXiv
    2111.05826). A new U-Net otherwise spends thousands of steps on where each feature belongs; a pretrained one has no such input."""
    prediction_type: Literal["epsilon", "sample"] = "epsilon"
    """What the U-Net predicts, in diffusers' terms: the noise (Eq. 5), or the clean latent. In a short training the second paints
    clean pictures far sooner, since what it can't tell yet stays blurred rather than noisy."""
    num_train_timesteps: PositiveInt = 1000
    """Noise levels of the forward process (DDPM)."""
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "scaled_linear"
    """Noise schedule; `scaled_linear` is that of Stable Diffusion."""
    beta_start: float = 0.00085
    """Noise added by the first step of the schedule (Stable Diffusion's); `squaredcos_cap_v2` has no use for it."""
    beta_end: float = 0.012
    """Noise added by the last step of the schedule (Stable Diffusion's); `squaredcos_cap_v2` has no use for it."""

    def validate(self) -> None:
        levels = len(self.block_out_channels)
        check(
            len(self.cross_attention) == levels,
            f"model.cross_attention has {len(self.cross_attention)} entries, but model.block_out_channels has {levels}; give one each.",
        )
        for channels in self.block_out_channels:
            check(
                channels % self.norm_num_groups == 0 and channels % self.attention_head_dim == 0,
                f"model.block_out_channels {channels} must be a multiple of model.norm_num_groups {self.norm_num_groups}"
                f" and of model.attention_head_dim {self.attention_head_dim}.",
            )
        if self.latent == "pixel_unshuffle":
            channels = 3 * self.latent_factor**2
            check(
                self.latent_channels == channels,
                f"model.latent_channels {self.latent_channels} must be 3 x latent_factor^2 = {channels} for latent: pixel_unshuffle.",
            )
        else:
            check(
                self.vae is not None,
                "model.vae is not set; give the folder of an AutoencoderKL, or choose latent: pixel_unshuffle.",
            )
