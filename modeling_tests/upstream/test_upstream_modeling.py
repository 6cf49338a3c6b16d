"""ModelTesterMixin on every model class."""

import unittest

import torch
from tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor
from transformers.models.auto import modeling_auto

from transformers_unicode2 import UniCode2Config, UniCode2ForConditionalGeneration, UniCode2Model, UniCode2Quantizer

# The suite looks classes up in the tables of names, which registering does not reach.
modeling_auto.MODEL_MAPPING_NAMES["unicode2"] = "UniCode2Model"
modeling_auto.MODEL_MAPPING_NAMES["unicode2_quantizer"] = "UniCode2Quantizer"
modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["unicode2"] = "UniCode2ForConditionalGeneration"


class UniCode2ModelTester:
    """A model of a few thousand weights with random, finite codes."""

    batch_size, num_channels, image_size = 3, 3, 16
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4
    is_training = True

    def __init__(self, parent):
        self.parent = parent
        self.text_config = {
            "model_type": "qwen2",
            "vocab_size": 99,
            "hidden_size": self.hidden_size,
            "intermediate_size": 37,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "bos_token_id": 2,
            "eos_token_id": 1,
            "pad_token_id": 0,
        }
        self.vision_config = {
            "hidden_size": 16,
            "image_size": self.image_size,
            "patch_size": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "vision_use_head": False,
        }
        self.codebook_config = {"codebook_size": 64, "codebook_dim": 16, "num_cells": 4}
        self.num_image_tokens = (self.image_size // 8) ** 2
        self.image_token_id, self.boi_token_id, self.eoi_token_id = 3, 4, 5
        self.seq_length = 7 + self.num_image_tokens

    def get_config(self):
        return UniCode2Config(
            text_config=dict(self.text_config),
            vision_config=dict(self.vision_config),
            codebook_config=dict(self.codebook_config),
            image_token_id=self.image_token_id,
            boi_token_id=self.boi_token_id,
            eoi_token_id=self.eoi_token_id,
        )

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        input_ids = ids_tensor([self.batch_size, self.seq_length], 99 - 6) + 6
        input_ids[:, 1] = self.boi_token_id
        input_ids[:, 2 : 2 + self.num_image_tokens] = self.image_token_id
        input_ids[:, 2 + self.num_image_tokens] = self.eoi_token_id
        return config, {
            "pixel_values": floats_tensor([self.batch_size, self.num_channels, self.image_size, self.image_size]),
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
        }


class UniCode2ModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (UniCode2Model, UniCode2ForConditionalGeneration)
    _is_composite = True

    def setUp(self):
        self.model_tester = UniCode2ModelTester(self)

    @unittest.skip(
        "GenerationTesterMixin is not in the source distribution; test_generation_unicode2.py takes its place."
    )
    def test_generation_tester_mixin_inheritance(self):
        pass

    @unittest.skip("The output holds `image_tokens` and `image_hidden_states`, not all that the encoder returned.")
    def test_multimodal_outputs_are_returned(self):
        pass


class UniCode2TwoLevelModelTester(UniCode2ModelTester):
    def get_config(self):
        return UniCode2Config(**{**super().get_config().to_dict(), "visual_head": "two_level"})


class UniCode2TwoLevelModelTest(UniCode2ModelTest):
    all_model_classes = (UniCode2ForConditionalGeneration,)

    def setUp(self):
        self.model_tester = UniCode2TwoLevelModelTester(self)


class UniCode2QuantizerTester(UniCode2ModelTester):
    def __init__(self, parent):
        super().__init__(parent)
        self.hidden_size, self.num_attention_heads, self.seq_length = 16, 2, self.num_image_tokens  # the encoder's

    def get_config(self):
        return super().get_config().get_quantizer_config()

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), {
            "pixel_values": floats_tensor([self.batch_size, 3, self.image_size, self.image_size])
        }


class UniCode2QuantizerTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (UniCode2Quantizer,)
    _is_composite = True

    def setUp(self):
        self.model_tester = UniCode2QuantizerTester(self)

    @unittest.skip("An image encoder's input embedding is a convolution, which the test does not expect.")
    def test_model_get_set_embeddings(self):
        pass

    @unittest.skip("An image encoder has no token embeddings to resize.")
    def test_resize_tokens_embeddings(self):
        pass

    @unittest.skip("A quantizer is frozen, so nothing in it has a gradient to retain.")
    def test_retain_grad_hidden_states_attentions(self):
        pass
