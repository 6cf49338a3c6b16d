"""Images and text to ids, and back."""

import copy
from pathlib import Path

import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import MultiModalData, ProcessorMixin

# ChatML with images; tools and their calls are written as Qwen2.5 was trained to read them.
CHAT_TEMPLATE = """\
{%- macro show(content) -%}
{%- if content is string -%}{{- content -}}
{%- elif content -%}{%- for part in content -%}
{%- if part['type'] == 'image' -%}{{- '<|image_pad|>' -}}
{%- elif part['type'] == 'text' -%}{{- part['text'] -}}
{%- else -%}{{- raise_exception('A message holds a part of type ' + part['type'] + '; image and text can be read.') -}}{%- endif -%}
{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{%- if tools -%}
{{- '<|im_start|>system\\n' -}}
{%- if messages[0]['role'] == 'system' -%}{{- show(messages[0]['content']) + '\\n\\n' -}}{%- endif -%}
{{- '# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n' -}}
{{- 'You are provided with function signatures within <tools></tools> XML tags:\\n<tools>' -}}
{%- for tool in tools -%}{{- '\\n' + (tool | tojson) -}}{%- endfor -%}
{{- '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments ' -}}
{{- 'within <tool_call></tool_call> XML tags:\\n<tool_call>\\n' -}}
{{- '{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call><|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- '<|im_start|>assistant\\n' -}}
{%- generation -%}
{{- show(message['content']) -}}
{%- for call in message['tool_calls'] or [] -%}
{%- set call = call['function'] or call -%}
{%- if message['content'] or not loop.first -%}{{- '\\n' -}}{%- endif -%}
{{- '<tool_call>\\n{"name": "' + call['name'] + '", "arguments": ' + (call['arguments'] | tojson) + '}\\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>' -}}
{%- endgeneration -%}
{{- '\\n' -}}
{%- elif message['role'] == 'tool' -%}
{%- if loop.first or loop.previtem['role'] != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
{{- '\\n<tool_response>\\n' + show(message['content']) + '\\n</tool_response>' -}}
{%- if loop.last or loop.nextitem['role'] != 'tool' -%}{{- '<|im_end|>\\n' -}}{%- endif -%}
{%- elif not (tools and loop.first and message['role'] == 'system') -%}
{{- '<|im_start|>' + message['role'] + '\\n' + show(message['content']) + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


AUTO_MAP = {"AutoProcessor": "processing_unicode2.UniCode2Processor"}  # where a repository has the code of this class


CAPTION_PROMPT = "describe the image."  # asks for a short caption, in training and when drawings are read back


def to_rgb(image):
    """A `PIL.Image` as RGB: turned as its EXIF says, transparency on white, 16 bit brought to 8."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        return image.point(lambda value: value / 256).convert("L").convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def load_image(path: str | Path):
    """Any image file as RGB, see `to_rgb`.

    Raises `ValueError` when the file is missing, a folder, empty, truncated or no image.
    """
    from PIL import Image

    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give an image file.")
    if not path.is_file():
        raise ValueError(f"There is no image file {path}.")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty (0 bytes); give an image file.")
    try:
        with Image.open(path) as image:
            return to_rgb(image)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} ({path.stat().st_size} bytes) cannot be read as an image: {error}.") from error


def open_images(images):
    """Images as RGB in any nesting of lists: files and `PIL.Image`s. Arrays, addresses and base64, which are fetched later, stay."""
    if isinstance(images, (list, tuple)):
        return [open_images(image) for image in images]
    is_name = isinstance(images, str) and "." in images and not images.startswith(("http://", "https://", "data:"))
    if is_name or isinstance(images, Path):  # base64 has no dots
        return load_image(images)
    return to_rgb(images) if hasattr(images, "getexif") else images


class UniCode2Processor(ProcessorMixin):
    r"""
    Image processor and tokenizer in one. An image's place in a prompt is `image_token`; it becomes the begin-of-image token,
    `num_image_tokens` placeholders and the end-of-image token.

    With a [`UniCode2Quantizer`] attached, images become visual token ids at once and no `pixel_values` are returned.

    Args:
        image_processor (`SiglipImageProcessor`): resizes and normalises images.
        tokenizer (`Qwen2Tokenizer`): knows `image_token`, `boi_token` and `eoi_token`, none of the visual ids.
        patch_size (`int`, *optional*): side of a patch of the vision encoder, in pixels; by default the image processor's, which has it
            from an earlier processor, or else 14.
        chat_template (`str`, *optional*): ChatML with images by default.
        image_token, boi_token, eoi_token (`str`): the three tokens; Qwen2.5's own by default.
    """

    caption_prompt = CAPTION_PROMPT

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
        self.patch_size = patch_size or getattr(image_processor, "patch_size", None) or 14
        image_processor.patch_size = self.patch_size  # so that it is saved by pipelines, which save no processor
        self.image_token, self.boi_token, self.eoi_token = image_token, boi_token, eoi_token
        self.image_token_id, self.boi_token_id, self.eoi_token_id = tokenizer.convert_tokens_to_ids(
            [image_token, boi_token, eoi_token]
        )
        self.quantizer, self.visual_token_offset = None, None
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE, **kwargs)

    @property
    def num_image_tokens(self) -> int:
        """Placeholders per image, T."""
        size = self.image_processor.size
        return (size["height"] // self.patch_size) * (size["width"] // self.patch_size)

    def attach_quantizer(self, quantizer, visual_token_offset: int) -> "UniCode2Processor":
        """Makes images come out as visual token ids. The quantizer is never saved with the processor.

        Args:
            quantizer (`UniCode2Quantizer`): encoder and codebook; call its `use_faiss` for FAISS.
            visual_token_offset (`int`): first visual token id, `UniCode2Config.visual_token_offset`.
        """
        self.quantizer, self.visual_token_offset = quantizer, visual_token_offset
        return self

    def __call__(self, images=None, text=None, **kwargs) -> BatchFeature:
        r"""
        Args:
            images (image or list of images, *optional*): in the order of their `image_token`s in the texts. `PIL.Image`s and
                files become RGB as `to_rgb` has it.
            text (`str` or `list[str]`, *optional*): prompts.

        Returns:
            `input_ids` and `attention_mask`; `pixel_values` `(num_images, 3, height, width)` unless a quantizer is attached.

        Raises:
            `ValueError`: on an empty prompt, or when images and `image_token`s differ in number.
        """
        texts = [text] if isinstance(text, str) else text
        if texts is not None:
            self.check_texts(texts, images)
        images = open_images(images)
        batch = super().__call__(images=images, text=text, **kwargs)
        if "pixel_values" in batch and "input_ids" in batch:
            height, width = batch["pixel_values"][0].shape[-2:]
            num_patches = (height // self.patch_size) * (width // self.patch_size)
            if num_patches != self.num_image_tokens:
                raise ValueError(
                    f"Images of {height} x {width} pixels have {num_patches} patches; the prompt holds {self.num_image_tokens} "
                    "placeholders for each. Leave `size` as it is."
                )
        if self.quantizer is not None and "pixel_values" in batch and "input_ids" in batch:
            pixel_values = torch.as_tensor(batch.pop("pixel_values")).to(self.quantizer.device)
            tokens = iter((self.quantizer.encode_images(pixel_values) + self.visual_token_offset).flatten().tolist())
            rows = batch["input_ids"].tolist() if isinstance(batch["input_ids"], torch.Tensor) else batch["input_ids"]
            rows = [[next(tokens) if id_ == self.image_token_id else id_ for id_ in row] for row in rows]
            batch["input_ids"] = torch.tensor(rows) if isinstance(batch["input_ids"], torch.Tensor) else rows
        return batch

    def apply_chat_template(self, conversation, *args, **kwargs):
        """Stock.

        Raises:
            `ValueError`: on a message that says nothing.
        """
        for chat in [conversation] if conversation and isinstance(conversation[0], dict) else conversation:
            for number, message in enumerate(chat, 1):
                content = message.get("content")
                parts = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
                says = any(part.get("type") != "text" or part.get("text", "").strip() for part in parts)
                if message.get("role") == "user" and not says:
                    raise ValueError(f"Message {number} of {len(chat)} is empty; write some text.")
        return super().apply_chat_template(conversation, *args, **kwargs)

    def check_texts(self, texts, images) -> None:
        if not isinstance(texts, (list, tuple)) or not all(isinstance(t, (str, list, tuple)) for t in texts):
            raise ValueError(f"`text` is {texts!r}; it must be a string or a list of strings.")
        if not texts:
            raise ValueError("`text` is an empty list; write a prompt.")
        empty = [isinstance(t, str) and not t.strip() for t in texts]
        if any(empty):
            raise ValueError(f"Prompt {empty.index(True) + 1} of {len(texts)} is empty; write some text.")
        if isinstance(images, (list, tuple)) and images and all(isinstance(i, (list, tuple)) for i in images):
            places = [t.count(self.image_token) for t in texts]
            given = [len(i) for i in images]
            if places != given:
                raise ValueError(f"The prompts have places for {places} images, and {given} are given.")

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        return self.boi_token + self.image_token * self.num_image_tokens + self.eoi_token

    def encode_turns(self, chat: list[dict], visual_token_ids: list[int]) -> tuple[list[int], list[int]]:
        """A chat with its answers as ids of the unified vocabulary, its images given as visual token ids.

        Args:
            chat: messages whose contents are strings, with `image_token` in the place of an image.
            visual_token_ids: ids of all images, in their order.

        Returns:
            Ids, and for each of them 1 in an answer and 0 elsewhere.

        Raises:
            `ValueError`: when ids and places differ in number, and when the chat template marks no answer.
        """
        image = self.replace_image_token({}, 0)
        turns = [{**turn, "content": turn["content"].replace(self.image_token, image)} for turn in chat]
        encoded = self.tokenizer.apply_chat_template(
            turns, chat_template=self.chat_template, return_dict=True, return_assistant_tokens_mask=True
        )
        num_places, mask = encoded["input_ids"].count(self.image_token_id), encoded["assistant_masks"]
        if num_places != len(visual_token_ids):
            raise ValueError(
                f"The chat has places for {num_places} visual token ids, {self.num_image_tokens} an image, and "
                f"{len(visual_token_ids)} are given."
            )
        if not any(mask) and any(turn["role"] == "assistant" for turn in chat):
            raise ValueError("The chat template marks no answer; it needs {% generation %} around them.")
        ids = iter(visual_token_ids)
        return [next(ids) if i == self.image_token_id else i for i in encoded["input_ids"]], mask

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        if image_sizes is None:
            return MultiModalData()
        count = len(image_sizes)
        return MultiModalData(num_image_tokens=[self.num_image_tokens] * count, num_image_patches=[1] * count)

    def post_process_multimodal_output(
        self, generated_outputs, skip_special_tokens: bool = True, generation_mode=None, **kwargs
    ):
        """Texts; or, for `generation_mode="image"`, one `PIL.Image` for each image `(batch_size, 3, height, width)` in [0, 1]."""
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
        slim.quantizer = slim.visual_token_offset = None  # a codebook is never copied, nor saved with the processor
        output = ProcessorMixin.to_dict(slim)
        for name in ("quantizer", "visual_token_offset", "image_token_id", "boi_token_id", "eoi_token_id"):
            output.pop(name, None)
        return {**output, "auto_map": AUTO_MAP}


__all__ = ["UniCode2Processor"]
