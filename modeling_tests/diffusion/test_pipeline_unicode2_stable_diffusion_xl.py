"""SDXL painting visual tokens: what is its own, beside what all pipelines share with FLUX."""

from types import SimpleNamespace

import diffusers
import pytest
import torch
from painters import NO_TEXTS, POOLED, WIDTH, make_sdxl_parts

from transformers_unicode2 import (
    UniCode2FluxPipeline,
    UniCode2PriorPipeline,
    UniCode2StableDiffusionXLPipeline,
)
from transformers_unicode2.hub.assemble import assemble_pipeline

IDS = torch.arange(800, 864)[None]
QUICK = {"num_candidates": 1, "prior_generation_kwargs": {"max_plan_tokens": 0}, "prior_guidance_scale": 1.0}


def load(tiny_checkpoint, folders, decoder="sdxl", **kwargs):
    kind = {"sdxl": UniCode2StableDiffusionXLPipeline, "flux": UniCode2FluxPipeline}[decoder]
    pipe = kind.from_unicode2(tiny_checkpoint, folders / decoder, folders / "mapper", **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint, folders):
    return load(tiny_checkpoint, folders)


def paint(pipe, **kwargs):
    arguments = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "pt", **kwargs}
    return pipe(**{"generator": torch.Generator().manual_seed(0), **arguments}).images


def test_tokens_reach_the_pixels(pipe):
    first, other = paint(pipe, visual_token_ids=IDS), paint(pipe, visual_token_ids=IDS + 5000)
    assert first.shape == (1, 3, 32, 32) and first.isfinite().all() and not torch.allclose(first, other, atol=1e-6)


def test_defaults_are_the_papers(pipe):
    assert (pipe.config.image_size, pipe.config.num_inference_steps, pipe.config.guidance_scale) == (512, 50, 3.5)
    seen = []
    pipe.unet.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    paint(pipe, visual_token_ids=IDS)
    ids = seen[0]["added_cond_kwargs"]["time_ids"]
    assert ids.tolist() == [[1024, 1024, 0, 0, 32, 32]] * 2
    # Guided away from zeros
    assert not seen[0]["encoder_hidden_states"][0].any() and seen[0]["encoder_hidden_states"][1].any()
    paint(pipe, visual_token_ids=IDS, guidance_scale=1.0, original_size=(64, 64))
    ids = seen[-1]["added_cond_kwargs"]["time_ids"]
    assert ids.tolist() == [[64, 64, 0, 0, 32, 32]]
    pipe.unet._forward_pre_hooks.clear()


def test_prompts_pictures_and_given_conditioning(pipe, photo):
    drawn = pipe(
        "a red circle", height=32, width=32, num_inference_steps=1, output_type="pt", num_images_per_prompt=2,
        generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)], **QUICK,
    )  # fmt: skip
    assert drawn.images.shape == (2, 3, 32, 32) and drawn.visual_token_ids.shape == (2, 64)
    assert paint(pipe, image=photo).isfinite().all()
    embeds, pooled = pipe.encode_visual_tokens(IDS)
    given = pipe(
        prompt_embeds=embeds, pooled_prompt_embeds=pooled, height=32, width=32, num_inference_steps=2,
        generator=torch.Generator().manual_seed(0), output_type="pt",
    )  # fmt: skip
    assert given.visual_token_ids is None and torch.equal(given.images, paint(pipe, visual_token_ids=IDS))


def test_a_saved_pipeline_paints_the_same(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    for kind in (diffusers.DiffusionPipeline, diffusers.AutoPipelineForText2Image):
        again = kind.from_pretrained(tmp_path)
        again.set_progress_bar_config(disable=True)
        assert type(again) is UniCode2StableDiffusionXLPipeline
        assert torch.equal(paint(again, visual_token_ids=IDS), paint(pipe, visual_token_ids=IDS))


@pytest.mark.parametrize("decoder", ["sdxl", "flux"])
def test_negative_embeddings_go_to_the_images_of_their_prompts(tiny_checkpoint, folders, decoder):
    """One for all, one for each prompt, or one for each image, as the stock pipelines repeat them."""
    pipe, ids = load(tiny_checkpoint, folders, decoder), torch.cat([IDS, IDS + 5000])
    negative = pipe.encode_visual_tokens(IDS + 900)[0].repeat(2, 1, 1) * torch.tensor([1.0, 2.0])[:, None, None]
    pooled = torch.ones(2, POOLED)
    guided = {"true_cfg_scale": 2.0} if decoder == "flux" else {"guidance_scale": 2.0}

    def draw(rows, dtype=torch.float32):
        given = {"negative_prompt_embeds": negative[rows].to(dtype), "negative_pooled_prompt_embeds": pooled[rows]}
        latents = {"generator": [torch.Generator().manual_seed(1) for _ in range(4)]}
        return paint(pipe, visual_token_ids=ids, num_images_per_prompt=2, **given, **guided, **latents)

    each, every = draw([0, 1]), draw([0, 0, 1, 1])
    assert torch.equal(each, every) and not torch.allclose(each[2:], draw([0])[2:], atol=1e-6)
    assert torch.equal(draw([0]), draw([0, 0])) and draw([0], torch.float16).isfinite().all()


@pytest.mark.parametrize("decoder", ["sdxl", "flux"])
def test_conditioning_of_another_shape_is_refused(tiny_checkpoint, folders, decoder):
    pipe = load(tiny_checkpoint, folders, decoder)
    embeds, pooled = torch.zeros(2, 8, WIDTH), torch.zeros(2, POOLED)
    pair = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    guided = {"true_cfg_scale": 2.0} if decoder == "flux" else {"guidance_scale": 2.0}
    for given, message in (
        (
            {"prompt_embeds": embeds[..., :-1]},
            rf"`prompt_embeds` is \(2, 8, {WIDTH - 1}\); it must be a floating-point",
        ),
        ({"prompt_embeds": embeds[0]}, rf"`prompt_embeds` is \(8, {WIDTH}\); it must be"),
        ({"prompt_embeds": embeds.numpy()}, "`prompt_embeds` is ndarray; it must be"),
        ({"prompt_embeds": embeds.long()}, r"a floating-point tensor of shape \(batch_size, num_tokens, "),
        ({"pooled_prompt_embeds": pooled[:1]}, "`prompt_embeds` has 2 and `pooled_prompt_embeds` has 1 rows"),
        ({"pooled_prompt_embeds": pooled[:, :3]}, r"`pooled_prompt_embeds` is \(2, 3\)"),
        (
            {
                "negative_prompt_embeds": torch.zeros(3, 8, WIDTH),
                "negative_pooled_prompt_embeds": torch.zeros(3, POOLED),
            },
            "`negative_prompt_embeds` has 3 rows, and 2 images are drawn; give one, or one for each",
        ),
    ):
        arguments = {**pair, **guided, **given}
        with pytest.raises(ValueError, match=message):
            paint(pipe, **arguments)
    # In the decoder's dtype, whatever they come in
    given = {"prompt_embeds": embeds.bfloat16(), "pooled_prompt_embeds": pooled.bfloat16()}
    assert paint(pipe, **given).isfinite().all()


@pytest.mark.parametrize("decoder", ["sdxl", "flux"])
def test_what_a_call_needs_is_there(tiny_checkpoint, folders, decoder, photo):
    """A pipeline may be loaded without what its calls do not use."""
    part = "unet" if decoder == "sdxl" else "transformer"
    whole = load(tiny_checkpoint, folders, decoder)
    parts = dict(whole.components)
    for missing, source, output_type in (
        (part, {"visual_token_ids": IDS}, "pil"),
        ("vision_language_encoder", {"visual_token_ids": IDS}, "pil"),
        ("condition_mapper", {"image": photo}, "pil"),
        ("processor", {"prompt": "a cat"}, "pil"),
        ("vae", {"visual_token_ids": IDS}, "pt"),
    ):
        pipe = type(whole)(**{**parts, missing: None})
        with pytest.raises(ValueError, match=f"cannot be painted: this pipeline was loaded without `{missing}`"):
            paint(pipe, **source, output_type=output_type)
    embeds, pooled = whole.encode_visual_tokens(IDS)
    pipe = type(whole)(**{**parts, **dict.fromkeys(("vision_language_encoder", "processor", "condition_mapper"))})
    pipe.set_progress_bar_config(disable=True)
    painted = paint(pipe, prompt_embeds=embeds, pooled_prompt_embeds=pooled)
    assert torch.equal(painted, paint(whole, visual_token_ids=IDS))


def test_decoders_of_other_kinds_are_refused(tiny_checkpoint, folders, tmp_path):
    for kind, decoder, message in (
        (
            UniCode2FluxPipeline,
            folders / "sdxl",
            "sdxl is a StableDiffusionXLPipeline, and UniCode2FluxPipeline paints",
        ),
        (UniCode2StableDiffusionXLPipeline, folders / "flux", "with the decoder of a StableDiffusionXLPipeline. Other"),
        (UniCode2FluxPipeline, None, "UniCode2FluxPipeline needs the decoder of a FluxPipeline; give its folder"),
        (UniCode2PriorPipeline, folders / "flux", "UniCode2PriorPipeline has no decoder; leave .*flux out"),
    ):
        with pytest.raises(ValueError, match=message):
            kind.from_unicode2(tiny_checkpoint, decoder, folders / "mapper")


def test_options_of_loading_reach_all_parts(tiny_checkpoint, folders, monkeypatch):
    from transformers_unicode2.diffusion import repository_unicode2

    seen, stock = {}, repository_unicode2.VisionLanguageEncoder.from_pretrained

    def note(folder, **kwargs):
        seen.update(kwargs)
        return stock(folder, **{k: v for k, v in kwargs.items() if k != "quantization_config"})

    monkeypatch.setattr(repository_unicode2.VisionLanguageEncoder, "from_pretrained", note)
    load(tiny_checkpoint, folders, local_files_only=True, dtype=torch.bfloat16)
    assert seen == {"local_files_only": True, "dtype": torch.bfloat16}
    prior = UniCode2PriorPipeline.from_unicode2(tiny_checkpoint, mapper=folders / "mapper", local_files_only=True)
    assert prior.condition_mapper is not None


def test_quantization_is_for_the_language_model_too():
    from transformers_unicode2.diffusion.repository_unicode2 import split_quantization

    class Config(SimpleNamespace):
        def _resolve_quant_config(self, is_diffusers, module_name):
            wanted = self.components_to_quantize
            return (is_diffusers, module_name) if not wanted or module_name in wanted else None

    def split(named):
        config = Config(quant_mapping=None, components_to_quantize=named)
        return [part.get("quantization_config") for part in split_quantization(config)]

    model, mapper, decoder = split(None)
    assert model == (False, "vision_language_encoder") and mapper is None and decoder.components_to_quantize is None
    model, mapper, decoder = split(["vision_language_encoder", "condition_mapper", "transformer"])
    assert model and mapper == (True, "condition_mapper") and decoder.components_to_quantize == ["transformer"]
    assert split(["vision_language_encoder"])[1:] == [None, None] and split(["transformer"])[0] is None


@pytest.mark.parametrize("decoder", ["sdxl", "flux"])
def test_painting_can_be_interrupted_and_cached(tiny_checkpoint, folders, decoder):
    from diffusers import FirstBlockCacheConfig

    pipe, steps = load(tiny_checkpoint, folders, decoder), []

    def stop(pipe, step, timestep, values):
        steps.append(step)
        pipe._interrupt = step == 1
        return values

    paint(pipe, visual_token_ids=IDS, num_inference_steps=6, callback_on_step_end=stop)
    assert steps == [0, 1]
    if decoder == "flux":
        pipe._interrupt, calls = False, []
        pipe.transformer.single_transformer_blocks[-1].attn.register_forward_hook(lambda *_: calls.append(1))
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
        paint(pipe, visual_token_ids=IDS, num_inference_steps=6)
        assert len(calls) < 6
        pipe.transformer.disable_cache()


@pytest.mark.parametrize("decoder", ["sdxl", "flux"])
def test_text_encoders_read_beside_the_tokens(tiny_checkpoint, folders, decoder):
    """The conditioning is that of the texts followed by that of the tokens, the pooled one that of the texts."""
    stock = diffusers.DiffusionPipeline.from_pretrained(folders / decoder)
    parts = {name: stock.components[name] for name in NO_TEXTS}
    pipe = load(tiny_checkpoint, folders, decoder, **parts)
    text = stock.encode_prompt(["cat", "dog"], None, device="cpu")
    pooled = text[2] if decoder == "sdxl" else text[1]
    seen = {}
    painter = pipe.unet if decoder == "sdxl" else pipe.transformer
    painter.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    ids = torch.cat([IDS, IDS + 5000])
    image = paint(pipe, visual_token_ids=ids, text_prompt=["cat", "dog"], guidance_scale=1.0)
    embeds, _ = pipe.encode_visual_tokens(ids)
    expected = torch.cat([text[0], embeds], 1)
    torch.testing.assert_close(seen["encoder_hidden_states"], expected, rtol=1e-4, atol=1e-4)
    given = seen["added_cond_kwargs"]["text_embeds"] if decoder == "sdxl" else seen["pooled_projections"]
    torch.testing.assert_close(given, pooled, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(image, paint(pipe, visual_token_ids=ids, guidance_scale=1.0), atol=1e-6)
    with pytest.raises(ValueError, match="`text_prompt` makes 3 texts, and 2 images are drawn; give one, or one for"):
        paint(pipe, visual_token_ids=ids, text_prompt=["a", "b", "c"])


@pytest.mark.parametrize("decoder", ["sdxl", "flux"])
def test_negative_prompts_are_read_by_text_encoders(tiny_checkpoint, folders, decoder):
    """As many tokens: those of the text, and zeros behind them; the pooled one is that of the text."""
    stock = diffusers.DiffusionPipeline.from_pretrained(folders / decoder)
    pipe = load(tiny_checkpoint, folders, decoder, **{name: stock.components[name] for name in NO_TEXTS})
    seen = []
    painter = pipe.unet if decoder == "sdxl" else pipe.transformer
    painter.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    scale = {"guidance_scale": 3.0} if decoder == "sdxl" else {"true_cfg_scale": 3.0}
    calls = {"visual_token_ids": torch.cat([IDS, IDS + 5000]), "num_inference_steps": 1, **scale}
    text = {"negative_prompt": ["cat", "dog"], "negative_prompt_2": ["sun", "sky"]}
    length = {} if decoder == "sdxl" else {"max_sequence_length": 16}
    plain, guided = paint(pipe, **calls), paint(pipe, **calls, **text, **length)
    assert not torch.allclose(plain, guided, atol=1e-6)
    if decoder == "sdxl":
        embeds, _, pooled, _ = stock.encode_prompt(*text.values(), do_classifier_free_guidance=False)
        given = seen[-1]["encoder_hidden_states"][:2], seen[-1]["added_cond_kwargs"]["text_embeds"][:2]
    else:
        embeds, pooled, _ = stock.encode_prompt(*text.values(), max_sequence_length=16)
        given = seen[-1]["encoder_hidden_states"], seen[-1]["pooled_projections"]
    torch.testing.assert_close(given[0][:, :16], embeds, rtol=1e-4, atol=1e-4)
    assert given[0].shape[1] == 64 and not given[0][:, 16:].any()
    torch.testing.assert_close(given[1], pooled, rtol=1e-4, atol=1e-4)
    # Beside a text for each image, which makes more tokens
    joined = paint(pipe, **calls, **text, **length, text_prompt=["cat", "dog"])
    assert seen[-1]["encoder_hidden_states"].shape[1] == 80 and not torch.equal(joined, guided)
    with pytest.raises(ValueError, match="`negative_prompt` makes 3 texts, and 2 images are drawn"):
        paint(pipe, **calls, negative_prompt=["a", "b", "c"])
    with pytest.raises(ValueError, match="`negative_prompt_2` is given without `negative_prompt`"):
        paint(pipe, **calls, negative_prompt_2="a")
    with pytest.raises(ValueError, match="`negative_prompt` makes 16 embeddings, and the tokens of an image make 8;"):
        embeds = {"prompt_embeds": torch.zeros(1, 8, WIDTH), "pooled_prompt_embeds": torch.zeros(1, POOLED)}
        paint(pipe, **embeds, **scale, **length, negative_prompt="a")


def test_negative_embeddings_are_taken_as_they_are(pipe):
    embeds = torch.zeros(1, 64, WIDTH), torch.ones(1, POOLED)
    names = ("negative_prompt_embeds", "negative_pooled_prompt_embeds")
    other = paint(pipe, visual_token_ids=IDS, **dict(zip(names, embeds)))
    assert not torch.allclose(other, paint(pipe, visual_token_ids=IDS), atol=1e-6)


@pytest.mark.parametrize("decoder", ["sdxl", "flux"])
def test_a_decoder_is_assembled(tiny_checkpoint, folders, tmp_path, decoder):
    output = tmp_path / "whole"
    assert not assemble_pipeline(tiny_checkpoint, folders / "mapper", folders / decoder, output, 32)
    pipe = diffusers.DiffusionPipeline.from_pretrained(output)
    pipe.set_progress_bar_config(disable=True)
    assert paint(pipe, visual_token_ids=IDS).isfinite().all() and pipe.config.image_size == 32
    card = (output / "README.md").read_text()
    assert 'DiffusionPipeline.from_pretrained("whole"' in card and "library_name: diffusers" in card
    assert assemble_pipeline(tiny_checkpoint, folders / "mapper", folders / decoder, output, 32)


def test_what_cannot_be_assembled_is_refused(tiny_checkpoint, folders, tmp_path):
    assemble = [tiny_checkpoint, folders / "mapper"]
    diffusers.DDPMPipeline(make_sdxl_parts()["unet"], diffusers.DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    with pytest.raises(ValueError, match="is a DDPMPipeline; supported are FluxPipeline and StableDiffusionXLPipeline"):
        assemble_pipeline(*assemble, tmp_path / "ddpm", tmp_path / "out", 32)
    for name in (str(tmp_path / "nowhere"), "nowhere/flux"):
        with pytest.raises(ValueError, match=f"^There is no folder {name}, and the Hub gives no pipeline of this name"):
            assemble_pipeline(*assemble, name, tmp_path / "out", 32)
    with pytest.raises(ValueError, match="`true_cfg_scale` is not kept with a UniCode2StableDiffusionXL.*`guidance_sc"):
        assemble_pipeline(*assemble, folders / "sdxl", tmp_path / "out", 32, true_cfg_scale=2.0)
    assert not (tmp_path / "out").exists()


EMBEDS = {"prompt_embeds": torch.zeros(1, 64, WIDTH), "pooled_prompt_embeds": torch.zeros(1, 24)}
NEGATIVE = {"negative_prompt_embeds": torch.zeros(1, 64, WIDTH), "negative_pooled_prompt_embeds": torch.zeros(1, 24)}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "exactly one of `prompt`, `image`, `visual_token_ids` and `prompt_embeds`; got none"),
        ({"prompt": ["a", 3]}, "`prompt` holds int"),
        ({"image": []}, "`image` is an empty list"),
        ({"visual_token_ids": IDS - 700}, "runs from 100 to 163; visual token ids are"),
        ({"visual_token_ids": IDS[:, :9]}, r"has shape \(1, 9\); it must be \(batch_size, 64\)"),
        ({"visual_token_ids": IDS, "num_candidates": 2}, "`num_candidates` is about writing the image of a prompt"),
        ({"visual_token_ids": IDS, "text_prompt": "a"}, "`text_prompt` needs SDXL's own text encoders"),
        ({"visual_token_ids": IDS, "negative_prompt": "a"}, "`negative_prompt` needs SDXL's own text encoders"),
        ({"visual_token_ids": IDS, "guidance_scale": 1.0} | NEGATIVE, "has no effect without guidance"),
        ({"visual_token_ids": IDS, "guidance_scale": -1}, "`guidance_scale` is -1; it must be a number"),
        ({"visual_token_ids": IDS, "ip_adapter_image": 1}, "`ip_adapter_image` needs an IP adapter"),
        ({"prompt_embeds": torch.zeros(1, 64, WIDTH)}, "Give `prompt_embeds` and `pooled_prompt_embeds`, or neither"),
        ({"visual_token_ids": IDS, "height": 0}, "`height` is 0; it must be a whole number"),
        (EMBEDS | {"prompt_embeds": torch.full((1, 4, WIDTH), torch.nan)}, "`prompt_embeds` has 128 values that"),
        (EMBEDS | {"pooled_prompt_embeds": torch.full((1, 24), torch.inf)}, "`pooled_prompt_embeds` has 24 values"),
        (EMBEDS | {name: value / 0 for name, value in NEGATIVE.items()}, "`negative_prompt_embeds` has 2048 values"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**{"num_inference_steps": 1, **arguments})
