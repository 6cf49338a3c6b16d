"""What PEFT may adapt of a model: all but its frozen quantizer, and nothing that it would not save. And what the
trainers of TRL may train of it: the text head alone.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from importlib.abc import MetaPathFinder
from types import ModuleType

import torch
from torch import nn

from .quantization_unicode2 import UniCode2Quantizer
from .visual_head_unicode2 import UniCode2VisualEmbeddings


class ImportHook(MetaPathFinder):
    """Finds the module `name` as Python would, and calls `function` with it once it has run."""

    def __init__(self, name: str, function: Callable[[ModuleType], None]):
        self.name, self.function = name, function

    def find_spec(self, fullname: str, path=None, target=None):
        if fullname != self.name:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((found for finder in others if (found := finder.find_spec(fullname, path, target))), None)
        if spec is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self.function(module)

            spec.loader.exec_module = exec_module
        return spec


def when_imported(name: str, function: Callable[[ModuleType], None]) -> None:
    """Calls `function` with the module `name`: now if it is imported already, else when it is."""
    if name in sys.modules:
        function(sys.modules[name])
    else:
        sys.meta_path.insert(0, ImportHook(name, function))


@contextmanager
def quantizers_hidden(model: nn.Module) -> Iterator[None]:
    """Takes the quantizers out of a model for a while, so that no name, type or size puts an adapter on them."""
    held = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, UniCode2Quantizer)
    ]
    for parent, name, _ in held:
        del parent._modules[name]
    try:
        yield
    finally:
        for parent, name, child in held:
            parent._modules[name] = child


def check_adapter(tuner, model: nn.Module, config) -> None:
    """Raises `ValueError` on an adapter of C2, which the scores would not see, or of the frozen quantizer alone.

    Args:
        tuner (`BaseTuner`): knows which modules it adapts.
        model (`torch.nn.Module`): holds the modules by their names.
        config (`PeftConfig`): of the adapter.
    """
    modules = dict(model.named_modules())
    frozen = {part for module in modules.values() if isinstance(module, UniCode2Quantizer) for part in module.modules()}
    for key in getattr(config, "modules_to_save", None) or ():
        named = [module in frozen for name, module in modules.items() if name.endswith(key)]
        if named and all(named):
            raise ValueError(f"`modules_to_save` names {key}, which is in the frozen quantizer alone; leave it out.")
    tokens = getattr(config, "trainable_token_indices", None)
    keys = tuple(tokens) if isinstance(tokens, dict) else ()
    check_trainable_ids(model, tokens, getattr(config, "token_indices", None))
    for name in (name for name, module in modules.items() if isinstance(module, UniCode2VisualEmbeddings)):
        by_name = config.target_modules is not None and tuner._check_target_module_exists(config, name)
        if by_name or name.endswith(keys):
            raise ValueError(
                f"`{name}` embeds codes and scores them, and an adapter would change the first alone; name it in "
                "`modules_to_save`, or leave it out of the adapter."
            )


def check_trainable_ids(model: nn.Module, *chosen: list[int] | dict[str, list[int]] | None) -> None:
    """Raises `ValueError` on visual ids among those whose rows of the text embedding are to learn."""
    ids = [
        i
        for given in chosen
        if given
        for part in (given.values() if isinstance(given, dict) else [given])
        for i in part
    ]
    for quantizer in (module for module in model.modules() if isinstance(module, UniCode2Quantizer)):
        size = quantizer.model_config.visual_token_offset if quantizer.model_config is not None else None
        if size is not None and ids and max(ids) >= size:
            raise ValueError(
                f"Token {max(ids)} is to learn by itself; only the {size} text ids can. Name `visual_embeddings` in "
                "`modules_to_save` for those of images."
            )


class UnifiedEmbeddings:
    """Stands for the text embedding where PEFT embeds a prompt behind what it has learnt: visual ids are embedded, too.

    Args:
        model (`UniCode2Model`): embeds ids of the unified vocabulary.
    """

    def __init__(self, model: nn.Module):
        self.model = model

    @property
    def weight(self) -> torch.Tensor:
        """That of the text embedding."""
        return self.model.get_input_embeddings().weight

    def __call__(self, input_ids: torch.LongTensor) -> torch.Tensor:
        return self.model.embed_input_ids(input_ids)


def teach_prompts(module: ModuleType) -> None:
    """Lets PEFT learn prompts in front of those that hold visual ids."""
    setup = module.PeftModel._setup_prompt_encoder

    @wraps(setup)
    def setup_unified(peft_model, *args, **kwargs):
        setup(peft_model, *args, **kwargs)
        for part in peft_model.base_model.modules():
            if any(isinstance(child, UniCode2Quantizer) for child in part.children()):
                del peft_model.word_embeddings
                peft_model.word_embeddings = UnifiedEmbeddings(part)

    module.PeftModel._setup_prompt_encoder = setup_unified


def teach_peft(module: ModuleType) -> None:
    """Lets PEFT put adapters into models as if they had no quantizer, see `quantizers_hidden`."""

    def wrap(function: Callable) -> Callable:
        parameters = inspect.signature(function)

        @wraps(function)
        def inject(tuner, model, *args, **kwargs):
            given = parameters.bind(tuner, model, *args, **kwargs).arguments
            configs = given["peft_config"] if "peft_config" in given else tuner.peft_config
            check_adapter(tuner, model, configs[given["adapter_name"]] if isinstance(configs, dict) else configs)
            with quantizers_hidden(model):
                return function(tuner, model, *args, **kwargs)

        return inject

    tuner = module.BaseTuner
    tuner.__init__, tuner.inject_adapter = wrap(tuner.__init__), wrap(tuner.inject_adapter)


def guard_labels(model: nn.Module, forward: Callable) -> Callable:
    """
    The forward that a trainer of TRL puts in the place of the model's, but one that raises `ValueError` on images among
    its targets.

    That forward scores targets by the text head alone. It would learn placeholders there, and no image.
    """
    if "fused_lm_head" not in inspect.signature(forward, follow_wrapped=False).parameters:
        return forward

    @wraps(forward)
    def guarded(*args, **kwargs):
        labels = kwargs.get("labels") if kwargs.get("shift_labels") is None else kwargs["shift_labels"]
        if kwargs.get("fused_lm_head") and labels is not None:
            images = (labels == model.config.image_token_id) | (labels >= model.config.visual_token_offset)
            if images.any():
                raise ValueError(
                    f"{images.sum().item()} targets of this batch are of images, and the trainers of TRL learn text "
                    "alone; use `UniCode2SFTTrainer` of `transformers_unicode2.training.sft`, or, if the images are in "
                    "questions, `assistant_only_loss=True`."
                )
        return forward(*args, **kwargs)

    return guarded


def check_trainable(model: nn.Module) -> None:
    """Raises `ValueError` when the quantizer of a model with adapters learns, or something that PEFT would not save."""
    configs = getattr(model, "peft_config", None)
    if not configs:
        return
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    frozen = [name for name, p in model.get_quantizer().named_parameters() if p.requires_grad]
    if frozen:
        raise ValueError(
            f"{len(frozen)} parameters in the frozen quantizer are set to learn, the first is {frozen[0]}; "
            "call its `freeze`."
        )
    for config in configs.values():
        if getattr(config, "bias", "none") != "none":
            continue
        prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type, f"{config.peft_type.value.lower()}_")
        saved = ("modules_to_save.", "lora_", "trainable_tokens_", prefix)
        for part in ("model.visual_embeddings", "model.projector", "visual_head"):
            names = [name for name, p in model.get_submodule(part).named_parameters() if p.requires_grad]
            if any(not any(mark in name for mark in saved) for name in names):
                raise ValueError(
                    f"`{part.split('.')[-1]}` is set to learn, but PEFT would not save it; name it in "
                    "`modules_to_save`."
                )


when_imported("peft.tuners.tuners_utils", teach_peft)
when_imported("peft.peft_model", teach_prompts)
