"""Small encoders of each kind, with their image processors, and codes found for them without our own code."""

import numpy as np
import torch
from transformers import CLIPVisionModel, SiglipVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from transformers_unicode2 import UniCode2Quantizer, UniCode2QuantizerConfig

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
SQUARE, CROP = {"height": 32, "width": 32}, {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
# Class of the encoder, its configuration, its image processor.
KINDS = {
    "siglip": (SiglipVisionModel, {"image_size": 32, "patch_size": 8}, SiglipImageProcessorPil(size=SQUARE)),
    "siglip2": (
        SiglipVisionModel,
        {"image_size": 256, "patch_size": 16, "num_hidden_layers": 1},
        SiglipImageProcessorPil(size={"height": 256, "width": 256}, resample=2),
    ),
    "clip": (CLIPVisionModel, {"image_size": 32, "patch_size": 8}, CLIPImageProcessorPil(**CROP)),
}


def randomize(model, seed: int = 0):
    """All weights at random, those too that begin as zeros or ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(0.5 * torch.randn(weight.shape, generator=generator))
    return model.eval()


def make_encoder(kind: str, seed: int = 0, **changes):
    """A stock encoder of a kind with random weights, and its stock image processor."""
    model_class, settings, image_processor = KINDS[kind]
    return randomize(model_class(model_class.config_class(**{**SIZES, **settings, **changes})), seed), image_processor


def save_encoder(folder, kind: str, seed: int = 0):
    """Writes a folder with an encoder of a kind."""
    for part in make_encoder(kind, seed):
        part.save_pretrained(folder)
    return folder


def make_pixels(kind: str, num_images: int = 2) -> torch.Tensor:
    """Preprocessed images `(num_images, 3, height, width)` for an encoder of a kind."""
    side = KINDS[kind][1]["image_size"]
    return torch.randn(num_images, 3, side, side, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def make_codes(kind: str) -> torch.Tensor:
    """96 of the features of an encoder of a kind as codes, `(96, 16)`, rounded to bfloat16."""
    features = make_encoder(kind)[0](make_pixels(kind, 8)).last_hidden_state.flatten(0, 1)
    return features[:: len(features) // 96][:96].bfloat16().float()


def make_quantizer(kind: str, dtype: str = "float32", seed: int = 0) -> UniCode2Quantizer:
    """A quantizer with an encoder of a kind and its codes."""
    encoder, _ = make_encoder(kind, seed, **({"vision_use_head": False} if kind != "clip" else {}))
    codebook = {"codebook_size": 96, "codebook_dim": 16, "num_cells": 4, "encoder_dtype": dtype}
    quantizer = UniCode2Quantizer(
        UniCode2QuantizerConfig(vision_config=encoder.config.to_dict(), codebook_config=codebook)
    )
    quantizer.vision_model.load_state_dict(encoder.state_dict())
    quantizer.codebook.codes.copy_(make_codes(kind))
    return quantizer


def find_codes(folder, kind: str, images: list, codes: torch.Tensor, dtype: torch.dtype) -> torch.LongTensor:
    """The nearest code of each patch feature by stock classes and a search of all codes in float64."""
    model_class, _, image_processor = KINDS[kind]
    encoder = model_class.from_pretrained(folder, dtype=dtype).eval()
    pixels = torch.from_numpy(np.stack([image_processor(image)["pixel_values"][0] for image in images]))
    with torch.no_grad():
        features = encoder(pixels.to(dtype)).last_hidden_state  # (num_images, num_patches or one more, hidden_size)
    features = features[:, 1:] if kind == "clip" else features
    differences = features.double()[..., None, :] - codes.double()  # (num_images, num_patches, num_codes, hidden_size)
    return differences.square().sum(-1).argmin(-1)
