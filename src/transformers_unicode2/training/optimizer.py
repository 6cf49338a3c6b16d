"""Optimizers that the Trainer takes: Muon beside AdamW, and float32 masters of weights with fewer bits."""

import torch

from .parameters import check_rates, find_part, group_parameters


class MuonWithAdamW(torch.optim.Optimizer):
    """Two optimizers of torch that share one learning rate schedule.

    Muon moves a matrix by the orthogonal part of its momentum. That is scaled to the root mean square of an AdamW step,
    so a learning rate for AdamW fits both. From scratch it reaches the same loss in about half the steps.

    Args:
        model: its trainable matrices go to Muon, except embeddings and the output layers named in `adamw_modules`.
        lr: learning rate of both.
        betas: of AdamW; Muon's momentum is 0.95.
        weight_decay: of both, decoupled.
        adamw_modules: modules, by the last part of their names, whose matrices AdamW takes too.
        eps: of AdamW.
        learning_rates: of parts, by the names of modules; the rest has `lr`.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        adamw_modules: tuple[str, ...] = (),
        eps: float = 1e-8,
        learning_rates: dict[str, float] | None = None,
    ):
        rates = learning_rates or {}
        matrices = {part: [] for part in (None, *rates)}
        others = {part: [] for part in (None, *rates)}
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                plain = (
                    parameter.ndim != 2
                    or id(parameter) in embeddings
                    or not set(name.split(".")).isdisjoint(adamw_modules)
                )
                (others if plain else matrices)[find_part(name, rates)].append(parameter)
        groups = [
            [{"params": chosen, "lr": rates.get(part, lr), "part": part} for part, chosen in kind.items() if chosen]
            for kind in (matrices, others)
        ]
        self.parts = (
            torch.optim.Muon(groups[0], lr, weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(groups[1], lr, betas, eps, weight_decay, fused=True),
        )
        super().__init__([parameter for kind in groups for group in kind for parameter in group["params"]], {})
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @classmethod
    def for_trainer(
        cls,
        model: torch.nn.Module,
        training_args,
        adamw_modules: tuple[str, ...] = (),
        learning_rates: dict[str, float] | None = None,
    ):
        """The optimizer with the learning rate, betas and weight decay of `TrainingArguments`."""
        betas = (training_args.adam_beta1, training_args.adam_beta2)
        options = (training_args.weight_decay, adamw_modules, training_args.adam_epsilon, learning_rates)
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


class MasterWeights(torch.optim.Optimizer):
    """An optimizer over float32 copies, masters, of parameters that have fewer bits.

    A bfloat16 weight has 8 bits, so a step of less than about 1/256 of it would be lost. The masters keep it; the
    parameters are their rounded copies. Parameters in float32 are their own masters.

    Args:
        groups: groups of parameters, as an optimizer takes them.
        kind: class of an optimizer of torch, such as `torch.optim.AdamW`.
        **options: of that class.
    """

    def __init__(self, groups: list[dict], kind: type[torch.optim.Optimizer], **options):
        self.pairs, of_masters = [], []
        for group in groups:
            masters = []
            for parameter in group["params"]:
                is_master = parameter.dtype == torch.float32
                masters.append(parameter if is_master else parameter.detach().float())
                self.pairs += [] if is_master else [(parameter, masters[-1])]
            of_masters.append({**group, "params": masters})
        self.inner = kind(of_masters, **options)
        super().__init__([parameter for group in groups for parameter in group["params"]], {})
        self.param_groups, self.state = self.inner.param_groups, self.inner.state

    def step(self, closure=None):
        loss = None if closure is None else closure()
        for parameter, master in self.pairs:
            master.grad = None if parameter.grad is None else parameter.grad.float()
        self.inner.step()
        with torch.no_grad():
            for parameter, master in self.pairs:
                parameter.copy_(master)
                master.grad = None
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)
        for parameter, _ in self.pairs:
            parameter.grad = None

    def state_dict(self) -> dict:
        return {"inner": self.inner.state_dict(), "masters": [master for _, master in self.pairs]}

    def load_state_dict(self, state_dict: dict) -> None:
        self.inner.load_state_dict(state_dict["inner"])
        self.param_groups, self.state = self.inner.param_groups, self.inner.state
        for (_, master), saved in zip(self.pairs, state_dict["masters"], strict=True):
            master.copy_(saved)


class PartRates:
    """Mixin of a `Trainer` whose parts may have learning rates of their own, and float32 masters of their weights.

    Attributes:
        learning_rates (`dict[str, float]`): by the names of modules; the rest has `learning_rate`.
        master_weights (`bool`): see `MasterWeights`.
    """

    learning_rates: dict = {}
    master_weights = False

    def training_step(self, *args, **kwargs):
        if self.learning_rates:
            # Those of this step: when it is logged, the schedule is at the next
            self.rates = {group["part"]: group["lr"] for group in self.optimizer.param_groups}
        return super().training_step(*args, **kwargs)

    def create_optimizer(self, model=None):
        model = self.model if model is None else model
        if self.optimizer is None and (self.learning_rates or self.master_weights):
            check_rates(model, self.learning_rates)
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            if not issubclass(kind, torch.optim.Optimizer) or {"params", "model", "optimizer_dict"} & options.keys():
                raise ValueError(
                    f"`optim` is {self.args.optim}, which makes its own groups of parameters; `learning_rates` and "
                    "`master_weights` need another."
                )
            decayed = self.get_decay_parameter_names(model)
            groups = group_parameters(model, decayed, self.args.weight_decay, self.learning_rates)
            if self.master_weights:
                check_masters(model, self.args)
                self.optimizer = MasterWeights(groups, kind, **options)
            else:
                self.optimizer = kind(groups, **options)
        return super().create_optimizer(model)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "learning_rate" in logs and self.learning_rates:
            logs |= {f"learning_rate_{part}" if part else "learning_rate": rate for part, rate in self.rates.items()}
        super().log(logs, start_time)


def check_masters(model: torch.nn.Module, training_args) -> None:
    """Raises `ValueError` where `master_weights` has nothing to do, or another part of the run does it already."""
    if all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad):
        raise ValueError(
            "`master_weights` keeps float32 copies of weights with fewer bits, and all that learn are in float32; set "
            "`dtype: bfloat16`, or leave it out."
        )
    if training_args.deepspeed or training_args.fsdp:
        raise ValueError("`master_weights` is not for DeepSpeed and FSDP, which keep float32 weights themselves.")


def check_muon(training_args) -> None:
    """Raises `ValueError` on options of other optimizers, which `MuonWithAdamW` does not follow."""
    for name, default in (("optim", "adamw_torch_fused"), ("optim_args", None), ("optim_target_modules", None)):
        if getattr(training_args, name) != default:
            raise ValueError(
                f"`{name}` is {getattr(training_args, name)}; with `muon` it is not followed, so leave it out."
            )
