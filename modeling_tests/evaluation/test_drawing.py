"""Answers and drawings in batches are those of the models and pipelines themselves."""

import numpy as np
import pytest
import torch

from transformers_unicode2.evaluation.drawing import Painter, answer, encode
from transformers_unicode2.scenes.sample import sample_scene
from transformers_unicode2.scenes.scene import draw_scene


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint):
    from transformers_unicode2 import UniCode2FluxPipeline

    pipe = UniCode2FluxPipeline.from_pretrained(str(tiny_checkpoint))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [draw_scene(sample_scene(rng)) for _ in range(3)]


def test_answers_do_not_depend_on_the_batch(pipe, images):
    questions = ["how many objects are there?", "what color is the ground?", "describe the image."]
    alone = [answer(pipe, [image], [question])[0] for image, question in zip(images, questions)]
    assert answer(pipe, images, questions, batch_size=2) == alone and all(alone)


def test_painting_is_the_pipeline_with_its_settings(pipe, images):
    tokens, options = encode(pipe, images), {"num_inference_steps": 2, "true_cfg_scale": 2.5}
    generator = torch.Generator().manual_seed(7)
    wanted = [pipe(visual_token_ids=part, generator=generator, **options).images for part in (tokens[:2], tokens[2:])]
    painted = Painter(pipe, seed=7, batch_size=2, **options).paint(tokens)
    assert [image.tobytes() for image in painted] == [image.tobytes() for image in sum(wanted, [])]


def test_writing_is_the_pipeline_with_its_settings(pipe):
    generator = torch.Generator().manual_seed(3)
    wanted = pipe.generate_visual_tokens(["a red circle"], generator, 1.0, num_candidates=1)
    written = Painter(pipe, seed=3, prior_guidance_scale=1.0).write(["a red circle"], num_candidates=1)
    assert torch.equal(written, wanted)
