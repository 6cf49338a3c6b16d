"""`pipeline("any-to-any")` for UniCode², without torchvision."""

from transformers.pipelines import AnyToAnyPipeline, Pipeline
from transformers.pipelines.any_to_any import Chat

from .planning_unicode2 import check_mode, find_option, first_given


class UniCode2AnyToAnyPipeline(AnyToAnyPipeline):
    r"""
    The stock any-to-any pipeline demands torchvision of every model that reads images. This one does not, and it saves
    the whole processor. Use it as `pipeline("any-to-any", model=..., pipeline_class=UniCode2AnyToAnyPipeline)`.

    With `generation_mode="image"` each result holds a `PIL.Image` under `generated_image`. The stock pipeline does not
    know `"interleaved"`. There `generated_interleaved` is a list of chat parts in the order in which they were written:
    `{"type": "text", "text": ...}` and `{"type": "image", "image": ...}`.
    """

    def __init__(self, *args, **kwargs):
        Pipeline.__init__(self, *args, **kwargs)

    def _sanitize_parameters(self, generation_mode=None, generate_kwargs=None, **kwargs):
        """Stock, with the mode found wherever `generate` finds it, so that ids are shown as they were written."""
        generate_kwargs = dict(generate_kwargs or {})
        configs = (generate_kwargs.get("generation_config"), self._generate_kwargs.get("generation_config"))
        earlier = self.__dict__.get("_postprocess_params", {}).get("generation_mode")
        mode = first_given(generation_mode, generate_kwargs.pop("generation_mode", None), earlier)
        mode = first_given(mode, find_option("generation_mode", *configs, self.model.generation_config))
        check_mode(mode or "text")
        known = None if mode == "interleaved" else mode
        parameters = super()._sanitize_parameters(generation_mode=known, generate_kwargs=generate_kwargs, **kwargs)
        if mode is not None:
            parameters[1]["generate_kwargs"]["generation_mode"] = parameters[2]["generation_mode"] = mode
        return parameters

    def postprocess(self, model_outputs, generation_mode=None, **kwargs):
        if generation_mode != "interleaved":
            return super().postprocess(model_outputs, generation_mode=generation_mode, **kwargs)
        prompts = model_outputs["prompt_text"]
        prompts = [prompts] if isinstance(prompts, (str, Chat)) else prompts
        sequences = model_outputs["generated_sequence"].flatten(0, -2)  # (num_sequences, num_tokens)
        written = sequences[:, model_outputs["input_ids"].shape[1] :]
        prompts = [prompt for prompt in prompts for _ in range(len(sequences) // len(prompts))]
        return [
            {
                "input_text": prompt.messages if isinstance(prompt, Chat) else prompt,
                "generated_interleaved": [self.show(part) for part in self.processor.split_images(row)],
            }
            for prompt, row in zip(prompts, written)
        ]

    def show(self, part: dict) -> dict:
        """A part of a row, see `UniCode2Processor.split_images`, with the image in place of its ids."""
        if part["type"] == "text":
            return part
        pixels = self.model.decode_image_tokens(part["visual_token_ids"][None].to(self.model.device))
        image = self.processor.post_process_multimodal_output(pixels, generation_mode="image")[0]
        return {"type": "image", "image": image}

    def save_pretrained(self, save_directory, **kwargs):
        super().save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)


__all__ = ["UniCode2AnyToAnyPipeline"]
