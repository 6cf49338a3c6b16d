"""Cost of a visual token beside a token of the plain language model. Random weights, real shapes.

    python benchmarks/decode_step.py --config hub_configs/unicode2-7b --device cuda
    python benchmarks/decode_step.py --config hub_configs/unicode2-7b --num-hidden-layers 1  # fits a CPU

The peer is `Qwen2ForCausalLM` with the same layers and text head. Both decode after the same prompt, an image and a
question, with `generate`, sampling from all scores. A token's time is the median over the steps of a run without the
first. The physical limit is the time to read the weights of the step from memory once, at the bandwidth of a copy in
the same run. With fewer layers than the configuration has, the last column adds the missing ones to both sides. Each
counts as the time of one layer for one row, or for two with guidance.
"""

import argparse
import math
import platform
import resource
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from datetime import date
from itertools import pairwise

import torch
from transformers import AutoConfig, Qwen2ForCausalLM, StoppingCriteria

from transformers_unicode2 import UniCode2ForConditionalGeneration
from transformers_unicode2.quantization_unicode2 import equal_cells


def make_model(config, device: str) -> UniCode2ForConditionalGeneration:
    """A model with random weights, created on `device` without a copy elsewhere."""
    with torch.device("meta"):
        model = UniCode2ForConditionalGeneration(config).to(config.dtype)
    model.get_quantizer().to(torch.float32)
    model.to_empty(device=device)
    noise = torch.randn(2**20, device=device, generator=torch.Generator(device).manual_seed(0)) * 0.02
    for name, tensor in model.state_dict().items():
        if name.endswith("cell_offsets"):
            tensor.copy_(equal_cells(config.codebook_config.codebook_size, config.codebook_config.num_cells))
        elif "norm" in name and name.endswith("weight"):
            tensor.fill_(1)
        elif tensor.is_floating_point():
            # The noise repeats, which does not affect timings.
            for part in tensor.view(-1).split(len(noise)):
                part.copy_(noise[: len(part)])
        else:
            tensor.zero_()
    # Tables that are not in a checkpoint.
    for module in model.modules():
        if hasattr(module, "inv_freq") or hasattr(module, "position_ids"):
            module._init_weights(module) if hasattr(module, "_init_weights") else model._init_weights(module)
    model.tie_weights()
    return model.eval()


def make_peer(model) -> Qwen2ForCausalLM:
    """The plain language model: the same modules without the visual ones."""
    with torch.device("meta"):
        peer = Qwen2ForCausalLM(model.config.text_config)
    peer.model, peer.lm_head = model.model.language_model, model.lm_head
    return peer.eval()


class Clock(StoppingCriteria):
    """Records the time of each token, and never stops."""

    def __init__(self, device: str):
        self.device, self.times = device, []

    def __call__(self, input_ids, scores, **kwargs):
        synchronize(self.device)
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def time_tokens(generate, length: int, device: str) -> float:
    """Seconds per token: the median over the steps of `generate(length, stopping_criteria=...)`."""
    clock = Clock(device)
    generate(length, stopping_criteria=[clock])
    return statistics.median(later - sooner for sooner, later in pairwise(clock.times))


@torch.no_grad()
def time_layer(peer: Qwen2ForCausalLM, rows: int, device: str, repeats: int = 50) -> float:
    """Seconds of a decoder layer for one token in each of `rows` sequences; the median of `repeats` runs."""
    layer, size, dtype = peer.model.layers[0], peer.config.hidden_size, peer.dtype
    hidden = torch.randn(rows, 1, size, device=device, dtype=dtype)
    place = peer.model.rotary_emb(hidden, torch.full((rows, 1), 800, device=device))
    seconds = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        layer(hidden, position_embeddings=place)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[repeats // 2]


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure_bandwidth(device: str) -> float:
    """Bytes per second, read plus written, of a large copy."""
    source = torch.empty(2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    synchronize(device)
    start = time.perf_counter()
    for _ in range(8):
        target.copy_(source)
    synchronize(device)
    return 8 * 2 * source.numel() / (time.perf_counter() - start)


def name_device(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    models = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {torch.get_num_threads()} threads"


def peak_gib(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def count_bytes(*modules) -> int:
    return sum(parameter.nbytes for module in modules for parameter in module.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", default="hub_configs/unicode2-7b")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--num-hidden-layers", type=int, help="use fewer layers than the configuration has")
    parser.add_argument("--length", type=int, help="tokens per run, a square number (default: one image)")
    args = parser.parse_args()
    rows, bandwidth = [], measure_bandwidth(args.device)
    for head in ("flat", "two_level"):
        config = AutoConfig.from_pretrained(args.config, visual_head=head)
        text_config, all_layers = config.text_config, config.text_config.num_hidden_layers
        text_config.num_hidden_layers = args.num_hidden_layers or all_layers
        text_config.layer_types = text_config.layer_types[: text_config.num_hidden_layers]
        torch.manual_seed(0)
        model = make_model(config, args.device)
        peer = make_peer(model)
        total = config.num_image_tokens
        length = args.length or total
        image = torch.randint(config.codebook_config.codebook_size, (1, total)) + config.visual_token_offset
        text = torch.randint(1000, 2000, (1, 24))
        prompt = torch.cat([text, image, text], 1).to(args.device)
        plain = prompt.where(prompt < config.visual_token_offset, 1000)
        options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "pad_token_id": 0}

        def visual(length, guidance_scale=None, model=model, prompt=prompt, options=options, **clock):
            with fixed_length(model, length):
                model.generate(prompt, generation_mode="image", guidance_scale=guidance_scale, **options, **clock)

        def text_only(length, peer=peer, plain=plain, options=options, **clock):
            peer.generate(plain, min_new_tokens=length, max_new_tokens=length, **options, **clock)

        weights = count_bytes(model.model.language_model.layers)
        c2, text_head = model.model.visual_embeddings.weight.nbytes, model.lm_head.weight.nbytes
        visual_head = c2 if head == "flat" else c2 // config.codebook_config.num_cells
        baseline = time_tokens(text_only, length, args.device)
        num_missing = all_layers - text_config.num_hidden_layers
        missing = {rows: num_missing and num_missing * time_layer(peer, rows, args.device) for rows in (1, 2)}
        for name, run, read in (
            ("Qwen2, text", text_only, text_head),
            (f"UniCode², {head}", visual, visual_head),
            (f"UniCode², {head}, guidance", lambda length, run=visual, **clock: run(length, 3.0, **clock), visual_head),
        ):
            seconds = baseline if run is text_only else time_tokens(run, length, args.device)
            limit = (weights + read) / bandwidth
            added = missing[2 if "guidance" in name else 1]
            rows.append((name, seconds, seconds / baseline, limit, (seconds + added) / (baseline + missing[1])))
        rows[-1] += (peak_gib(args.device),)
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        del model, peer
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    layers = f"{text_config.num_hidden_layers} of {all_layers} layers"
    print(f"{date.today()}, {name_device(args.device)}, commit {commit}, torch {torch.__version__}, {layers},")
    print(f"`{' '.join(sys.argv)}`\n")
    print(f"| decode step | ms a token | of Qwen2 | limit, ms | of Qwen2, {all_layers} layers | peak so far, GiB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, seconds, ratio, limit, projected, *peak in rows:
        memory = f"{peak[0]:.1f}" if peak else ""
        print(f"| {name} | {1e3 * seconds:.2f} | {ratio:.2f} | {1e3 * limit:.2f} | {projected:.2f} | {memory} |")


@contextmanager
def fixed_length(model, length: int):
    """Inside the context, an image has `length` tokens, a square number."""
    config = model.config.vision_config
    kept, config.image_size = config.image_size, math.isqrt(length) * config.patch_size
    try:
        yield
    finally:
        config.image_size = kept


if __name__ == "__main__":
    main()
