"""Answers and drawings of a checkpoint, batch by batch. They are seeded, so the same call gives the same images."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from PIL import Image


def batches(items: list, size: int, description: str) -> Iterator[list]:
    """Lists of at most `size` items. More than one show their progress."""
    from tqdm import tqdm

    parts = [items[start : start + size] for start in range(0, len(items), size)]
    yield from tqdm(parts, unit="batch", desc=description, disable=len(parts) < 2)


@torch.no_grad()
def answer(
    pipe, images: list[Image.Image], questions: list[str], batch_size: int = 50, max_new_tokens: int = 16
) -> list[str]:
    """The greedy answers of the language model of a pipeline to one question about each image."""
    processor, model, answers = pipe.processor, pipe.vision_language_encoder, []
    for batch in batches(list(zip(images, questions)), batch_size, "answering"):
        contents = [[{"type": "image"}, {"type": "text", "text": question}] for _, question in batch]
        chats = [[{"role": "user", "content": content}] for content in contents]
        prompts = processor.apply_chat_template(chats, add_generation_prompt=True)
        pictures, options = [image for image, _ in batch], {"padding": True, "add_special_tokens": False}
        inputs = processor(images=pictures, text=prompts, return_tensors="pt", **options)
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        answers += processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in answers]


def encode(pipe, images: list[Image.Image]) -> torch.LongTensor:
    """Visual token ids of images, `(num_images, num_image_tokens)`."""
    pixel_values = pipe.processor.image_processor(images, return_tensors="pt")["pixel_values"]
    return pipe.vision_language_encoder.get_image_tokens(pixel_values)


@dataclass(frozen=True)
class Painter:
    """A pipeline with everything that its drawings depend on.

    Args:
        pipe (`UniCode2FluxPipeline`): language model, mapper and decoder.
        seed (`int`): of the generator of a call, which all its batches share.
        batch_size (`int`): images that are written or painted at a time.
        num_inference_steps (`int`, *optional*): diffusion steps; by default those of the pipeline.
        true_cfg_scale (`float`, *optional*): guidance of the decoder; by default that of the pipeline.
        prior_guidance_scale (`float`, *optional*): guidance of the language model; by default its own.
    """

    pipe: "UniCode2FluxPipeline"  # noqa: F821
    seed: int = 0
    batch_size: int = 50
    num_inference_steps: int | None = None
    true_cfg_scale: float | None = None
    prior_guidance_scale: float | None = None

    @property
    def image_size(self) -> int:
        """Side in pixels of the images that the pipeline draws."""
        return self.pipe.config.image_size

    def write(self, prompts: list[str], num_candidates: int | None = None) -> torch.LongTensor:
        """Visual token ids that the language model writes for prompts, `(num_prompts, num_image_tokens)`."""
        generator = torch.Generator().manual_seed(self.seed)
        written = [
            self.pipe.generate_visual_tokens(batch, generator, self.prior_guidance_scale, num_candidates=num_candidates)
            for batch in batches(prompts, self.batch_size, "writing tokens")
        ]
        return torch.cat(written)

    def paint(self, visual_token_ids: torch.LongTensor) -> list[Image.Image]:
        """Images of visual token ids `(num_images, num_image_tokens)`."""
        generator, images = torch.Generator().manual_seed(self.seed), []
        for batch in batches(list(visual_token_ids), self.batch_size, "painting"):
            images += self.pipe(
                visual_token_ids=torch.stack(batch),
                generator=generator,
                num_inference_steps=self.num_inference_steps,
                true_cfg_scale=self.true_cfg_scale,
            ).images
        return images
