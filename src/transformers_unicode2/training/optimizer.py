"""Muon for the weight matrices of a transformer, AdamW for everything else, as one optimizer that the Trainer takes."""

import torch


class MuonWithAdamW(torch.optim.Optimizer):
    """Two optimizers of torch that share one learning rate schedule.

    Muon moves a matrix by the orthogonal part of its momentum, scaled to the root mean square of an AdamW step, so
    that a learning rate for AdamW fits both. From scratch it reaches the same loss in about half the steps.

    Args:
        model: its trainable matrices go to Muon, except embeddings and the output layers named in `adamw_modules`.
        lr: learning rate of both.
        betas: of AdamW; Muon's momentum is 0.95.
        weight_decay: of both, decoupled.
        adamw_modules: modules, by the last part of their names, whose matrices AdamW takes too.
        eps: of AdamW.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        adamw_modules: tuple[str, ...] = (),
        eps: float = 1e-8,
    ):
        matrices, others = [], []
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                plain = (
                    parameter.ndim != 2
                    or id(parameter) in embeddings
                    or not set(name.split(".")).isdisjoint(adamw_modules)
                )
                (others if plain else matrices).append(parameter)
        self.parts = (
            torch.optim.Muon(matrices, lr, weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr, betas, eps, weight_decay, fused=True),
        )
        super().__init__([*matrices, *others], {})
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @classmethod
    def for_trainer(cls, model: torch.nn.Module, training_args, adamw_modules: tuple[str, ...] = ()):
        """The optimizer with the learning rate, betas and weight decay of `TrainingArguments`."""
        betas = (training_args.adam_beta1, training_args.adam_beta2)
        options = (training_args.weight_decay, adamw_modules, training_args.adam_epsilon)
        return cls(model, training_args.learning_rate, betas, *options)

    def step(self, closure=None):
        loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict) -> None:
        for part, state in zip(self.parts, state_dict["parts"]):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def check_muon(training_args) -> None:
    """Raises `ValueError` on options of other optimizers, which `MuonWithAdamW` does not follow."""
    for name, default in (("optim", "adamw_torch_fused"), ("optim_args", None), ("optim_target_modules", None)):
        if getattr(training_args, name) != default:
            raise ValueError(
                f"`{name}` is {getattr(training_args, name)}; with `muon` it is not followed, so leave it out."
            )
