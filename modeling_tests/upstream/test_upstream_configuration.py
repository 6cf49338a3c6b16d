"""ConfigTester on every configuration class."""

import unittest

from test_upstream_modeling import UniCode2ModelTester
from tests.test_configuration_common import ConfigTester

from transformers_unicode2 import UniCode2CodebookConfig, UniCode2Config, UniCode2QuantizerConfig


class UniCode2ConfigTest(unittest.TestCase):
    def setUp(self):
        self.model_tester = UniCode2ModelTester(self)

    def test_unicode2_config(self):
        tester = ConfigTester(self, UniCode2Config, has_text_modality=False, image_token_id=10, boi_token_id=11)
        tester.run_common_tests()

    def test_quantizer_config(self):
        ConfigTester(self, UniCode2QuantizerConfig, has_text_modality=False).run_common_tests()

    def test_codebook_config(self):
        inputs = {"codebook_size": 96, "codebook_dim": 16, "num_cells": 4}
        tester = ConfigTester(self, UniCode2CodebookConfig, False, common_properties=[], **inputs)
        tester.run_common_tests()
