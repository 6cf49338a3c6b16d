"""Both visual heads against brute force, and a loss that never holds the scores of all targets."""

import subprocess
import sys

import pytest
import torch
from memory import MadeTensors
from torch.utils._python_dispatch import TorchDispatchMode

from transformers_unicode2 import UniCode2Config, UniCode2ForConditionalGeneration, visual_head_unicode2

HEADS = ("flat", "two_level")
SIZES = [20, 30, 0, 10, 36]  # of the cells; one is empty


@pytest.fixture(params=HEADS)
def headed(request, config):
    """A model with either head, random weights and cells of different sizes."""
    config.visual_head = request.param
    config.codebook_config.num_cells = len(SIZES)
    torch.manual_seed(0)
    model = UniCode2ForConditionalGeneration(UniCode2Config(**config.to_dict())).eval()
    offsets = torch.tensor([0, *SIZES]).cumsum(0)
    model.get_quantizer().codebook.cell_offsets.copy_(offsets)
    if request.param == "two_level":
        model.visual_head.cell_offsets.copy_(offsets)
    with torch.no_grad():
        for parameter in (model.model.visual_embeddings.weight, model.visual_head.linear.weight):
            parameter.normal_(std=0.5)
    return model


def brute_force(model, hidden, unconditional=None, guidance_scale=1.0):
    """Log-probability of each code after hidden states `(num_rows, hidden_size)`, one code at a time, in float64."""
    head, codes = model.visual_head, model.model.visual_embeddings.weight.double()
    output = hidden.double() @ head.linear.weight.double().T + head.linear.bias.double()
    if (
        unconditional is not None
    ):  # what both heads compute from the hidden states is guided: scores of cells, queries for codes
        other = unconditional.double() @ head.linear.weight.double().T + head.linear.bias.double()
        output = other + guidance_scale * (output - other)
    scores = output[:, : codes.shape[1]] @ codes.T
    if model.config.visual_head == "flat":
        return scores.log_softmax(-1)
    cell_scores = output[:, codes.shape[1] :]
    result, start = torch.full_like(scores, float("nan")), 0
    filled = [i for i, size in enumerate(SIZES) if size]
    cell_probability = dict(zip(filled, cell_scores[:, filled].log_softmax(-1).T))
    for cell, size in enumerate(SIZES):
        for code in range(start, start + size):
            inside = scores[:, start : start + size].log_softmax(-1)
            result[:, code] = cell_probability[cell] + inside[:, code - start]
        start += size
    return result


def test_scores_are_those_of_brute_force(headed):
    hidden = torch.randn(6, 32)
    scores = headed.visual_head(hidden[None], headed.model.visual_embeddings)[0]
    reference = brute_force(headed, hidden)
    assert torch.allclose(scores.double().log_softmax(-1), reference, atol=1e-5)
    assert torch.allclose(reference.exp().sum(-1), torch.ones(6, dtype=torch.double))
    if headed.config.visual_head == "two_level":
        assert torch.allclose(scores.double(), reference, atol=1e-5)  # normalised as they come


def test_loss_and_gradients_are_those_of_brute_force(headed, monkeypatch):
    hidden, codes = torch.randn(40, 32, requires_grad=True), torch.randint(96, (40,))
    parameters = [hidden, headed.model.visual_embeddings.weight, headed.visual_head.linear.weight]
    expected = -brute_force(headed, hidden)[torch.arange(40), codes].sum()
    expected_gradients = torch.autograd.grad(expected, parameters)
    targets = codes[None] + headed.config.visual_token_offset
    for limit in (2**26, 96 * 7):  # in one part, and in several
        monkeypatch.setattr(visual_head_unicode2, "MAX_SCORES", limit)
        loss = headed.compute_loss(hidden[None], targets, num_items_in_batch=1)[0]
        gradients = torch.autograd.grad(loss, parameters)
        assert torch.allclose(loss.double(), expected, rtol=1e-6)
        for gradient, reference in zip(gradients, expected_gradients):
            assert (gradient - reference).norm() <= 1e-5 * reference.norm()


def test_loss_is_cut_by_the_scores_that_the_head_computes(headed, monkeypatch):
    """For a two-level head those of all cells and of the largest one, since each part fills a gradient of all of C2."""
    parts, compute_nll = [], type(headed.visual_head).compute_nll

    def noted(self, *args, codes):
        parts.append(len(codes))
        return compute_nll(self, *args, codes=codes)

    monkeypatch.setattr(type(headed.visual_head), "compute_nll", noted)
    monkeypatch.setattr(visual_head_unicode2, "MAX_SCORES", 96 * 10)
    targets = torch.randint(96, (1, 40)) + headed.config.visual_token_offset
    headed.compute_loss(torch.randn(1, 40, 32), targets)
    num_scores = 96 if headed.config.visual_head == "flat" else len(SIZES) + max(SIZES)
    assert parts[0] == 96 * 10 // num_scores and sum(parts) == 40


def test_loss_never_holds_all_scores(headed, monkeypatch):
    hidden = torch.randn(1, 301, 32, requires_grad=True)
    targets = torch.randint(96, (1, 301)) + headed.config.visual_token_offset
    texts = torch.randint(20, 700, (1, 301))
    monkeypatch.setattr(visual_head_unicode2, "MAX_SCORES", 768 * 10)
    for labels in (targets, texts):
        with MadeTensors() as made:
            headed.compute_loss(hidden, labels)[0].backward()
        parameters = max(p.numel() for p in headed.parameters())
        assert made.largest <= max(768 * 10, parameters, hidden.numel())


def test_drawn_codes_follow_the_product(headed):
    """A drawn cell and a code drawn from it have the product's distribution, at any temperature."""
    hidden = torch.randn(1, 32).expand(200_000, 1, 32)
    for temperature in (1.0, 0.7):
        torch.manual_seed(1)
        scores = headed.visual_head(hidden, headed.model.visual_embeddings, temperature=temperature)[:, 0]
        drawn = torch.multinomial((scores / temperature).softmax(-1), 1)[:, 0]
        frequency = drawn.bincount(minlength=96) / len(drawn)
        reference = brute_force(headed, hidden[0])[0]
        if headed.config.visual_head == "flat":
            expected = (reference / temperature).softmax(-1)
        else:
            cells = torch.repeat_interleave(torch.tensor(SIZES))
            mass = torch.zeros(5, dtype=torch.double).scatter_add(0, cells, reference.exp())
            within = torch.where(mass[cells] > 0, reference - mass[cells].log(), -torch.inf)
            heat = torch.zeros(5, dtype=torch.double).scatter_add(0, cells, (within / temperature).exp())
            cell_probability = (mass.log() / temperature).softmax(-1)
            expected = cell_probability[cells] * (within / temperature).exp() / heat[cells]
        assert (frequency - expected).abs().sum() < 0.02, temperature


@pytest.mark.parametrize(
    "arguments", [{"do_sample": True}, {"do_sample": False}, {"do_sample": True, "guidance_scale": 3.0}]
)
def test_either_head_draws(headed, arguments):
    prompt = torch.tensor([[20, 21, 22], [23, 24, 25]])
    torch.manual_seed(3)
    codes = headed.generate(prompt, generation_mode="image", **arguments)
    assert codes.shape == (2, 16) and (codes >= headed.config.visual_token_offset).all()
    torch.manual_seed(3)
    assert torch.equal(codes, headed.generate(prompt, generation_mode="image", **arguments))


def test_either_head_is_saved_and_loaded(headed, tmp_path, pixel_values):
    headed.save_pretrained(tmp_path)
    loaded = UniCode2ForConditionalGeneration.from_pretrained(tmp_path)
    assert type(loaded.visual_head) is type(headed.visual_head)
    for name, value in headed.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name


def test_guidance_guides_each_step_and_with_a_flat_head_the_scores(headed):
    hidden = torch.randn(2, 3, 32)
    guided = headed.visual_head(hidden, headed.model.visual_embeddings, guidance_scale=2.5)[0]
    expected = brute_force(headed, hidden[0], hidden[1], 2.5)
    assert torch.allclose(guided.double().log_softmax(-1), expected, atol=1e-4)
    if headed.config.visual_head == "flat":
        conditional, unconditional = headed.visual_head(hidden, headed.model.visual_embeddings)
        assert torch.allclose(guided, torch.lerp(unconditional, conditional, 2.5), atol=1e-4)


def test_two_level_head_computes_a_fraction_of_the_scores(config):
    config.visual_head = "two_level"
    config.codebook_config.codebook_size, config.codebook_config.num_cells = 10_000, 100
    model = UniCode2ForConditionalGeneration(UniCode2Config(**config.to_dict()))
    from torch.utils.flop_counter import FlopCounterMode

    def count(temperature):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.visual_head(torch.randn(1, 1, 32), model.model.visual_embeddings, temperature=temperature)
        return counter.get_total_flops()

    assert count(1.0) < 0.05 * count(None)


def test_unknown_head_is_refused(config):
    with pytest.raises(ValueError, match="`visual_head` is 'tree'; it must be one of flat, two_level"):
        UniCode2Config(**{**config.to_dict(), "visual_head": "tree"})


def test_top_k_of_the_two_level_head_is_that_of_all_codes(headed):
    prompt = torch.tensor([[20, 21, 22]])
    greedy = headed.generate(prompt, generation_mode="image", do_sample=False)
    for seed in range(3):
        torch.manual_seed(seed)
        assert torch.equal(greedy, headed.generate(prompt, generation_mode="image", do_sample=True, top_k=1))


def test_backward_of_the_loss_takes_memory_for_c2_once(headed):
    hidden = torch.randn(1, 200, 32, requires_grad=True)
    targets = torch.randint(96, (1, 200)) + headed.config.visual_token_offset

    class LargeTensors(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            output = func(*args, **(kwargs or {}))
            if isinstance(output, torch.Tensor) and output.shape == headed.model.visual_embeddings.weight.shape:
                self.count += 1
            return output

    loss = headed.compute_loss(hidden, targets)[0]
    with LargeTensors() as made:
        loss.backward()
    assert made.count <= 6  # not one for each of the cells


SHARED = """
import sys
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers_unicode2 import UniCode2ForConditionalGeneration, visual_head_unicode2

distributed.init_process_group("gloo")
rank, mesh = distributed.get_rank(), init_device_mesh("cpu", (2,))
# Four targets of the flat head in a part
visual_head_unicode2.MAX_SCORES = 4 * 96
model = UniCode2ForConditionalGeneration.from_pretrained(sys.argv[1])
ids = torch.randint(768, 768 + 96, (2, 30), generator=torch.Generator().manual_seed(0))
labels = ids.clone()
labels[1, 4:] = -100


def measure(**options):
    return model(input_ids=ids[rank : rank + 1], labels=labels[rank : rank + 1], **options)


model.train()
expected = measure().loss
expected.backward()
gradient = model.model.visual_embeddings.weight.grad.clone()
distributed.all_reduce(gradient)
model.zero_grad()
for part in (model.model.visual_embeddings, model.visual_head, model.lm_head, model):
    fully_shard(part, mesh=mesh)
loss = measure().loss
loss.backward()
torch.testing.assert_close(loss, expected)
torch.testing.assert_close(model.model.visual_embeddings.weight.grad.full_tensor(), gradient / 2)
model.eval()
with torch.no_grad():
    nll = measure(measure_targets=True).measured.nll.sum()
torch.testing.assert_close(nll, expected * (29, 3)[rank])
print("equal")
"""


@pytest.mark.slow
def test_processes_that_share_weights_ask_for_them_alike(headed, tmp_path):
    """Though one has ten times the targets of the other: else one would wait for ever."""
    headed.save_pretrained(tmp_path / "model")
    (tmp_path / "run.py").write_text(SHARED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(tmp_path / "run.py"), str(tmp_path / "model")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert run.stdout.count("equal") == 2, run.stderr[-3000:]
