"""The sizes of a tokenizer small enough for tests: 16 patches of 32 channels, 24 codes of 8."""

from lavit_dist.config.model import (
    CodebookConfig,
    MergerConfig,
    TokenizerDecoderConfig,
    VisionEncoderConfig,
    VisualTokenizerConfig,
)

SMALL = VisualTokenizerConfig(
    encoder=VisionEncoderConfig(image_size=32, patch_size=8, width=32, layers=2, head_width=8, mlp_hidden=64, head_out=16),
    merger=MergerConfig(layers=2, heads=4, mlp_hidden=64),
    codebook=CodebookConfig(size=24, dim=8),
    decoder=TokenizerDecoderConfig(depth=2, heads=4, mlp_hidden=64, unet_dim=16),
)
