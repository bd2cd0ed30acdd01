"""References of other sizes and other sets of files than those that come beside the repository."""

import json

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lavit_dist.checkpoint.official import save_visual_tokenizer
from lavit_dist.checkpoint.reference import reference_config
from lavit_dist.evaluation.reference_check import check_reference
from lavit_dist.evaluation.reference_vectors import compute
from lavit_dist.models.initialisation import initialise
from lavit_dist.models.tokenizer_decoder import HighResolutionTokenizerDecoder
from lavit_dist.models.visual_tokenizer import VisualTokenizer

PARTS = st.fixed_dictionaries({"highres": st.booleans(), "projection": st.sampled_from(["none", "beside", "own"])})


@settings(max_examples=8)
@given(
    parts=PARTS,
    image_size=st.sampled_from([28, 42, 84]),
    heads=st.sampled_from([2, 4]),
    width=st.sampled_from([32, 64]),
    depth=st.integers(1, 3),
    codes=st.sampled_from([2, 300]),
)
def test_a_reference_of_other_sizes_is_verified(tmp_path_factory, parts, image_size, heads, width, depth, codes):
    """Vectors that this code made of other sizes and other sets of files are reproduced, and an altered weight is found."""
    folder = tmp_path_factory.mktemp("other")
    sizes = {
        "image_size": image_size,
        "patch_size": 14,
        "encoder": {"width": width, "head_width": width // heads, "layers": depth, "mlp_ratio": 4.3637, "head_out": 8},
        "merger": {"layers": depth, "heads": heads},
        "codebook": {"size": codes, "dim": 4},
        "llm_hidden": 24,
        "decoder": {"depth": depth, "heads": heads, "lowres_out": 12, "highres_out": [8, 16], "pooled": 20},
    }
    (folder / "config.json").write_text(json.dumps(sizes))
    torch.manual_seed(0)
    config = reference_config(folder)
    tokenizer = VisualTokenizer(config)
    tokenizer.highres_decoder = HighResolutionTokenizerDecoder(config) if parts["highres"] else None
    initialise(tokenizer)
    if parts["projection"] == "none":
        tokenizer.understanding = None
    elif parts["projection"] == "beside":
        tokenizer.understanding.causal_encoder.load_state_dict(tokenizer.merger.state_dict())
    tokenizer.eval().requires_grad_(False)
    save_visual_tokenizer(tokenizer, folder)
    (folder / "visual_tokenizer" / "config.json").unlink()
    if parts["projection"] == "beside":
        own = folder / "language_model" / "visual_weight.bin"
        projection = {key: tensor for key, tensor in torch.load(own).items() if key.startswith("vit_proj.")}
        own.unlink()
        path = folder / "visual_tokenizer" / "tokenizer_encoder.bin"
        torch.save(torch.load(path, weights_only=True) | projection, path)
    pixels, noise = torch.randn(3, 3, image_size, image_size), torch.randn(3, config.encoder.num_patches, 2)
    outputs = dict(compute(tokenizer, pixels, noise, "code_ids_plus_7"))
    vectors = {key: of.float() if of.dtype == torch.bool else of.contiguous() for key, of in outputs.items()}
    save_file({"pixel_values": pixels, "gumbel_noise": noise, **vectors}, folder / "vectors.safetensors")
    assert check_reference(folder).ok
    path = folder / "visual_tokenizer" / "eva_vitg_psz14.bin"
    state = torch.load(path, weights_only=True)
    state["blocks.0.mlp.fc1.bias"][0] += 1
    torch.save(state, path)
    assert not check_reference(folder).ok
