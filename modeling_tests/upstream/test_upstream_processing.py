"""ProcessorTesterMixin on the processor and ImageProcessingTestMixin on the image processor that we register."""

import unittest

from tests.test_image_processing_common import ImageProcessingTestMixin, prepare_image_inputs
from tests.test_processing_common import ProcessorTesterMixin
from transformers import AutoTokenizer
from transformers.utils import is_torchvision_available

from transformers_unicode2 import UniCode2ImageProcessor, UniCode2Processor, image_processors
from transformers_unicode2.demo import embedded_checkpoint

# Tests that rescale images by other factors, which would make other codes.
RESCALING = (
    *("test_kwargs_overrides_default_subprocessor_kwargs", "test_structured_kwargs_nested_from_dict"),
    *("test_subprocessor_defaults_preserved_by_kwargs", "test_unstructured_kwargs"),
)


def is_refused(test):
    def refused(self, *args):
        with self.assertRaisesRegex(ValueError, "leave (it|them)"):
            test(self, *args)

    return refused


class UniCode2ProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = UniCode2Processor

    @classmethod
    def _setup_image_processor(cls):
        return UniCode2ImageProcessor(size={"height": 32, "width": 32})

    @classmethod
    def _setup_tokenizer(cls):
        return AutoTokenizer.from_pretrained(embedded_checkpoint())

    @staticmethod
    def prepare_processor_dict():
        return {"patch_size": 8}


for name, test in list(vars(ProcessorTesterMixin).items()):
    if name.startswith(RESCALING) and name.endswith("_images"):
        setattr(UniCode2ProcessorTest, name, is_refused(test))


class UniCode2ImageProcessingTester:
    batch_size, num_channels, image_size, min_resolution, max_resolution = 3, 3, 18, 30, 80
    image_processing_classes = image_processors

    def __init__(self, parent):
        self.parent = parent

    def prepare_image_processor_dict(self):
        return {
            "do_resize": True,
            "size": {"height": 16, "width": 16},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        }

    def expected_output_image_shape(self, images):
        return self.num_channels, 16, 16

    def prepare_image_inputs(self, equal_resolution=False, numpify=False, torchify=False):
        return prepare_image_inputs(
            batch_size=self.batch_size,
            num_channels=self.num_channels,
            min_resolution=self.min_resolution,
            max_resolution=self.max_resolution,
            equal_resolution=equal_resolution,
            numpify=numpify,
            torchify=torchify,
        )


class UniCode2ImageProcessingTest(ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = UniCode2ImageProcessingTester
    # It normalises to other values.
    test_call_numpy_4_channels = is_refused(ImageProcessingTestMixin.test_call_numpy_4_channels)

    @unittest.skipUnless(is_torchvision_available(), "The library's torchvision class needs torchvision.")
    def test_new_models_require_torchvision_backend(self):
        super().test_new_models_require_torchvision_backend()
