"""Diffusers' suites for models on the mapper."""

import torch
from diffusers_suites import load_suite

from transformers_unicode2 import UniCode2ConditionMapper

suites = load_suite("models.testing_utils")


class MapperConfig(suites.BaseModelTesterConfig):
    model_class = UniCode2ConditionMapper
    main_input_name = "visual_embeds"
    output_shape = (16, 24)

    def get_init_dict(self):
        sizes = {"visual_dim": 12, "hidden_dim": 32, "output_dim": 24, "pooled_dim": 8}
        return {**sizes, "num_visual_tokens": 16, "num_layers": 2, "num_attention_heads": 2}

    def get_dummy_inputs(self):
        return {"visual_embeds": torch.randn(2, 16, 12, generator=torch.Generator().manual_seed(0))}


class TestMapper(MapperConfig, suites.ModelTesterMixin):
    pass


class TestMapperTraining(MapperConfig, suites.TrainingTesterMixin):
    pass


class TestMapperMemory(MapperConfig, suites.MemoryTesterMixin):
    pass


class TestMapperCompile(MapperConfig, suites.TorchCompileTesterMixin):
    pass
