"""`pipeline("any-to-any")` for UniCode², without torchvision."""

from transformers.pipelines import AnyToAnyPipeline, Pipeline


class UniCode2AnyToAnyPipeline(AnyToAnyPipeline):
    r"""
    The stock any-to-any pipeline demands torchvision of every model that reads images; this one does not, and saves the whole
    processor. Use it as `pipeline("any-to-any", model=..., pipeline_class=UniCode2AnyToAnyPipeline)`.

    With `generation_mode="image"` each result holds a `PIL.Image` under `generated_image`.
    """

    def __init__(self, *args, **kwargs):
        Pipeline.__init__(self, *args, **kwargs)

    def save_pretrained(self, save_directory, **kwargs):
        super().save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)


__all__ = ["UniCode2AnyToAnyPipeline"]
