"""What people bring to SDXL beside tokens: LoRAs, IP adapters, texts and sizes; and how it is then saved."""

import diffusers
import pytest
import torch
from adapters import needs_peft_of_transformers
from painters import NO_TEXTS
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from test_pipeline_unicode2_stable_diffusion_xl import IDS, load, paint

from transformers_unicode2 import UniCode2PriorPipeline, UniCode2StableDiffusionXLPipeline


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint, folders):
    return load(tiny_checkpoint, folders)


@pytest.fixture(scope="module")
def lora(folders, tmp_path_factory):
    """A LoRA of the U-Net and of both text encoders, as most for SDXL are."""
    torch.manual_seed(0)
    stock = diffusers.StableDiffusionXLPipeline.from_pretrained(folders / "sdxl")
    layers = {}
    for part, names in (("unet", ["to_q"]), ("text_encoder", ["q_proj"]), ("text_encoder_2", ["q_proj"])):
        module = getattr(stock, part)
        inject_adapter_in_model(LoraConfig(r=2, lora_alpha=64, target_modules=names, init_lora_weights=False), module)
        layers[f"{part}_lora_layers"] = get_peft_model_state_dict(module, adapter_name="default")
    folder = tmp_path_factory.mktemp("lora")
    diffusers.StableDiffusionXLPipeline.save_lora_weights(folder, **layers)
    return folder


def test_a_lora_of_text_encoders_loads_without_them(tiny_checkpoint, folders, lora):
    pipe = load(tiny_checkpoint, folders)
    before = paint(pipe, visual_token_ids=IDS)
    pipe.load_lora_weights(lora)
    assert not torch.allclose(paint(pipe, visual_token_ids=IDS), before, atol=1e-4)
    pipe.unload_lora_weights()
    # Layers that PEFT has wrapped once may round otherwise, in the last bits.
    torch.testing.assert_close(paint(pipe, visual_token_ids=IDS), before, rtol=0, atol=1e-5)


@needs_peft_of_transformers
def test_a_lora_of_text_encoders_loads_into_them(tiny_checkpoint, folders, lora):
    stock = diffusers.DiffusionPipeline.from_pretrained(folders / "sdxl")
    whole = load(tiny_checkpoint, folders, **{name: stock.components[name] for name in NO_TEXTS})
    whole.load_lora_weights(lora)
    assert all(getattr(whole, part).peft_config for part in ("unet", "text_encoder", "text_encoder_2"))


def test_a_pipeline_with_an_adapter_is_not_saved(tiny_checkpoint, folders, lora, tmp_path):
    pipe = load(tiny_checkpoint, folders)
    pipe.load_lora_weights(lora)
    with pytest.raises(ValueError, match="`unet` carries an adapter, and saved so it could not be loaded; call `fuse_"):
        pipe.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    expected = paint(pipe, visual_token_ids=IDS)
    pipe.fuse_lora(components=["unet"])
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "out")
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(paint(again, visual_token_ids=IDS), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("part", ["vision_language_encoder", "processor"])
def test_a_pipeline_without_a_part_is_not_saved(tiny_checkpoint, folders, tmp_path, part):
    pipe = load(tiny_checkpoint, folders)
    setattr(pipe, part, None)
    with pytest.raises(ValueError, match=f"`{part}` is None; a pipeline without it cannot be saved"):
        pipe.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_picture_for_an_adapter_needs_its_encoder(pipe, photo, monkeypatch):
    monkeypatch.setattr(pipe.unet, "encoder_hid_proj", torch.nn.Identity())
    with pytest.raises(ValueError, match="`ip_adapter_image` needs the `image_encoder` of an IP adapter; load it"):
        paint(pipe, visual_token_ids=IDS, ip_adapter_image=photo)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"text_prompt": 5}, "`text_prompt` holds int; it must be a string or a list of strings"),
        ({"text_prompt": ["a", 6]}, "`text_prompt` holds int"),
        ({"negative_prompt": 5}, "`negative_prompt` holds int"),
        ({"prompt_2": "b"}, "`prompt_2` is not read: the tokens are the conditioning. Give it as `text_prompt`"),
        ({"original_size": 512}, "`original_size` is 512; it must be a pair of whole numbers of pixels"),
        ({"target_size": [512, "a"]}, r"`target_size` is \[512, 'a'\]; it must be a pair"),
        ({"negative_original_size": (1, 1)}, "Give `negative_original_size` and `negative_target_size`, or neither"),
    ],
)
def test_texts_and_sizes_of_other_types_are_refused(pipe, given, message):
    with pytest.raises(ValueError, match=message):
        paint(pipe, visual_token_ids=IDS, **given)


def test_the_prior_paints_what_the_pipeline_does(pipe, tiny_checkpoint, folders):
    """Also by what SDXL is told of the size."""
    prior = UniCode2PriorPipeline.from_unicode2(tiny_checkpoint, mapper=folders / "mapper")
    stock = diffusers.StableDiffusionXLPipeline.from_pretrained(folders / "sdxl")
    stock.set_progress_bar_config(disable=True)
    given = prior(visual_token_ids=IDS).for_pipeline(stock)
    painted = paint(stock, **given, guidance_scale=3.5)
    assert torch.equal(painted, paint(pipe, visual_token_ids=IDS, guidance_scale=3.5))


@pytest.mark.parametrize(
    ("dtype", "dtypes"),
    [
        ({"default": torch.bfloat16}, 4 * [torch.bfloat16]),
        (
            {"default": torch.bfloat16, "condition_mapper": torch.float32},
            [torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16],
        ),
        ("bfloat16", 4 * [torch.bfloat16]),
    ],
)
def test_dtypes_of_components(tiny_checkpoint, folders, dtype, dtypes):
    pipe = load(tiny_checkpoint, folders, dtype=dtype)
    parts = ("vision_language_encoder", "condition_mapper", "unet", "vae")
    assert [getattr(pipe, part).dtype for part in parts] == dtypes


def test_a_dtype_that_is_none_is_refused(tiny_checkpoint, folders):
    with pytest.raises(ValueError, match="`dtype` is 'half-precision'; it must be a dtype of torch, or the name"):
        UniCode2StableDiffusionXLPipeline.from_unicode2(
            tiny_checkpoint, folders / "sdxl", folders / "mapper", dtype="half-precision"
        )
