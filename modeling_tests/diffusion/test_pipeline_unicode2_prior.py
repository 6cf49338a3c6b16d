"""Conditioning of the prior in stock pipelines of every form that Diffusers knows."""

import diffusers
import pytest
import torch
from painters import NO_TEXTS, PAINTERS, POOLED, WIDTH, make_flux, make_sana, make_sdxl
from PIL import Image

from transformers_unicode2 import UniCode2ConditionMapper, UniCode2FluxPipeline, UniCode2PriorPipeline
from transformers_unicode2.diffusion.pipeline_unicode2_prior import UniCode2PriorOutput, find_width

MAPPER = {"visual_dim": 192, "hidden_dim": 32, "output_dim": WIDTH, "num_visual_tokens": 64}
IDS = torch.arange(800, 864)[None]


def make_mapper(pooled_dim=POOLED, **changes):
    torch.manual_seed(0)
    return UniCode2ConditionMapper(**MAPPER, pooled_dim=pooled_dim, **changes).eval()


@pytest.fixture(scope="module")
def prior(tiny_checkpoint):
    return UniCode2PriorPipeline.from_unicode2(tiny_checkpoint, mapper=make_mapper())


def paint(pipe, condition, more=(), **kwargs):
    pipe.set_progress_bar_config(disable=True)
    arguments = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "pt", **dict(more), **kwargs}
    return pipe(**condition, generator=torch.Generator().manual_seed(0), **arguments).images


@pytest.mark.parametrize("name", PAINTERS)
def test_conditioning_reaches_the_pixels_of_stock_pipelines(prior, name):
    """Other tokens make another picture, and the text encoders are not needed, with guidance neither."""
    torch.manual_seed(0)
    make, more = PAINTERS[name]
    pipe = make()
    picture = Image.new("RGB", (32, 32), "gray")
    more = {key: picture if value == "image" else value for key, value in more.items()}
    outputs = [prior(visual_token_ids=ids).for_pipeline(pipe) for ids in (IDS, IDS + 5000)]
    first, again, other = (paint(pipe, condition, more) for condition in (outputs[0], *outputs))
    assert first.isfinite().all() and torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-6)


def test_two_images_of_each_prompt(prior):
    ids = torch.cat([IDS, IDS + 5000])
    condition = prior(visual_token_ids=ids, num_images_per_prompt=2)
    assert torch.equal(condition.visual_token_ids, ids[[0, 0, 1, 1]])
    assert condition.prompt_embeds.shape == (4, 64, WIDTH) and condition.pooled_prompt_embeds.shape == (4, POOLED)
    images = paint(make_sdxl(), condition.for_pipeline(make_sdxl()))
    assert len(images) == 4


def test_forms_of_the_arguments(prior):
    condition = prior(visual_token_ids=IDS)
    flux = condition.for_pipeline(make_flux())
    assert sorted(flux) == [
        "negative_pooled_prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "prompt_embeds"
    ]  # fmt: skip
    sana = condition.for_pipeline(make_sana().to(torch.bfloat16))
    names = ("prompt_embeds", "prompt_attention_mask")
    assert sana.keys() == {*names, *(f"negative_{name}" for name in names), "negative_prompt"}
    assert sana["prompt_embeds"].dtype == torch.bfloat16 and sana["prompt_attention_mask"].all()
    (embeds,) = condition.for_pipeline(PAINTERS["Z-Image"][0]())["prompt_embeds"]
    assert torch.equal(embeds, condition.prompt_embeds[0])


def test_prompts_and_pictures(prior, photo):
    options = {"prior_generation_kwargs": {"max_plan_tokens": 0}, "num_candidates": 1}
    drawn = prior("a red circle", generator=torch.Generator().manual_seed(0), **options)
    again = prior(visual_token_ids=drawn.visual_token_ids)
    assert torch.equal(drawn.prompt_embeds, again.prompt_embeds)
    embeds, pooled, ids = prior(image=photo, return_dict=False)
    assert ids.shape == (1, 64) and torch.equal(prior(visual_token_ids=ids).pooled_prompt_embeds, pooled)


def test_a_saved_prior_is_a_repository(prior, tmp_path):
    prior.save_pretrained(tmp_path)
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(again) is UniCode2PriorPipeline and again.config.num_candidates == 1
    assert torch.equal(again(visual_token_ids=IDS).prompt_embeds, prior(visual_token_ids=IDS).prompt_embeds)


def test_parts_of_two_repositories_without_text_encoders(tiny_checkpoint, prior, tmp_path):
    """Of the decoder's, only its own parts are read."""
    make_flux().save_pretrained(tmp_path / "flux")
    make_mapper().save_pretrained(tmp_path / "mapper")
    (tmp_path / "flux" / "text_encoder").mkdir()
    pipe = UniCode2FluxPipeline.from_unicode2(
        tiny_checkpoint, tmp_path / "flux", tmp_path / "mapper", dtype=torch.bfloat16
    )
    dtypes = {pipe.transformer.dtype, pipe.condition_mapper.dtype, pipe.vision_language_encoder.lm_head.weight.dtype}
    assert dtypes == {torch.bfloat16} and pipe.text_encoder is None
    assert pipe.vision_language_encoder.get_quantizer().codebook.codes.dtype == torch.float32
    own = UniCode2PriorPipeline.from_unicode2(tiny_checkpoint)
    assert own.condition_mapper.config.output_dim == 192


def make_ernie():
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_layers": 1, "ffn_hidden_size": 32, "in_channels": 4}
    transformer = diffusers.ErnieImageTransformer2DModel(**sizes, text_in_dim=WIDTH, rope_axes_dim=(4, 4, 8))
    return diffusers.ErnieImagePipeline(transformer, None, None, None, None)


def make_wan():
    """With the second of its transformers alone."""
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1, "ffn_dim": 32, "freq_dim": 32}
    transformer = diffusers.WanTransformer3DModel(**sizes, text_dim=WIDTH)
    return diffusers.WanPipeline(None, None, None, None, transformer_2=transformer, boundary_ratio=0.9)


def make_wuerstchen():
    from diffusers.pipelines.deprecated.wuerstchen import WuerstchenPrior

    prior = WuerstchenPrior(c_in=4, c=8, c_cond=WIDTH, c_r=8, depth=1, nhead=2)
    return diffusers.WuerstchenPriorPipeline(None, None, prior, None)


@pytest.mark.parametrize(
    "make, mapper, message",
    [
        (lambda: diffusers.DDPMPipeline(None, None), {}, "DDPMPipeline takes no `prompt_embeds`. Supported are"),
        (make_flux, {"output_dim": 16}, "FluxPipeline takes `prompt_embeds` 32 wide, and the mapper makes 16"),
        (make_flux, {"pooled_dim": 8}, f"takes `pooled_prompt_embeds` {POOLED} wide, and the mapper makes 8"),
        (make_sdxl, {"pooled_dim": 8}, f"takes `pooled_prompt_embeds` {POOLED} wide, and the mapper makes 8"),
        (make_sdxl, {"pooled_dim": None}, "StableDiffusionXLPipeline takes `pooled_prompt_embeds`, which this mapper"),
        (make_ernie, {"output_dim": 16}, "ErnieImagePipeline takes `prompt_embeds` 32 wide, and the mapper makes 16"),
        (make_wan, {"output_dim": 16}, "WanPipeline takes `prompt_embeds` 32 wide, and the mapper makes 16"),
        (make_wuerstchen, {"output_dim": 16}, "WuerstchenPriorPipeline takes `prompt_embeds` 32 wide, and the mapper"),
    ],
)
def test_pipelines_that_do_not_fit_are_refused(make, mapper, message):
    sizes = {"output_dim": WIDTH, "pooled_dim": POOLED, **mapper}
    pooled = None if sizes["pooled_dim"] is None else torch.zeros(1, sizes["pooled_dim"])
    condition = UniCode2PriorOutput(torch.zeros(1, 64, sizes["output_dim"]), pooled, IDS)
    with pytest.raises(ValueError, match=message):
        condition.for_pipeline(make())


@pytest.mark.parametrize(
    ("kind", "needs"),
    [
        ("AmusedPipeline", "`encoder_hidden_states`"),
        ("AudioLDM2Pipeline", "`generated_prompt_embeds`"),
        ("HunyuanDiTPipeline", "`prompt_embeds_2`"),
        ("HunyuanImagePipeline", "`prompt_embeds_2`"),
        ("HunyuanVideo15Pipeline", "`prompt_embeds_2`"),
        ("Kandinsky3Pipeline", "`attention_mask`"),
        ("Krea2Pipeline", "embeddings of several layers of its text encoder"),
        ("StableAudioPipeline", "`attention_mask`"),
        ("StableAudio3Pipeline", "`encoder_attention_mask`"),
        ("StableCascadePriorPipeline", "`prompt_embeds_pooled`"),
        ("ZImageOmniPipeline", "several embeddings for each prompt"),
    ],
)
def test_pipelines_that_need_more_than_we_make_are_refused(kind, needs):
    with pytest.raises(ValueError, match=f"{kind} needs {needs}.*, which nothing here makes. Supported are pipelines"):
        UniCode2PriorOutput(torch.zeros(1, 64, WIDTH), None, IDS).for_pipeline(object.__new__(getattr(diffusers, kind)))


@pytest.mark.parametrize(
    ("config", "width"),
    [
        ({"cross_attention_dim": 4096, "encoder_hid_dim": 2048}, 2048),
        ({"cross_attention_dim": 1280, "encoder_hid_dim": 4096, "encoder_hid_dim_type": "text_proj"}, 4096),
        ({"cross_attention_dim": 768, "encoder_hid_dim": 1024, "encoder_hid_dim_type": "ip_image_proj"}, 768),
        ({"context_in_dim": 2304}, 2304),
        ({"in_text_dim": 3584, "in_text_dim2": 768}, 3584),
        ({"sample_size": 64}, None),
    ],
)
def test_the_width_that_a_decoder_reads(config, width):
    assert find_width(config) == width


@pytest.mark.parametrize("field, width", [("visual_dim", 16), ("num_visual_tokens", 81)])
def test_a_mapper_of_another_model_is_refused(prior, field, width):
    torch.manual_seed(0)
    other = UniCode2ConditionMapper(**{**MAPPER, field: width})
    with pytest.raises(ValueError, match=f"`{field}` of the condition mapper is {width}, and .* {MAPPER[field]}; take"):
        UniCode2PriorPipeline(prior.vision_language_encoder, prior.processor, other)


def test_a_mapper_of_another_decoder_is_refused(prior):
    parts = {name: part for name, part in make_flux().components.items() if name not in NO_TEXTS and part is not None}
    parts |= {"vision_language_encoder": prior.vision_language_encoder, "processor": prior.processor}
    with pytest.raises(ValueError, match="`pooled_dim` of the condition mapper is 8, and the decoder reads 24"):
        UniCode2FluxPipeline(**parts, condition_mapper=make_mapper(pooled_dim=8))


def test_exactly_one_thing_is_painted(prior):
    with pytest.raises(ValueError, match="exactly one of `prompt`, `image` and `visual_token_ids`; got none"):
        prior()
