"""The data of the mapper: pairs of codes and captions, and what the frozen parts of a decoder make of them."""

from functools import cache, cached_property
from pathlib import Path

import torch

from ..encoders_unicode2 import encode_patches, load_encoder
from ..images_unicode2 import decode_image
from ..pixels_unicode2 import crop_square
from ..processes import agree
from .decoder_cache import CachedPairs, check_latents, copy_pictures, encode_latents, encode_texts, fill_cache
from .decoders import load_decoder
from .image_files import check_later
from .mixtures import find_parts, hash_parts
from .pairs import check_pictures, find_crop, hash_pictures, open_pairs, open_pictures

# Captions whose text embeddings give the scales that a mapper starts with
NUM_MEASURED = 64


class MapperData:
    """The pairs of `datasets`, or those of `eval_datasets`.

    Args:
        args (`MapperArguments`): of the stage.
        prefix: of the arguments, empty or `eval_`.

    Raises:
        `ValueError`: when there are no such data.
    """

    def __init__(self, args, prefix: str = ""):
        self.args, self.prefix, self.option = args, prefix, f"`{prefix}datasets`"
        self.images = getattr(args, f"{prefix}images")
        self.parts = find_parts(getattr(args, f"{prefix}datasets"), self.option)
        splits = sorted({part.split for part in self.parts})
        if self.images and len(splits) > 1:
            raise ValueError(f"{self.option} has the splits {' and '.join(splits)}; with pictures, give one split.")
        self.sources = open_pictures(self.images, splits[0], args.image_root, args.image_column)

    @cached_property
    def crop(self) -> bool:
        """See `find_crop`."""
        from transformers import AutoImageProcessor

        return find_crop(self.parts, AutoImageProcessor.from_pretrained(self.args.model), self.option)

    def hash_all(self) -> dict:
        """Digests of chats and pictures. Raises `ValueError` when they do not belong together."""
        pictures = hash_pictures(self.sources)
        if self.images:
            option = f"`{self.prefix}images`"
            check_pictures(pictures, self.parts, option)
            for place, split in dict.fromkeys((file.parent, part.split) for part in self.parts for file in part.files):
                check_later(self.sources, place, split, option)
        return {f"{self.prefix}datasets": hash_parts(self.parts), f"{self.prefix}images": pictures}

    def fill(self, place: Path, made_of: dict, seed: int, load, state) -> tuple[CachedPairs, dict[str, float]]:
        """
        Fills the cache of these pairs.

        Args:
            place: folder of all caches.
            made_of: of the stage, with the digests of data and decoder.
            seed: of the rows that a part with a fraction gives.
            load: gives the decoder with the parts that the cache needs.
            state: `PartialState`.

        Returns:
            The pairs with what is cached of each, and the scales that a mapper starts with.
        """
        args, pairs = self.args, open_pairs(self.parts, seed, self.option)
        data = {"datasets": made_of[f"{self.prefix}datasets"], "seed": seed}
        decoder = {**data, "decoder": made_of.get("decoder"), "decoder_dtype": args.decoder_dtype}
        pictures = {"images": made_of[f"{self.prefix}images"], "image_root": args.image_root}
        pictures["image_column"] = args.image_column
        folders, scales = [], {}

        def fill(name: str, made_of: dict, encode, measure=None) -> dict:
            folders.append(place / f"{self.prefix}{name}")
            return fill_cache(folders[-1], made_of, pairs, encode, state, measure)

        if needs_texts(args):
            captions = list(dict.fromkeys(pairs["caption"][:NUM_MEASURED]))

            def measure() -> dict[str, float]:
                check_texts(load().encode_captions(captions), args)
                return load().measure_scales(captions)

            scales = fill("texts", decoder, lambda rows: encode_texts(rows, load()), measure)
        if needs_latents(args) and self.images:
            size, crop = args.image_size, self.crop
            sized = {**decoder, **pictures, "image_size": size, "center_crop": crop}
            fill("latents", sized, lambda rows: encode_latents(rows, load(), self.sources, size, crop))
            agree(lambda: check_latents(folders[-1]))
        if args.has_teacher:
            fill("pictures", {**data, **pictures}, lambda rows: copy_pictures(rows, self.sources))
        return CachedPairs(pairs, folders), scales


def check_texts(text: torch.Tensor, args) -> None:
    """Raises `ValueError` when the pooled embeddings of different captions are the same, so that none can be told."""
    if args.contrastive_weight and len(text) > 1 and (text - text[0]).abs().max() < 1e-6 * text.abs().max():
        raise ValueError(
            f"The text encoder of {args.decoder} gives {len(text)} different captions the same pooled embedding, so "
            "there is nothing to tell them by; look at its `eos_token_id` and its tokenizer."
        )


def needs_texts(args) -> bool:
    """Whether captions are encoded: for the contrastive loss, and for the scales of a mapper from scratch."""
    return bool(args.decoder and (args.contrastive_weight or not args.start))


def needs_latents(args) -> bool:
    """Whether pictures are encoded by the decoder's VAE: for its own loss, and as originals beside paintings."""
    return bool(args.decoder and (args.flow_matching_weight or args.num_validation_images))


def fill_all(data: list[MapperData], place: Path, made_of: dict, training_args, state) -> list[tuple]:
    """`MapperData.fill` of each, with one decoder, which is gone afterwards. It is not loaded if nothing is missing."""
    args = data[0].args

    @cache
    def load():
        parts = {"texts": needs_texts(args), "vae": needs_latents(args), "painter": False}
        return load_decoder(args.decoder, training_args.device, args.decoder_dtype, **parts)

    return [part.fill(place, made_of, training_args.seed, load, state) for part in data]


class MapperCollator:
    """Rows of `CachedPairs` to what the losses of `MapperWithLosses` need.

    Args:
        args (`MapperArguments`): of the stage.
        training_args (`TrainingArguments`): of it.
        source (`UniCode2ForConditionalGeneration`): with the encoder of the patch features, unless `args` names one.
        crop: whether patch features are of the middle of each picture, as its codes are.
    """

    def __init__(self, args, training_args, source, crop: bool = False):
        self.device, self.bf16, self.teacher, self.crop = training_args.device, training_args.bf16, None, crop
        if args.has_teacher:
            self.load_teacher(args, source)

    def load_teacher(self, args, source) -> None:
        """Loads what makes image prompts of images. Raises `ValueError` when its width is not the encoder's."""
        from transformers import AutoImageProcessor

        from transformers_unicode2 import UniCode2ConditionMapper, UniCode2ImageProcessor

        teacher = UniCode2ConditionMapper.from_pretrained(args.image_prompts or args.start).float()
        if args.encoder:
            encoder, image_processor = load_encoder(args.encoder)
        else:
            encoder = source.get_quantizer().vision_model
            image_processor = AutoImageProcessor.from_pretrained(args.model)
        if encoder.config.hidden_size != teacher.config.visual_dim:
            raise ValueError(
                f"{args.image_prompts or args.start} reads patch features of width {teacher.config.visual_dim}; those "
                f"of {args.encoder or args.model} are {encoder.config.hidden_size} wide."
            )
        self.image_processor = UniCode2ImageProcessor.adopt(image_processor)
        self.teacher, self.encoder = (part.requires_grad_(False).eval().to(self.device) for part in (teacher, encoder))

    def __call__(self, batch: list[dict]) -> dict[str, torch.Tensor]:
        inputs = {
            name: torch.stack([row[name] for row in batch]) for name in ("codes", "latents", "text") if name in batch[0]
        }
        if self.teacher:
            images = [decode_image(row["picture"]) for row in batch]
            images = [crop_square(image) for image in images] if self.crop else images
            pixels = self.image_processor(images, return_tensors="pt")["pixel_values"]
            with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                features = encode_patches(self.encoder, pixels.to(self.device)).last_hidden_state
                inputs["prompt_embeds"] = self.teacher(features.float()).prompt_embeds.float().cpu()
        return inputs
