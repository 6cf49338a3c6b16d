"""Generators, numbers, adapters and memory of the FLUX pipeline, as diffusers' users hand them over."""

import shutil

import accelerate
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from transformers_unicode2 import UniCode2ConditionMapper, UniCode2FluxPipeline
from transformers_unicode2.hub.assemble import assemble_pipeline


def load(folder):
    pipe = UniCode2FluxPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint):
    return load(tiny_checkpoint)


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw(pipe, *args, **kwargs):
    """One step of painting behind the quickest way of writing, without a plan and guidance."""
    quick = {"num_inference_steps": 1, "output_type": "latent", "true_cfg_scale": 1.0}
    if args or "prompt" in kwargs:
        quick |= {"num_candidates": 1, "prior_guidance_scale": 1.0, "prior_generation_kwargs": {"max_plan_tokens": 0}}
    return pipe(*args, **{**quick, **kwargs})


@pytest.mark.parametrize("num_candidates", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_each_image_of_a_list_of_generators_depends_on_its_own_alone(pipe, num_candidates):
    options = {"num_candidates": num_candidates}
    prompts = ["a red circle", "two green hearts and a blue ring on a white ground"]
    output = draw(pipe, prompts, generator=seeded(1, 2), **options)
    # A generator is a list of one
    for row, generator in ((0, seeded(1)), (1, seeded(2)[0])):
        alone = draw(pipe, prompts[row], generator=generator, **options)
        assert torch.equal(output.visual_token_ids[row], alone.visual_token_ids[0])
        torch.testing.assert_close(output.images[row], alone.images[0], rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_generators_of_several_images_a_prompt_go_prompt_by_prompt(pipe):
    output = draw(pipe, ["a red circle", "two hearts"], num_images_per_prompt=2, generator=seeded(1, 2, 3, 2))
    alone = draw(pipe, "two hearts", num_images_per_prompt=2, generator=tuple(seeded(3, 2)))
    assert torch.equal(output.visual_token_ids[2:], alone.visual_token_ids)
    assert not torch.equal(output.visual_token_ids[1], output.visual_token_ids[3])


def test_latents_follow_the_generators_of_images_and_of_tokens(pipe, photo):
    tokens = pipe.read_visual_tokens([photo, photo.rotate(90)])
    for source in ({"visual_token_ids": tokens}, {"image": [photo, photo.rotate(90)]}):
        output = draw(pipe, **source, num_images_per_prompt=2, generator=seeded(1, 2, 3, 4))
        alone = draw(pipe, visual_token_ids=tokens[1:], generator=seeded(3))
        torch.testing.assert_close(output.images[2], alone.images[0], rtol=1e-3, atol=1e-3)
    latents = torch.randn(output.images.shape, generator=seeded(5)[0])
    first, second = (
        draw(pipe, visual_token_ids=tokens, latents=latents[:2], generator=g) for g in (None, seeded(1, 2))
    )
    assert torch.equal(first.images, second.images)


UNWRITTEN = {"visual_token_ids": torch.full((1, 64), 800)}
PRIOR = (
    *(("num_candidates", -3), ("num_candidates", 2), ("prior_guidance_scale", "x"), ("prior_guidance_scale", 2.0)),
    *(("prior_generation_kwargs", {"nonsense": 1}), ("prior_generation_kwargs", {})),
)
NEGATIVE = {"negative_prompt_embeds": torch.zeros(1, 64, 32), "negative_pooled_prompt_embeds": torch.zeros(1, 32)}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"prompt": ["a", "b"], "generator": seeded(1, 2, 3)}, "a list of 3, and 2 images are drawn"),
        ({"prompt": "a", "num_images_per_prompt": 2, "generator": seeded(1)}, "a list of 1, and 2 images are drawn"),
        ({"prompt": "a", "generator": []}, "a list of 0, and 1 images are drawn"),
        ({"prompt": "a", "generator": 7}, "`generator` holds int; it must be a `torch.Generator`"),
        ({"prompt": "a", "generator": [None]}, "`generator` holds NoneType"),
        ({"visual_token_ids": torch.full((2, 64), 800), "generator": seeded(1)}, "a list of 1, and 2 images are drawn"),
        (
            {"prompt": "a", "generator": seeded(1), "prior_generation_kwargs": {"num_return_sequences": 2}},
            "`num_return_sequences` does not go with a list of generators",
        ),
        (
            {"prompt": "a", "prompt_embeds": torch.zeros(1, 64, 32)},
            "Give exactly one of `prompt`, .* and `prompt_embeds`; got prompt and prompt_embeds",
        ),
        ({"prompt": "a", "num_inference_steps": np.float32(2)}, "`num_inference_steps` is .*must be a whole number"),
        ({"prompt": "a", "guidance_scale": -1}, "`guidance_scale` is -1; it must be a number of at least 0"),
        ({"prompt": "a", "height": np.int64(0)}, "`height` is .*0.*whole number of at least 1"),
        ({"prompt": "a", "height": True}, "`height` is True; it must be a whole number of at least 1"),
        ({"prompt": "a", "guidance_scale": True}, "`guidance_scale` is True; it must be a number of at least 0"),
        ({"prompt": "a", "height": 30}, "`height` is 30 and `width` 64; both must be multiples of 8"),
        (UNWRITTEN | {"width": 1}, "`height` is 64 and `width` 1; both must be multiples of 8"),
        ({"prompt": "a " * 960}, "The prompt has .* tokens, and 65 are written behind it; .* reads 1024 at most"),
        *((UNWRITTEN | {name: value}, f"`{name}` is about writing the image of a prompt") for name, value in PRIOR),
        (UNWRITTEN | {"max_sequence_length": 7}, "`max_sequence_length` is of texts that FLUX reads"),
        ({"prompt": "a", "max_sequence_length": 7}, "`max_sequence_length` is of texts that FLUX reads"),
        (UNWRITTEN | NEGATIVE, "`negative_prompt_embeds` has no effect without guidance"),
        (UNWRITTEN | {"ip_adapter_image": np.zeros((8, 8, 3))}, "`ip_adapter_image` needs an IP adapter; load one"),
        (UNWRITTEN | {"latents": torch.zeros(1, 2, 3)}, r"`latents` is \(1, 2, 3\); 1 images of 64 x 64 pixels need"),
        (UNWRITTEN | {"latents": "noise"}, "`latents` is str; 1 images of 64 x 64 pixels need"),
        *(
            ({"prompt": "a", "prior_guidance_scale": guidance, "prior_generation_kwargs": options}, message)
            for guidance, options, message in (
                (None, {"generation_mode": "text"}, "`generation_mode` is 'text'; a pipeline draws"),
                (None, {"generation_config": GenerationConfig(generation_mode="interleaved")}, "is 'interleaved'; a"),
                (None, {"input_ids": torch.tensor([[1]])}, "`input_ids`, which is made of the prompt"),
                (1.0, {"guidance_scale": 1.0}, "Give `prior_guidance_scale`, or `guidance_scale`"),
                (None, "fast", "`prior_generation_kwargs` is 'fast'; it must be a dictionary"),
                (None, {"max_new_tokens": 3}, "`max_new_tokens` is 3, and an image has 64 tokens"),
                (None, {"negative_prompt_ids": torch.tensor([[1]])}, "`negative_prompt_ids` is not read"),
            )
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(pipe, arguments, message):
    calls = []
    handle = pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=message):
        draw(pipe, **arguments)
    handle.remove()
    assert not calls


def test_numbers_of_numpy_draw_the_same(pipe, tmp_path):
    plain = {"num_inference_steps": 2, "guidance_scale": 2.5, "true_cfg_scale": 1.5, "height": 96, "width": 64}
    plain |= {"num_images_per_prompt": 2, "prior_guidance_scale": 1.5, "num_candidates": 1}
    settings = {"temperature": 0.5, "top_k": 7, "max_plan_tokens": 0}
    kinds = {int: np.int64, float: np.float32}

    def odd(values):
        return {name: kinds[type(value)](value) for name, value in values.items()}

    expected = draw(pipe, "a blue star", generator=seeded(0)[0], **plain, prior_generation_kwargs=settings)
    output = draw(pipe, "a blue star", generator=seeded(0)[0], **odd(plain), prior_generation_kwargs=odd(settings))
    assert torch.equal(output.images, expected.images)
    sizes = {"image_size": np.int32(64), "num_candidates": np.int64(2), "true_cfg_scale": np.float32(1.5)}
    UniCode2FluxPipeline(**pipe.components, **sizes).save_config(tmp_path)
    saved = UniCode2FluxPipeline.load_config(tmp_path)
    assert [saved[name] for name in sizes] == [64, 2, 1.5]
    with pytest.raises(ValueError, match="`image_size` is 0; it must be a whole number of at least 1"):
        UniCode2FluxPipeline(**pipe.components, image_size=0)


def test_callbacks_and_kinds_of_output(pipe, photo):
    steps = []

    def end_of_step(pipeline, step, timestep, tensors):
        steps.append((step, sorted(tensors)))
        return tensors

    options = {"callback_on_step_end": end_of_step, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    draw(pipe, image=photo, num_inference_steps=3, **options)
    assert steps == [(step, ["latents", "prompt_embeds"]) for step in range(3)]
    for kind, shape in (("pt", (1, 3, 64, 64)), ("np", (1, 64, 64, 3))):
        assert draw(pipe, image=photo, output_type=kind).images.shape == shape
    assert draw(pipe, image=photo, output_type="pil").images[0].size == (64, 64)
    assert len(draw(pipe, image=photo, return_dict=False)) == 1


def test_pixels_reach_the_quantizer_in_float32(tiny_checkpoint, photo):
    pipe = UniCode2FluxPipeline.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16).to(torch.bfloat16)
    seen = []
    encoder = pipe.vision_language_encoder.get_quantizer().vision_model
    encoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.extend(v.dtype for v in (*args, *kwargs.values()) if torch.is_tensor(v)),
        with_kwargs=True,
    )
    tokens = pipe.read_visual_tokens(photo)
    assert set(seen) == {torch.float32}
    assert torch.equal(tokens, load(tiny_checkpoint).read_visual_tokens(photo))


def test_adapters_of_flux_are_fused_and_unfused(tiny_checkpoint, tmp_path, photo):
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = load(tiny_checkpoint)
    options = {"image": photo, "generator": seeded(0)[0], "output_type": "pt"}
    before = draw(pipe, **options).images
    config = LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipe.transformer.add_adapter(config, "made")
    layers = {"transformer_lora_layers": get_peft_model_state_dict(pipe.transformer, adapter_name="made")}
    name = "text_model.encoder.layers.0.self_attn.q_proj.lora_{}.weight"
    layers["text_encoder_lora_layers"] = {name.format(part): torch.zeros(2, 2) for part in "AB"}
    UniCode2FluxPipeline.save_lora_weights(tmp_path, **layers)

    def look(**changes):
        return draw(pipe, **{**options, "generator": seeded(0)[0], **changes}).images

    pipe = load(tiny_checkpoint)
    torch.testing.assert_close(look(), before, rtol=1e-3, atol=1e-3)
    pipe.load_lora_weights(tmp_path, adapter_name="loaded")
    adapted = look()
    assert (adapted - before).abs().max() > 0.01
    pipe.fuse_lora()
    torch.testing.assert_close(look(), adapted, rtol=1e-3, atol=1e-3)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    torch.testing.assert_close(look(), before, rtol=1e-3, atol=1e-3)


SLOW = ("model", "block_level", "leaf_level", "disk", "casting")


@pytest.mark.parametrize("kind", ["sequential", *(pytest.param(kind, marks=pytest.mark.slow) for kind in SLOW)])
def test_memory_is_saved_without_another_image(tiny_checkpoint, pipe, photo, tmp_path, kind):
    saving, cpu = load(tiny_checkpoint), torch.device("cpu")
    if kind == "model":
        saving.enable_model_cpu_offload(device="cpu")
    elif kind == "casting":
        saving.transformer.enable_layerwise_casting(torch.bfloat16, torch.float32)
        saving.condition_mapper.enable_layerwise_casting(torch.bfloat16, torch.float32)
    elif kind == "sequential":
        for part in saving.components.values():
            if isinstance(part, torch.nn.Module):
                accelerate.cpu_offload(part, cpu, offload_buffers=bool(part._parameters))
    elif kind == "disk":
        for name in ("vision_language_encoder", "condition_mapper", "transformer"):
            from diffusers.hooks import apply_group_offloading

            options = {"num_blocks_per_group": 1, "offload_to_disk_path": str(tmp_path / name)}
            apply_group_offloading(getattr(saving, name), cpu, cpu, **options)
    else:
        saving.enable_group_offload(cpu, cpu, kind, num_blocks_per_group=1)
    for source in ({"image": photo}, {"visual_token_ids": torch.arange(800, 864)[None]}):
        for _ in range(2):
            outputs = [draw(part, **source, generator=seeded(0)[0]) for part in (pipe, saving)]
            assert torch.equal(outputs[0].visual_token_ids, outputs[1].visual_token_ids)
            atol = 0.2 if kind == "casting" else 1e-3
            torch.testing.assert_close(outputs[1].images, outputs[0].images, rtol=1e-3, atol=atol)
    drawn = [draw(part, "a red circle", generator=seeded(3)[0], num_candidates=2) for part in (pipe, saving)]
    assert torch.equal(drawn[0].visual_token_ids, drawn[1].visual_token_ids)


def test_the_mode_of_the_pipeline_may_be_named(pipe):
    quick = {"max_plan_tokens": 0, "do_sample": False}
    expected = draw(pipe, "a", prior_generation_kwargs=quick).visual_token_ids
    named = draw(pipe, "a", prior_generation_kwargs={**quick, "generation_mode": "image"}).visual_token_ids
    assert torch.equal(named, expected)


@pytest.fixture
def damage(tiny_checkpoint, tmp_path):
    """Copies a repository, takes a weight of a part away or makes it NaN, and gives back its folder."""

    def run(part, missing):
        shutil.copytree(tiny_checkpoint, tmp_path / part)
        file = tmp_path / part / part / "diffusion_pytorch_model.safetensors"
        state = load_file(file)
        name = sorted(state)[3]
        if missing:
            state.pop(name)
        else:
            state[name].view(-1)[0] = torch.nan
        save_file(state, file, metadata={"format": "pt"})
        return str(tmp_path / part), name

    return run


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize("missing, message", [(True, "lacks 1 weights; the first is"), (False, "not finite")])
def test_a_mapper_that_lacks_a_weight_or_has_nan_is_not_loaded(damage, missing, message, low_cpu_mem_usage):
    folder, name = damage("condition_mapper", missing)
    for load in (UniCode2FluxPipeline.from_pretrained, UniCode2ConditionMapper.from_pretrained):
        options = {"subfolder": "condition_mapper"} if load == UniCode2ConditionMapper.from_pretrained else {}
        with pytest.raises(ValueError, match=f"The mapper in .*{message}") as caught:
            load(folder, low_cpu_mem_usage=low_cpu_mem_usage, **options)
        assert name in str(caught.value)


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_a_decoder_that_lacks_a_weight_is_not_loaded(damage, part):
    folder, name = damage(part, missing=True)
    with pytest.raises(ValueError, match=f"`{part}` lacks 1 weights, which its files do not hold; .*{name}"):
        UniCode2FluxPipeline.from_pretrained(folder)


@pytest.mark.parametrize("part", ["condition_mapper", "transformer", "vae"])
@pytest.mark.parametrize("missing", [True, False])
def test_parts_that_lack_a_weight_or_have_nan_are_not_assembled(tiny_checkpoint, damage, tmp_path, part, missing):
    folder, name = damage(part, missing)
    with pytest.raises(ValueError, match="lacks 1 weights" if missing else "not finite") as caught:
        assemble_pipeline(str(tiny_checkpoint), f"{folder}/condition_mapper", folder, str(tmp_path / "new"), 64)
    assert name in str(caught.value) and not (tmp_path / "new").exists()
