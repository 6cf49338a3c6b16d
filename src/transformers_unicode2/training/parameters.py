"""Which parameters of a model learn, how fast, and adapters in their place."""

import re

from torch import nn

LAYERS = "language_model.layers"


def lies_in(name: str, module: str) -> bool:
    """Whether a parameter lies in a module, both by their dotted names; any part of a path names a module."""
    return f".{module}." in f".{name}"


def freeze_all_but(model, modules: list[str]) -> None:
    """Lets the parameters learn that lie in one of `modules`, such as `projector` or `language_model.layers`.

    Raises `ValueError` for a name that matches none, or in which nothing would learn.
    """
    check_modules(model, modules)
    for name, parameter in model.named_parameters():
        learns = any(lies_in(name, module) for module in modules)
        parameter.requires_grad_(learns and ".quantizer." not in name)
    check_learning(model, modules)


def check_modules(model, modules: list[str]) -> None:
    """Raises `ValueError` for a name that matches no parameter, and when there are no names."""
    if not modules:
        raise ValueError("`train_modules` is empty, so nothing would learn; name at least one module.")
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for module in modules:
        if not any(lies_in(name, module) for name in names):
            raise ValueError(f"No parameter of the model lies in `{module}`; check `train_modules`.")


def find_learning(model, modules: list[str]) -> list[str]:
    """Those of `modules` in which a parameter learns. A tied head learns with the token embedding."""
    learning = [name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]
    return [module for module in modules if any(lies_in(name, module) for name in learning)]


def check_learning(model, modules: list[str]) -> None:
    """Raises `ValueError` for a module in which nothing learns."""
    learning = find_learning(model, modules)
    for module in modules:
        if module not in learning:
            raise ValueError(
                f"Nothing in `{module}` would learn: the quantizer is frozen, adapters are on linear layers, a tied "
                "head learns with the token embedding; check `train_modules`."
            )


def find_part(name: str, parts: dict[str, float]) -> str | None:
    """The longest of the modules `parts` that a parameter lies in, `None` if it lies in none."""
    return max((part for part in parts if lies_in(name, part)), key=len, default=None)


def read_rates(learning_rates: dict[str, float | str]) -> dict[str, float]:
    """The learning rates of a recipe as numbers; YAML takes 1e-3 for a text. Raises `ValueError` on other texts."""
    read = {}
    if not isinstance(learning_rates, dict):
        raise ValueError(
            f"`learning_rates` is {learning_rates!r}; it needs names and rates, such as {{projector: 1e-3}}."
        )
    for part, rate in learning_rates.items():
        try:
            read[part] = float(rate)
        except (TypeError, ValueError) as error:
            raise ValueError(f"The learning rate of `{part}` is {rate!r}; it must be a positive number.") from error
    return read


def check_rates(model, learning_rates: dict[str, float]) -> None:
    """Raises `ValueError` on a learning rate that is not positive, or of a part in which nothing learns."""
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for part, rate in learning_rates.items():
        if not rate > 0:
            raise ValueError(f"The learning rate of `{part}` is {rate!r}; it must be a positive number.")
        if not any(find_part(name, learning_rates) == part for name in learning):
            raise ValueError(f"`learning_rates` names `{part}`, in which no parameter learns; check `train_modules`.")


def group_parameters(model, decayed: list[str], weight_decay: float, learning_rates: dict[str, float]) -> list[dict]:
    """The parameters that learn, in groups of one learning rate and one weight decay, always in the same order.

    What lies in several parts follows the longest name. What lies in none comes first and has the optimizer's rate.

    Args:
        model: module or model with adapters.
        decayed: names of the parameters that `weight_decay` is for.
        weight_decay: of these; 0 for the others.
        learning_rates: by the names of modules.
    """
    learning = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    decayed, groups = set(decayed), []
    for part in (None, *learning_rates):
        mine = [(name, parameter) for name, parameter in learning if find_part(name, learning_rates) == part]
        for decay in (True, False):
            chosen = [parameter for name, parameter in mine if (name in decayed) == decay]
            group = {"params": chosen, "weight_decay": weight_decay if decay else 0.0, "part": part}
            if part is not None:
                group["lr"] = float(learning_rates[part])
            if chosen:
                groups.append(group)
    return groups


def adapt(model, lora: dict, train_modules: list[str]):
    """The model with adapters, see `make_lora_config`.

    Raises `ValueError` when PEFT does not take `lora`, and for a module in which nothing would learn.
    """
    from peft import get_peft_model

    check_modules(model, train_modules)
    config = make_lora_config(model, lora, train_modules)
    embedding = next(n for n, p in model.named_parameters() if p is model.get_input_embeddings().weight)
    whole = next((name for name in config.modules_to_save or () if lies_in(embedding, name)), None)
    if whole and model.config.tie_word_embeddings:
        raise ValueError(
            f"`{whole}` is tied to the text head, which adapters leave as it is; take it out of `train_modules`, or "
            "train without `lora`."
        )
    try:
        adapted = get_peft_model(model, config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`lora` is {lora}, which PEFT does not take: {error}") from error
    check_learning(adapted, [name for name in train_modules if name != "lm_head"])
    check_merge(adapted, model.config.tie_word_embeddings)
    return adapted


def find_linears(model) -> list[str]:
    """Last names of the linear layers within the layers of the language model, such as `q_proj`."""
    names = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and f".{LAYERS}." in name}
    return sorted({name.rsplit(".", 1)[-1] for name in names})


def check_merge(adapted, is_tied: bool) -> None:
    """Raises `ValueError` on adapters that can be trained and then not be merged into the weights.

    Args:
        adapted: model with adapters.
        is_tied: whether its text embedding is the text head, too.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in adapted.named_modules():
        if any(getattr(module, "lora_bias", {}).values()) and module.get_base_layer().bias is None:
            raise ValueError(
                f"`lora_bias` gives {name} a bias, which cannot be merged since the layer has none; leave it out."
            )
    if is_tied and isinstance(adapted.get_input_embeddings(), BaseTunerLayer):
        raise ValueError(
            "`lora` adapts the text embedding, which is tied to the text head, so that it cannot be merged; take it "
            "out of `target_modules`."
        )


def make_lora_config(model, lora: dict, train_modules: list[str]):
    """LoRA on the linear layers of the language model; the other modules that learn are trained and saved whole.

    Names within `language_model.layers` have adapters on their layers alone. The text head stays as it is: the trainers
    of TRL refuse an adapter on it. PEFT saves its adapters and `modules_to_save` and silently nothing else, so no
    module learns that is in neither. Raises `ValueError` when `train_modules` name no layers, since then there is
    nothing to adapt, or when PEFT knows no such fields.

    Args:
        model: model without adapters.
        lora: fields of `LoraConfig`.
        train_modules: modules that learn.
    """
    from peft import LoraConfig

    if not isinstance(lora, dict):
        raise ValueError(f"`lora` is {lora!r}; it needs fields of LoraConfig, such as {{r: 16}}.")
    all_layers = [name for name in train_modules if f".{name}".endswith((".language_model", f".{LAYERS}"))]
    some = [name for name in train_modules if f".{LAYERS}." in f".{name}"]
    if not all_layers + some:
        raise ValueError(
            f"`lora` adapts the language model, whose layers are not among `train_modules`: {', '.join(train_modules)}."
        )
    linears = find_linears(model)
    any_linear = rf"\.(.*\.)?({'|'.join(map(re.escape, linears))})"
    patterns = [
        rf".*(?<![^.]){re.escape(name)}{'' if name.rsplit('.', 1)[-1] in linears else any_linear}" for name in some
    ]
    defaults = {
        "target_modules": rf".*language_model\.layers{any_linear}" if all_layers else "|".join(patterns),
        "modules_to_save": [name for name in train_modules if name not in (*all_layers, *some, "lm_head")],
        "task_type": "CAUSAL_LM",
    }
    try:
        return LoraConfig(**{**defaults, **lora})
    except (TypeError, ValueError) as error:
        raise ValueError(f"`lora` is {lora}, which PEFT does not take: {error}") from error
