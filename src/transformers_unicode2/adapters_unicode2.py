"""PEFT on a model: the frozen quantizer is left out of it, and what would not be saved, or not be seen, is refused."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import ModuleType

from torch import nn

from .hooks_unicode2 import when_imported
from .quantization_unicode2 import UniCode2Quantizer


@contextmanager
def quantizers_hidden(model: nn.Module) -> Iterator[None]:
    """Takes the quantizers out of a model for a while: what is not there gets no adapter, whatever names, types or sizes decide."""
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


def check_saved_modules(model: nn.Module, config) -> None:
    """Raises `ValueError` when `modules_to_save` of an adapter names what is in the frozen quantizer alone."""
    quantizers = [module for module in model.modules() if isinstance(module, UniCode2Quantizer)]
    frozen = {module for quantizer in quantizers for module in quantizer.modules()}
    for key in getattr(config, "modules_to_save", None) or ():
        named = [module in frozen for name, module in model.named_modules() if name.endswith(key)]
        if named and all(named):
            raise ValueError(f"`modules_to_save` names {key}, which is in the frozen quantizer alone; leave it out.")


def check_embeddings(tuner, model: nn.Module, config, embeddings_class: type) -> None:
    """Raises `ValueError` when an adapter is about to be put on C2, the scores of which would not see it.

    Args:
        tuner (`BaseTuner`): knows which modules it adapts.
        config (`PeftConfig`): of the adapter.
        embeddings_class: class of C2.
    """
    tokens = getattr(config, "trainable_token_indices", None)
    for name, module in model.named_modules():
        if not isinstance(module, embeddings_class):
            continue
        by_name = config.target_modules is not None and tuner._check_target_module_exists(config, name)
        if by_name or (isinstance(tokens, dict) and any(name.endswith(key) for key in tokens)):
            raise ValueError(
                f"`{name}` embeds codes and scores them, and an adapter would change the first alone; name it in "
                "`modules_to_save`, or leave it out of the adapter."
            )


def leave_out_quantizers(embeddings_class: type) -> None:
    """Lets PEFT, once it is imported, put adapters into models as if they had no quantizer, see `quantizers_hidden`."""

    def wrap(function: Callable) -> Callable:
        parameters = inspect.signature(function)

        @wraps(function)
        def inject(tuner, model, *args, **kwargs):
            given = parameters.bind(tuner, model, *args, **kwargs).arguments
            configs = given["peft_config"] if "peft_config" in given else tuner.peft_config
            config = configs[given["adapter_name"]] if isinstance(configs, dict) else configs
            check_saved_modules(model, config)
            check_embeddings(tuner, model, config, embeddings_class)
            with quantizers_hidden(model):
                return function(tuner, model, *args, **kwargs)

        return inject

    def teach_peft(module: ModuleType) -> None:
        tuner = module.BaseTuner
        tuner.__init__, tuner.inject_adapter = wrap(tuner.__init__), wrap(tuner.inject_adapter)

    when_imported("peft.tuners.tuners_utils", teach_peft)


def check_trainable(model: nn.Module) -> None:
    """Raises `ValueError` when the quantizer of a model with adapters learns, or something that PEFT would not save."""
    configs = getattr(model, "peft_config", None)
    if not configs:
        return
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    frozen = [name for name, p in model.get_quantizer().named_parameters() if p.requires_grad]
    if frozen:
        raise ValueError(
            f"{len(frozen)} parameters in the frozen quantizer are set to learn, the first is {frozen[0]}; call its `freeze`."
        )
    for config in configs.values():
        prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type, f"{config.peft_type.value.lower()}_")
        saved = ("modules_to_save.", "lora_", "trainable_tokens_", prefix)
        for part in ("model.visual_embeddings", "model.projector", "visual_head"):
            names = [name for name, p in model.get_submodule(part).named_parameters() if p.requires_grad]
            if getattr(config, "bias", "none") == "none" and any(
                not any(mark in name for mark in saved) for name in names
            ):
                raise ValueError(
                    f"`{part.split('.')[-1]}` is set to learn, but PEFT would not save it; name it in `modules_to_save`."
                )


__all__ = ["check_trainable", "leave_out_quantizers"]
