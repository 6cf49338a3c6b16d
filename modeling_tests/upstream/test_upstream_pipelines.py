"""Diffusers' suites for pipelines on both painters."""

import pytest
import torch
from diffusers_suites import load_suite
from painters import NO_TEXTS, POOLED, WIDTH, make_flux_parts, make_sdxl_parts

from transformers_unicode2 import (
    UniCode2ConditionMapper,
    UniCode2FluxPipeline,
    UniCode2ForConditionalGeneration,
    UniCode2Processor,
    UniCode2StableDiffusionXLPipeline,
)
from transformers_unicode2.demo import embedded_checkpoint

suites = load_suite("pipelines.testing_utils")
OF_TEXT_ENCODERS = (
    "test_simple_inference_with_text_lora",
    "test_simple_inference_with_text_lora_and_scale",
    "test_simple_inference_with_text_lora_unloaded",
    "test_simple_inference_with_text_lora_save_load",
    "test_simple_inference_with_partial_text_lora",
    "test_simple_inference_save_pretrained_with_text_lora",
)


class PainterConfig(suites.BasePipelineTesterConfig):
    required_input_params_in_call_signature = frozenset(
        ["prompt", "height", "width", "guidance_scale", "prompt_embeds", "pooled_prompt_embeds"]
    )
    batch_input_params = frozenset(["prompt"])
    output_shape = (3, 32, 32)

    def make_painter(self) -> dict:
        raise NotImplementedError

    def get_dummy_components(self):
        checkpoint = embedded_checkpoint()
        torch.manual_seed(0)
        sizes = {"hidden_dim": 32, "output_dim": WIDTH, "pooled_dim": POOLED, "num_visual_tokens": 64}
        return {
            **self.make_painter(),
            # Of IP adapters
            "image_encoder": None,
            "feature_extractor": None,
            "vision_language_encoder": UniCode2ForConditionalGeneration.from_pretrained(checkpoint, dtype="float32"),
            "processor": UniCode2Processor.from_pretrained(checkpoint),
            "condition_mapper": UniCode2ConditionMapper(visual_dim=192, **sizes),
        }

    def get_dummy_inputs(self):
        return {
            "prompt": "a red circle",
            "generator": self.get_generator(0),
            "num_inference_steps": 2,
            "guidance_scale": 5.0,
            "height": 32,
            "width": 32,
            # The fewest tokens to write
            "num_candidates": 1,
            "prior_guidance_scale": 1.0,
            "prior_generation_kwargs": {"max_plan_tokens": 0},
            "output_type": "pt",
        }


class FluxConfig(PainterConfig):
    pipeline_class = UniCode2FluxPipeline

    def make_painter(self):
        return {**make_flux_parts(), **NO_TEXTS}


class StableDiffusionXLConfig(PainterConfig):
    pipeline_class = UniCode2StableDiffusionXLPipeline
    callback_cfg_params = frozenset(["prompt_embeds", "add_text_embeds", "add_time_ids"])

    def make_painter(self):
        return {**make_sdxl_parts(), **NO_TEXTS}


class PipelineTester(suites.PipelineTesterMixin):
    @pytest.mark.skip("A prompt is written as visual tokens, which `encode_prompt` does not; upstream skips such, too")
    def test_encode_prompt_works_in_isolation(self):
        pass


class LoraTester(suites.LoraTesterMixin):
    """On given tokens, which writing them would only slow down, and painters without text encoders."""

    text_encoder_components = ()

    def get_dummy_inputs(self):
        written = ("prompt", "num_candidates", "prior_guidance_scale", "prior_generation_kwargs")
        inputs = {name: value for name, value in super().get_dummy_inputs().items() if name not in written}
        return {**inputs, "visual_token_ids": torch.arange(800, 864)[None]}

    @pytest.fixture(autouse=True)
    def skip_texts(self, request):
        if request.node.originalname in OF_TEXT_ENCODERS:
            pytest.skip("The painter has no text encoders, and this test is about a LoRA of theirs")


class TestFlux(FluxConfig, PipelineTester):
    pass


class TestFluxMemory(FluxConfig, suites.MemoryTesterMixin):
    pass


class TestFluxLora(LoraTester, FluxConfig):
    pass


class TestStableDiffusionXL(StableDiffusionXLConfig, PipelineTester):
    pass


class TestStableDiffusionXLMemory(StableDiffusionXLConfig, suites.MemoryTesterMixin):
    pass


class TestStableDiffusionXLLora(LoraTester, StableDiffusionXLConfig, suites.UNetLoraTesterMixin):
    pass
