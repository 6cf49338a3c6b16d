"""Parts with learning rates of their own, and float32 masters, do what float32 training with such groups does."""

import copy

import pytest
import torch
import yaml
from torch import nn
from transformers import TrainingArguments

from transformers_unicode2.training.optimizer import MasterWeights, MuonWithAdamW, check_masters
from transformers_unicode2.training.parameters import check_rates, freeze_all_but, group_parameters, read_rates


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = nn.Module()
    net.body = nn.Module()
    net.body.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
    net.body.norm = nn.LayerNorm(8)
    net.head = nn.Linear(8, 4)
    return net


def test_groups_hold_each_parameter_once_with_the_rate_of_the_longest_name(net):
    rates = {"body": 1e-3, "body.layers": 2e-3}
    groups = group_parameters(net, ["body.layers.0.weight", "head.weight"], 0.1, rates)
    found = {id(p): (group.get("lr"), group["weight_decay"]) for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(found) == len(list(net.parameters()))
    expected = {"body.layers.0.weight": (2e-3, 0.1), "body.layers.1.bias": (2e-3, 0.0), "body.norm.weight": (1e-3, 0.0)}
    expected |= {"head.weight": (None, 0.1), "head.bias": (None, 0.0)}
    for name, wanted in expected.items():
        assert found[id(net.get_parameter(name))] == wanted, name
    assert [group["part"] for group in groups] == [None, None, "body", "body.layers", "body.layers"]


@pytest.mark.parametrize(
    "rates, message",
    [
        ({"tail": 1e-3}, "names `tail`, in which no parameter learns"),
        ({"head": 1e-3}, "names `head`, in which no parameter learns"),
        ({"body": 0.0}, "The learning rate of `body` is 0.0; it must be a positive number"),
    ],
)
def test_rates_of_what_does_not_learn_are_refused(net, rates, message):
    freeze_all_but(net, ["body.layers"])
    assert {name for name, p in net.named_parameters() if p.requires_grad} == {
        f"body.layers.{number}.{kind}" for number in (0, 1) for kind in ("weight", "bias")
    }
    with pytest.raises(ValueError, match=message):
        check_rates(net, rates)


def test_rates_are_numbers_as_yaml_writes_them():
    assert read_rates(yaml.safe_load("{body: 1e-3, head: 0.5}")) == {"body": 1e-3, "head": 0.5}
    with pytest.raises(ValueError, match="The learning rate of `body` is 'fast'; it must be a positive number"):
        read_rates({"body": "fast"})


def train(net, optimizer, steps, start=0):
    for step in range(start, start + steps):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step)).to(net.head.weight.dtype)
        optimizer.zero_grad()
        net.head(net.body.norm(net.body.layers[1](net.body.layers[0](x)))).float().square().mean().backward()
        optimizer.step()


def test_masters_are_float32_training_with_gradients_of_rounded_weights(net):
    """The same as an AdamW over float32 weights, whose gradients come of a bfloat16 copy."""
    low = copy.deepcopy(net).bfloat16()
    high = copy.deepcopy(low).float()
    groups = group_parameters(low, [], 0.0, {"head": 1e-3})
    optimizer = MasterWeights(groups, torch.optim.AdamW, lr=1e-4)
    reference = torch.optim.AdamW(group_parameters(high, [], 0.0, {"head": 1e-3}), lr=1e-4)
    for step in range(20):
        copied = copy.deepcopy(high).bfloat16()
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step)).bfloat16()
        copied.head(
            copied.body.norm(copied.body.layers[1](copied.body.layers[0](x)))
        ).float().square().mean().backward()
        for parameter, other in zip(high.parameters(), copied.parameters()):
            parameter.grad = other.grad.float()
        reference.step()
        train(low, optimizer, 1, start=step)
    for parameter, other in zip(low.parameters(), high.parameters()):
        assert parameter.dtype == torch.bfloat16 and torch.equal(parameter, other.bfloat16())
    # These steps are far below what bfloat16 resolves
    plain = copy.deepcopy(net).bfloat16()
    train(plain, torch.optim.AdamW(plain.parameters(), lr=1e-5), 20)
    masters = copy.deepcopy(net).bfloat16()
    kept = MasterWeights([{"params": list(masters.parameters())}], torch.optim.AdamW, lr=1e-5)
    train(masters, kept, 20)
    start = net.head.weight.detach().bfloat16().float()
    moved = [master for parameter, master in kept.pairs if parameter is masters.head.weight][0] - start
    assert 1e-4 < moved.abs().median() < 3e-4


@pytest.mark.parametrize("kind", ["masters", "muon"])
def test_an_optimizer_resumes_exactly(net, kind):
    def make(module):
        if kind == "muon":
            return MuonWithAdamW(module, 1e-3, learning_rates={"head": 1e-2, "body.norm": 1e-4})
        groups = group_parameters(module, [], 0.0, {"head": 1e-2, "body.norm": 1e-4})
        return MasterWeights(groups, torch.optim.AdamW, lr=1e-3)

    net = net.bfloat16() if kind == "masters" else net
    whole, half = copy.deepcopy(net), copy.deepcopy(net)
    train(whole, make(whole), 6)
    first = make(half)
    train(half, first, 3)
    saved = copy.deepcopy(first.state_dict())
    resumed = copy.deepcopy(half)
    second = make(resumed)
    second.load_state_dict(saved)
    train(resumed, second, 3, start=3)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))
    rates = {group["part"]: group["lr"] for group in second.param_groups}
    assert rates == {None: 1e-3, "head": 1e-2, "body.norm": 1e-4}


def test_masters_of_float32_weights_are_refused(net, tmp_path):
    with pytest.raises(ValueError, match="all that learn are in float32; set `dtype: bfloat16`"):
        check_masters(net, TrainingArguments(str(tmp_path), use_cpu=True))
    check_masters(net.bfloat16(), TrainingArguments(str(tmp_path), use_cpu=True))
