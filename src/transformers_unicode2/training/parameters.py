"""Which parameters of a model learn, and adapters in their place."""


def freeze_all_but(model, modules: list[str]) -> None:
    """Lets the parameters learn whose path holds one of `modules`. Raises `ValueError` for a name that matches none."""
    check_modules(model, modules)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not set(modules).isdisjoint(name.split(".")) and ".quantizer." not in name)


def check_modules(model, modules: list[str]) -> None:
    names = [name for name, _ in model.named_parameters()]
    for module in modules:
        if not any(module in name.split(".") for name in names) and module != "lm_head":  # a tied head has no parameter
            raise ValueError(f"No parameter of the model lies in `{module}`; check `train_modules`.")


def make_lora_config(lora: dict, train_modules: list[str]):
    """LoRA on the language model's linear layers, the other modules that learn trained and saved whole.

    PEFT saves its adapters and `modules_to_save` and silently nothing else, so no module learns that is in neither.
    The text head gets an adapter with the language model, whose weights it may share. Raises `ValueError` when
    `train_modules` leave the language model out, since then there is nothing to adapt.
    """
    from peft import LoraConfig

    if not isinstance(lora, dict):
        raise ValueError(f"`lora` is {lora!r}; it needs fields of LoraConfig, such as {{r: 16}}.")
    if "language_model" not in train_modules:
        raise ValueError(
            f"`lora` adapts the language model, which is not among `train_modules`: {', '.join(train_modules)}."
        )
    whole = [name for name in train_modules if name not in ("language_model", "lm_head")]
    head = r"|lm_head" if "lm_head" in train_modules else ""
    defaults = {
        "target_modules": rf".*language_model\.layers.*_proj{head}",
        "modules_to_save": whole,
        "task_type": "CAUSAL_LM",
    }
    return LoraConfig(**{**defaults, **lora})
