"""What does a visual token cost beside a token of the plain language model? Random weights, real shapes.

    python benchmarks/decode_step.py --config hub_configs/unicode2-7b --device cuda
    python benchmarks/decode_step.py --config hub_configs/unicode2-7b --num-hidden-layers 1  # what a CPU can hold

The peer is `Qwen2ForCausalLM` with the very same layers and text head. Both decode behind the same prompt, an image and a question,
with `generate`, sampling from all scores; a token's time is the slope between a short and a long run. The physical limit is the
time to read once, from memory, the weights that the step needs, at the bandwidth measured by a copy in the same run.
With fewer layers than the configuration has, the last column adds the missing ones to both sides, each at the time by which the
peer slows down when it gets twice the layers.
"""

import argparse
import copy
import math
import platform
import resource
import subprocess
import sys
import time
from contextlib import contextmanager
from datetime import date

import torch
from transformers import AutoConfig, Qwen2ForCausalLM

from transformers_unicode2 import UniCode2ForConditionalGeneration
from transformers_unicode2.quantization_unicode2 import equal_cells


def make_model(config, device: str) -> UniCode2ForConditionalGeneration:
    """A model with random weights, made on `device` without a copy elsewhere."""
    with torch.device("meta"):
        model = UniCode2ForConditionalGeneration(config).to(config.dtype)
    model.get_quantizer().to(torch.float32)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, tensor in model.state_dict().items():
        if name.endswith("cell_offsets"):
            tensor.copy_(equal_cells(config.codebook_config.codebook_size, config.codebook_config.num_cells))
        elif "norm" in name and name.endswith("weight"):
            tensor.fill_(1)
        elif tensor.is_floating_point():
            tensor.normal_(0, 0.02, generator=generator)
        else:
            tensor.zero_()
    for module in model.modules():  # tables that no checkpoint holds
        if hasattr(module, "inv_freq") or hasattr(module, "position_ids"):
            module._init_weights(module) if hasattr(module, "_init_weights") else model._init_weights(module)
    model.tie_weights()
    return model.eval()


def make_peer(model) -> Qwen2ForCausalLM:
    """The plain language model: the same modules, without anything visual."""
    with torch.device("meta"):
        peer = Qwen2ForCausalLM(model.config.text_config)
    peer.model, peer.lm_head = model.model.language_model, model.lm_head
    return peer.eval()


def time_tokens(generate, lengths: tuple[int, int], device: str, repeats: int) -> float:
    """Seconds a token: the slope between runs of two lengths, the fastest of `repeats` each."""
    fastest = []
    for length in lengths:
        runs = []
        for _ in range(repeats):
            synchronize(device)
            start = time.perf_counter()
            generate(length)
            synchronize(device)
            runs.append(time.perf_counter() - start)
        fastest.append(min(runs))
    return (fastest[1] - fastest[0]) / (lengths[1] - lengths[0])


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure_bandwidth(device: str) -> float:
    """Bytes a second of a large copy, read and written."""
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
    parser.add_argument("--num-hidden-layers", type=int, help="fewer layers than the configuration has")
    parser.add_argument("--lengths", type=int, nargs=2, help="tokens of the short and the long run, square numbers")
    parser.add_argument("--repeats", type=int, default=3)
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
        lengths = tuple(args.lengths or ((math.isqrt(total) // 3) ** 2, total))
        image = torch.randint(config.codebook_config.codebook_size, (1, total)) + config.visual_token_offset
        text = torch.randint(1000, 2000, (1, 24))
        prompt = torch.cat([text, image, text], 1).to(args.device)
        plain = prompt.where(prompt < config.visual_token_offset, 1000)
        options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "pad_token_id": 0}

        def visual(length, guidance_scale=None, model=model, prompt=prompt, options=options):
            with fixed_length(model, length):
                model.generate(prompt, generation_mode="image", guidance_scale=guidance_scale, **options)

        def text_only(length, peer=peer, plain=plain, options=options):
            peer.generate(plain, min_new_tokens=length, max_new_tokens=length, **options)

        def two_texts(length, text_only=text_only, plain=plain):
            text_only(length, plain=torch.cat([plain] * 2))

        def measure(run, lengths=lengths):
            return time_tokens(run, lengths, args.device, args.repeats)

        weights = count_bytes(model.model.language_model.layers)
        c2, text_head = model.model.visual_embeddings.weight.nbytes, model.lm_head.weight.nbytes
        visual_head = c2 if head == "flat" else c2 // config.codebook_config.num_cells
        baseline = measure(text_only)
        missing = dict.fromkeys((1, 2), 0.0)  # by rows, as guidance has two
        if text_config.num_hidden_layers < all_layers:
            factor = (all_layers - text_config.num_hidden_layers) / text_config.num_hidden_layers
            for rows_of_batch, run in ((1, text_only), (2, two_texts)):
                shallow = measure(run)
                with twice_the_layers(peer):
                    missing[rows_of_batch] = (measure(run) - shallow) * factor
        for name, run, read in (
            ("Qwen2, text", text_only, text_head),
            (f"UniCode², {head}", visual, visual_head),
            (f"UniCode², {head}, guidance", lambda length, run=visual: run(length, 3.0), visual_head),
        ):
            seconds = baseline if run is text_only else measure(run)
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
def twice_the_layers(peer: Qwen2ForCausalLM):
    """Inside, every layer of the peer runs twice, with a cache of its own each time."""
    layers, config = peer.model.layers, peer.config
    kept, types = config.num_hidden_layers, config.layer_types
    peer.model.layers = torch.nn.ModuleList([*layers, *copy_layers(layers, kept)])
    config.num_hidden_layers, config.layer_types = 2 * kept, 2 * types
    try:
        yield
    finally:
        peer.model.layers = layers
        config.num_hidden_layers, config.layer_types = kept, types


def copy_layers(layers: torch.nn.ModuleList, offset: int) -> list[torch.nn.Module]:
    """Layers with weights of their own, as a cache line read twice would be cheaper than two, and their own index."""
    copies = copy.deepcopy(list(layers))
    for layer in copies:
        layer.self_attn.layer_idx += offset
    return copies


@contextmanager
def fixed_length(model, length: int):
    """Inside, an image has `length` tokens, a square number, so that runs of two lengths can be compared."""
    config = model.config.vision_config
    kept, config.image_size = config.image_size, math.isqrt(length) * config.patch_size
    try:
        yield
    finally:
        config.image_size = kept


if __name__ == "__main__":
    main()
