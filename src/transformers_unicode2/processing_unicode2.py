"""Images and text to ids, and back."""

import copy
import operator
from collections.abc import Mapping
from functools import wraps
from pathlib import Path
from string import Template

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.feature_extraction_utils import BatchFeature
from transformers.pipelines.image_text_to_text import ImageTextToTextPipeline
from transformers.processing_utils import MultiModalData, ProcessorMixin

from .encoders_unicode2 import find_image_size
from .images_unicode2 import UniCode2BatchFeature, UniCode2ImageProcessor, load_image, open_images, to_rgb
from .turns_unicode2 import clean_turns, get_entry

# ChatML with images, whose tokens stand as `${name}`. The package has this file; a repository has its own template.
CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")
# Where a repository has the code of this class.
AUTO_MAP = {"AutoProcessor": "processing_unicode2.UniCode2Processor"}


class UniCode2Processor(ProcessorMixin):
    r"""
    Image processor and tokenizer in one. An image's place in a prompt is `image_token`. It becomes the begin-of-image
    token, `num_image_tokens` placeholders and the end-of-image token.

    With a [`UniCode2Quantizer`] attached, images become visual token ids at once and no `pixel_values` are returned.

    Args:
        image_processor (`UniCode2ImageProcessor`): reads, resizes and normalises images. A stock `SiglipImageProcessor`
            or `CLIPImageProcessor` becomes one, with its settings.
        tokenizer (`PreTrainedTokenizerBase`): knows `image_token`, `boi_token` and `eoi_token`, none of the visual ids.
        patch_size (`int`, *optional*): side of a patch of the vision encoder, in pixels; by default the image
            processor's, which has it from an earlier processor, or else 14.
        chat_template (`str`, *optional*): by default the package's, ChatML with images.
        image_token, boi_token, eoi_token (`str`): the three tokens; Qwen2.5's own by default.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        patch_size: int | None = None,
        chat_template: str | None = None,
        image_token: str = "<|image_pad|>",
        boi_token: str = "<|vision_start|>",
        eoi_token: str = "<|vision_end|>",
        **kwargs,
    ):
        image_processor = UniCode2ImageProcessor.adopt(image_processor)
        self.patch_size = patch_size or getattr(image_processor, "patch_size", None) or 14
        # Stock pipelines save an image processor and a tokenizer alone, so the former carries a copy.
        image_processor.patch_size = self.patch_size
        self.image_token, self.boi_token, self.eoi_token = image_token, boi_token, eoi_token
        self.image_token_id, self.boi_token_id, self.eoi_token_id = tokenizer.convert_tokens_to_ids(
            [image_token, boi_token, eoi_token]
        )
        self.quantizer, self.visual_token_offset = None, None
        if not chat_template and CHAT_TEMPLATE.is_file():
            chat_template = read_chat_template(image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)

    @property
    def num_image_tokens(self) -> int:
        """Placeholders per image, T."""
        height, width = find_image_size(self.image_processor)
        return (height // self.patch_size) * (width // self.patch_size)

    def attach_quantizer(self, quantizer, visual_token_offset: int) -> "UniCode2Processor":
        """Makes images come out as visual token ids. The quantizer is never saved with the processor.

        Args:
            quantizer (`UniCode2Quantizer`): encoder and codebook; `FaissSearch` searches the codebook with FAISS.
            visual_token_offset (`int`): first visual token id, `UniCode2Config.visual_token_offset`. Call this again
                after `resize_token_embeddings`, which moves it.

        Raises:
            `ValueError`: when it is no quantizer, or one of images of another size; when the offset is no integer, or
                among the ids of the tokenizer.
        """
        # Their class in a repository is another than that of the package.
        if not (isinstance(quantizer, PreTrainedModel) and quantizer.config.model_type == "unicode2_quantizer"):
            raise ValueError(
                f"`quantizer` is of type {type(quantizer).__name__}; give a UniCode2Quantizer, such as "
                "`model.get_quantizer()`."
            )
        if quantizer.config.num_image_tokens != self.num_image_tokens:
            raise ValueError(
                f"The quantizer makes {quantizer.config.num_image_tokens} codes of an image, and an image has "
                f"{self.num_image_tokens} places in a prompt of this processor; give the quantizer of its model."
            )
        try:
            offset = operator.index(visual_token_offset)
        except TypeError as error:
            raise ValueError(f"`visual_token_offset` is {visual_token_offset!r}; it must be an integer.") from error
        self.check_offset(quantizer, offset)
        self.quantizer, self.visual_token_offset = quantizer, offset
        return self

    def check_offset(self, quantizer, offset: int) -> None:
        """Raises `ValueError` when visual token ids from `offset` on would be taken for others."""
        if offset < len(self.tokenizer):
            raise ValueError(
                f"Visual token ids from {offset} on are among the {len(self.tokenizer)} ids of the tokenizer; resize "
                "the model to the tokenizer and attach its quantizer with its `config.visual_token_offset`."
            )
        # The code of an older checkpoint does not tell.
        of_model = getattr(quantizer, "model_config", None)
        if of_model is not None and of_model.visual_token_offset != offset:
            raise ValueError(
                f"Visual token ids from {offset} on are not those of the quantizer's model, which begin at "
                f"{of_model.visual_token_offset}; attach it again with the model's `config.visual_token_offset`."
            )

    def __call__(self, images=None, text=None, **kwargs) -> BatchFeature:
        r"""
        Args:
            images (image or list of images, *optional*): in the order of their `image_token`s in the texts, or one list
                for each text. An image is what `read_images` takes, and becomes RGB as `to_rgb` says.
            text (`str` or `list[str]`, *optional*): prompts.

        Returns:
            `input_ids` and `attention_mask`; `pixel_values` `(num_images, 3, height, width)`, which stay in float32
            under `to`. With a quantizer attached there are no pixels; images without text become `visual_token_ids`
            `(num_images, num_image_tokens)`. Beside `input_ids` stands `visual_token_offset`, which the model compares
            with its own.

        Raises:
            `ValueError`: on an empty prompt, on an image that cannot be read, or when images and `image_token`s differ
            in number.
        """
        texts = [text] if isinstance(text, str) else text
        if texts is not None:
            self.check_texts(texts)
        images = self.open_images([] if images is None else images, texts, kwargs)
        bos, nested = self.tokenizer.bos_token, kwargs.get("text_kwargs") or {}
        is_chat = bool(texts and bos) and isinstance(texts[0], str) and texts[0].startswith(bos)
        if is_chat and "add_special_tokens" not in {**kwargs, **nested}:
            # The chat template wrote what the tokenizer would add.
            kwargs["add_special_tokens"] = False
        batch = super().__call__(images=images, text=text, **kwargs)
        batch = UniCode2BatchFeature(batch.data, skip_tensor_conversion=batch.skip_tensor_conversion)
        if "pixel_values" in batch and "input_ids" in batch:
            self.check_size(batch["pixel_values"])
        if "pixel_values" in batch and self.quantizer is not None:
            self.write_codes(batch)
        return batch

    def open_images(self, images, texts: list[str] | None, options: dict) -> list | None:
        """All images as RGB, in one list, `None` if there are none; takes the layout of arrays out of the options.

        Raises `ValueError` when texts and lists of images do not fit.
        """
        options["images_kwargs"] = nested = dict(options.get("images_kwargs") or {})
        layout = nested.pop("input_data_format", options.pop("input_data_format", None))
        opened = open_images(images, layout)
        is_nested = bool(opened) and all(isinstance(group, list) for group in opened)
        given = [len(group) for group in opened] if is_nested else len(opened)
        # Stock code counts places that were typed apart, where it is asked to.
        if texts is not None and not options.get("sanitize_control_tokens"):
            places = [text.count(self.image_token) for text in texts]
            places = places if is_nested else sum(places)
            if places != given:
                if is_nested and len(given) == 1:
                    places, given = places[0], given[0]
                raise ValueError(
                    f"The prompts have places for {places} images, and {given} are given; {self.image_token} is a "
                    "place."
                )
        return ([image for group in opened for image in group] if is_nested else opened) or None

    def check_size(self, pixel_values) -> None:
        """Raises `ValueError` when preprocessed images have another number of patches than their place in a prompt."""
        height, width = pixel_values[0].shape[-2:]
        num_patches = (height // self.patch_size) * (width // self.patch_size)
        if num_patches != self.num_image_tokens:
            raise ValueError(
                f"Images of {height} x {width} pixels have {num_patches} patches; the prompt holds "
                f"{self.num_image_tokens} placeholders for each. Leave `size` as it is."
            )

    def write_codes(self, batch: BatchFeature) -> None:
        """Visual token ids in the place of pixels and placeholders, as lists, arrays or tensors as these were."""
        self.check_offset(self.quantizer, self.visual_token_offset)
        pixel_values = batch.pop("pixel_values")
        pixels = torch.stack([torch.as_tensor(image) for image in pixel_values]).to(self.quantizer.device)
        ids = self.quantizer.encode_images(pixels).cpu() + self.visual_token_offset  # (num_images, num_image_tokens)
        if "input_ids" not in batch:
            batch["visual_token_ids"] = convert_like(pixel_values, ids.tolist())
            return
        batch["visual_token_offset"] = self.visual_token_offset
        tokens, prompts = iter(ids.flatten().tolist()), batch["input_ids"]
        rows = prompts if isinstance(prompts, list) else prompts.tolist()
        rows = [[next(tokens) if id_ == self.image_token_id else id_ for id_ in row] for row in rows]
        batch["input_ids"] = convert_like(prompts, rows)

    def apply_chat_template(self, conversation, *args, **kwargs):
        """Stock, with the ids of the tokenizer's own `apply_chat_template`, which adds no special tokens to a chat.

        Raises:
            `ValueError`: on a message that says nothing.
        """
        first = conversation[0] if isinstance(conversation, (list, tuple)) and conversation else None
        is_batched = isinstance(first, (list, tuple)) or hasattr(first, "messages")
        for chat in conversation if is_batched else [conversation]:
            messages = getattr(chat, "messages", chat)
            for number, message in enumerate(messages, 1):
                content = get_entry(message, "content")
                parts = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
                says = any(
                    get_entry(part, "type") != "text" or (get_entry(part, "text") or "").strip() for part in parts
                )
                if get_entry(message, "role") == "user" and not says:
                    raise ValueError(f"Message {number} of {len(messages)} is empty; write some text.")
        if kwargs.get("tokenize"):
            given = kwargs.get("processor_kwargs") or {}
            chosen = {"add_special_tokens", "text_kwargs"} & {*given, *kwargs}
            kwargs["processor_kwargs"] = given if chosen else {"add_special_tokens": False, **given}
        return super().apply_chat_template(conversation, *args, **kwargs)

    def check_texts(self, texts) -> None:
        if not isinstance(texts, (list, tuple)) or not all(isinstance(t, (str, list, tuple)) for t in texts):
            raise ValueError(f"`text` is {texts!r}; it must be a string or a list of strings.")
        if not texts:
            raise ValueError("`text` is an empty list; write a prompt.")
        empty = [isinstance(t, str) and not t.strip() for t in texts]
        if any(empty):
            raise ValueError(f"Prompt {empty.index(True) + 1} of {len(texts)} is empty; write some text.")

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        return self.boi_token + self.image_token * self.num_image_tokens + self.eoi_token

    def encode_chat(
        self, messages: list[dict], visual_token_ids: list[list[int]] | None = None
    ) -> tuple[list[int], list[int]]:
        """A chat as ids of the unified vocabulary, with what is to be learnt of it.

        Args:
            messages (`list[dict]`): turns of any role. A content is a string, in which `image_token` is the place of
                an image, or a list of parts, `{"type": "text", "text": ...}` and `{"type": "image"}`.
            visual_token_ids (`list[list[int]]`, *optional*): the visual token ids of each image, `num_image_tokens`
                of them, in the order of the images.

        Returns:
            The ids, and for each of them 1 where it is learnt: in what the assistant writes, the end of its turn
            included. It is 0 elsewhere.

        Raises:
            `ValueError`: when images and their places differ in number, or an image has another number of ids. Also on
                a part that is neither text nor image, and on a chat template that does not mark each answer or that
                refuses the chat.
        """
        from jinja2 import TemplateError

        given, size = visual_token_ids or [], self.num_image_tokens
        # Tables have `None` for what a turn lacks, and templates print it.
        turns = clean_turns(messages)
        turns = [{**turn, "content": self.join_parts(turn.get("content", ""))} for turn in turns]
        num_places = sum(turn["content"].count(self.image_token) for turn in turns)
        if num_places != len(given):
            raise ValueError(f"The chat has places for {num_places} images, and {len(given)} are given.")
        odd = [number for number, ids in enumerate(given, 1) if len(ids) != size]
        if odd:
            raise ValueError(
                f"Image {odd[0]} of the chat has {len(given[odd[0] - 1])} visual token ids; one has {size}."
            )
        block = self.replace_image_token({}, 0)
        turns = [{**turn, "content": turn["content"].replace(self.image_token, block)} for turn in turns]
        try:
            encoded = self.tokenizer.apply_chat_template(
                turns, chat_template=self.chat_template, return_dict=True, return_assistant_tokens_mask=True
            )
        except TemplateError as error:
            raise ValueError(f"the chat template of the model refuses the chat: {error}") from error
        ids, mask = encoded["input_ids"], encoded["assistant_masks"]
        num_answers = sum(turn["role"] == "assistant" for turn in turns)
        num_marked = sum(flag and not before for before, flag in zip([0, *mask], mask))
        if num_marked != num_answers:
            raise ValueError(
                f"The chat template marks {num_marked} of {num_answers} answers, by {{% generation %}} around each."
            )
        visual = iter([id_ for image in given for id_ in image])
        return [next(visual) if id_ == self.image_token_id else id_ for id_ in ids], mask

    def join_parts(self, content: str | list[dict]) -> str:
        """The content of a message as one string, with `image_token` in the place of each image.

        Raises `ValueError` on a part that is neither text nor image.
        """
        if isinstance(content, str):
            return content
        odd = [get_entry(part, "type") for part in content if get_entry(part, "type") not in ("text", "image")]
        if odd:
            raise ValueError(f"A message holds a part of type {odd[0]}; image and text can be read.")
        return "".join(
            self.image_token if get_entry(part, "type") == "image" else get_entry(part, "text") for part in content
        )

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        if image_sizes is None:
            return MultiModalData()
        count = len(image_sizes)
        return MultiModalData(num_image_tokens=[self.num_image_tokens] * count, num_image_patches=[1] * count)

    def post_process_multimodal_output(
        self, generated_outputs, skip_special_tokens: bool = True, generation_mode=None, **kwargs
    ):
        """Texts; for `generation_mode="image"` `PIL.Image`s of images `(batch_size, 3, height, width)` in [0, 1]."""
        if generation_mode != "image":
            return self.post_process_image_text_to_text(
                generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs
            )
        from PIL import Image

        pixels = (generated_outputs.float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
        return [Image.fromarray(image) for image in pixels.cpu().numpy()]

    def split_images(self, ids: torch.LongTensor) -> list[dict]:
        """Text and images that `generate(generation_mode="interleaved")` wrote, ids `(num_tokens,)`, in their order.

        Returns `{"type": "text", "text": str}` and `{"type": "image", "visual_token_ids": (num_image_tokens,)}`.
        """
        parts, start, length = [], 0, len(ids)
        for begin in [*(ids == self.boi_token_id).nonzero().flatten().tolist(), length]:
            text = self.tokenizer.decode(ids[start:begin], skip_special_tokens=True)
            if text.strip():
                parts.append({"type": "text", "text": text})
            start = begin + 1 + self.num_image_tokens
            if start <= length:
                parts.append({"type": "image", "visual_token_ids": ids[begin + 1 : start]})
        return parts

    def __deepcopy__(self, memo: dict) -> "UniCode2Processor":
        """A deep copy that shares the quantizer."""
        memo[id(self.quantizer)] = self.quantizer
        twin = memo[id(self)] = copy.copy(self)
        twin.__dict__ = copy.deepcopy(self.__dict__, memo)
        return twin

    def to_dict(self) -> dict:
        slim = copy.copy(self)
        # A codebook is never copied, nor saved with the processor.
        slim.quantizer = slim.visual_token_offset = None
        output = ProcessorMixin.to_dict(slim)
        for name in ("quantizer", "visual_token_offset", "image_token_id", "boi_token_id", "eoi_token_id"):
            output.pop(name, None)
        return {**output, "auto_map": AUTO_MAP}


def read_chat_template(image_token: str, start_token: str = "<|im_start|>", end_token: str = "<|im_end|>") -> str:
    """The package's chat template with these tokens; a turn begins and ends with the last two."""
    template = Template(CHAT_TEMPLATE.read_text(encoding="utf-8"))
    return template.substitute(image_token=image_token, start_token=start_token, end_token=end_token)


def convert_like(like, rows: list[list[int]]):
    """Ids as a tensor, an array or lists, as `like` is."""
    if isinstance(like, torch.Tensor):
        return torch.tensor(rows)
    return np.array(rows) if isinstance(like, np.ndarray) else rows


def read_images_of(pipeline_class: type[ImageTextToTextPipeline]) -> None:
    """Has a pipeline hand its images to a processor of ours as they are.

    The stock one opens them by itself, any format of Pillow's, even EPS, and loses transparency and all beyond 8 bits.
    Neither the model nor the processor can tell it not to.
    """
    preprocess = pipeline_class.preprocess

    @wraps(preprocess)
    def read_first(self, inputs=None, timeout=None, **kwargs):
        is_ours = isinstance(self.processor, UniCode2Processor) and isinstance(inputs, Mapping)
        if is_ours and inputs.get("images") is not None:
            inputs = {**inputs, "images": open_images(inputs["images"], timeout=timeout)}
        return preprocess(self, inputs, timeout=timeout, **kwargs)

    pipeline_class.preprocess = read_first


read_images_of(ImageTextToTextPipeline)

__all__ = ["UniCode2Processor", "load_image", "to_rgb"]
