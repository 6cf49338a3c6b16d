"""The steps of `half_a_million.py` that compose, load, run and train a model around the codebook."""

import argparse
import ast
import gc
import hashlib
import os
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from half_a_million_codebook import GIB, Sizes, link_images, measure_disk, read_rates, run_command
from rows import start_child, watch_peak

HEADS = ("flat", "two_level")
NUM_STEPS = 20
# Rows of a step.
BATCH = 4
# Visual targets of a step: two drawn pictures of 196 patches.
NUM_TARGETS = 392
# Width of C2 where it is updated alone. The time of an update grows with it.
NARROW = 64
LEARNING = ["visual_embeddings", "projector", "visual_head"]
OPTIMIZERS = {"AdamW": {}, "8-bit AdamW": {"optim": "adamw_torch_8bit"}, "Adafactor": {"optim": "adafactor"}}
# Bytes of an optimizer's state for a parameter. The 8-bit one keeps a float32 scale for each 256 values of a moment.
STATE = {"AdamW": 8.0, "8-bit AdamW": 2 + 2 * 4 / 256, "Adafactor": 0.0}
BYTES = {"F32": 4, "BF16": 2, "F16": 2, "U8": 1, "I64": 8, "I32": 4}
# The codebook, C2 and the visual head by the names of their weights in a checkpoint.
PARTS = {"codebook": "quantizer.codebook", "encoder": "vision_model", "C2": "visual_embeddings", "head": "visual_head"}


def compose(args: argparse.Namespace) -> list[dict]:
    """A checkpoint with each visual head, and the quantizer alone."""
    from safetensors import safe_open

    from transformers_unicode2 import UniCode2ImageProcessor, UniCode2Quantizer

    sizes, rows = Sizes(args), []
    for head in HEADS:
        folder = sizes.folder / f"model-{head}"
        words = ["--llm", args.llm, "--vision", args.encoder, "--codebook", sizes.folder / "real", "--output", folder]
        seconds = run_command("init", *words, "--visual-head", head)
        parts = dict.fromkeys([*PARTS, "others"], 0)
        for file in folder.glob("*.safetensors"):
            with safe_open(file, framework="pt") as stored:
                for name in stored.keys():
                    part = next((part for part, key in PARTS.items() if key in name), "others")
                    parts[part] += stored.get_tensor(name).nbytes
        found = ", ".join(f"{part} {size / GIB:.2f}" for part, size in parts.items()) + " GiB"
        disk = measure_disk(folder)
        limit = disk * GIB * (1 / read_rates(args).read + 1 / read_rates(args).write)
        row = {"what": f"init, {head} head", "s": seconds, "limit, s": limit, "limit of": "disk", "disk GiB": disk}
        rows.append(row | {"found": found})
    quantizer = UniCode2Quantizer.from_pretrained(sizes.folder / "model-flat")
    quantizer.save_pretrained(sizes.folder / "quantizer")
    UniCode2ImageProcessor.from_pretrained(sizes.folder / "model-flat").save_pretrained(sizes.folder / "quantizer")
    return rows


def resident() -> float:
    """Resident memory of this process in GiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / GIB


def load_quantizer(args: argparse.Namespace) -> list[dict]:
    """The quantizer alone: what loading takes beyond reading its files, its memory, and its codes by each search."""
    import torch
    from PIL import Image

    from transformers_unicode2 import UniCode2ImageProcessor, UniCode2Quantizer
    from transformers_unicode2.search.faiss_index import FaissSearch

    sizes, (_, held, _) = Sizes(args), link_images(args)
    folder, files = sizes.folder / "quantizer", sorted(held.iterdir())
    start = time.perf_counter()
    for file in folder.glob("*.safetensors"):
        with open(file, "rb") as opened:
            while opened.read(2**24):
                pass
    read = time.perf_counter() - start
    before, start = resident(), time.perf_counter()
    quantizer = UniCode2Quantizer.from_pretrained(folder)
    seconds = time.perf_counter() - start
    gc.collect()
    held_codes = quantizer.codebook.codes.nbytes / GIB
    encoder = sum(weight.nbytes for weight in quantizer.vision_model.parameters()) / GIB
    others = sum(b.nbytes for name, b in quantizer.codebook.named_buffers() if name != "codes") / GIB
    rows = [{"what": "quantizer: load", "s": seconds, "limit, s": read, "limit of": "reading the files"}]
    processor = UniCode2ImageProcessor.from_pretrained(folder)
    images, place = [], iter(files)
    while len(images) < 16:
        try:
            images.append(Image.open(next(place)).convert("RGB"))
        except (OSError, Image.DecompressionBombError):
            continue
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    start = time.perf_counter()
    quantizer.encode_images(pixels[:1])
    rows.append({"what": "quantizer: first picture, tables made", "s": time.perf_counter() - start, "peak GiB": None})
    grown = resident() - before
    allowed = 1.1 * held_codes + encoder + others
    found = (
        f"resident {grown:.2f} GiB; codes {held_codes:.2f}, encoder {encoder:.2f}, thumbnails and cells {others:.2f}"
    )
    rows[0] |= {"found": f"{found}; codes + 10 % + the rest {allowed:.2f}"}
    features = quantizer.get_image_features(pixels).last_hidden_state
    expected = quantizer.encode_features(features)
    for name, batch in (("one picture", pixels[:1]), ("16 pictures", pixels)):
        times = []
        for _ in range(3):
            start = time.perf_counter()
            quantizer.encode_images(batch)
            times.append(time.perf_counter() - start)
        start = time.perf_counter()
        quantizer.encode_features(features[: len(batch)])
        search = time.perf_counter() - start
        rows.append(
            {"what": f"quantizer: {name}", "s": min(times), "peak GiB": None, "found": f"search {search:.3g} s"}
        )
    for kind in ("flat", "ivf"):
        start = time.perf_counter()
        quantizer.codebook.search = FaissSearch(quantizer.codebook, kind)
        made = time.perf_counter() - start
        start = time.perf_counter()
        codes = quantizer.encode_features(features[:1])
        seconds = time.perf_counter() - start
        assert torch.equal(codes, expected[:1])
        found = f"made in {made:.2f} s; ids equal"
        rows.append({"what": f"FAISS {kind}: one picture", "s": seconds, "peak GiB": None, "found": found})
        del quantizer.codebook.search
    return rows


def generate(args: argparse.Namespace) -> list[dict]:
    """Time of a visual token beside a text token of the same model, with both heads, with and without guidance."""
    import torch
    from decode_step import time_tokens

    from transformers_unicode2 import UniCode2ForConditionalGeneration

    sizes, rows = Sizes(args), []
    for head in HEADS:
        start = time.perf_counter()
        model = UniCode2ForConditionalGeneration.from_pretrained(sizes.folder / f"model-{head}", dtype=torch.bfloat16)
        rows.append({"what": f"model, {head}: load", "s": time.perf_counter() - start, "peak GiB": None})
        prompt = torch.randint(1000, 2000, (1, 24), generator=torch.Generator().manual_seed(0))
        options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "pad_token_id": 0}
        length = model.config.num_image_tokens

        def text(length, model=model, prompt=prompt, options=options, **clock):
            ids = {"min_new_tokens": length, "max_new_tokens": length}
            model.generate(prompt, generation_mode="text", **ids, **options, **clock)

        def visual(length, guidance=None, model=model, prompt=prompt, options=options, **clock):
            model.generate(prompt, generation_mode="image", guidance_scale=guidance, **options, **clock)

        def guided(length, run=visual, **clock):
            run(length, 3.0, **clock)

        weights = sum(weight.nbytes for weight in model.model.language_model.layers.parameters())
        c2, lm_head = model.model.visual_embeddings.weight.nbytes, model.lm_head.weight.nbytes
        read = c2 if head == "flat" else c2 / model.config.codebook_config.num_cells
        baseline = None
        for name, run, scored in (
            ("text", text, lm_head),
            ("visual", visual, read),
            ("visual, guidance", guided, read),
        ):
            seconds = time_tokens(run, length, "cpu")
            baseline = baseline or seconds
            limit = (weights + scored) / read_rates(args).memory
            row = {
                "what": f"model, {head}: {name} token",
                "s": seconds,
                "limit, s": limit,
                "limit of": "reading weights",
            }
            rows.append(row | {"peak GiB": None, "found": f"{seconds / baseline:.2f} of a text token"})
        del model
        gc.collect()
    return rows


def write_pairs(args: argparse.Namespace) -> Path:
    """Captioned images: links to held-out ones, whose captions are the ends of their names."""
    _, held, _ = link_images(args)
    folder, lines = Sizes(args).folder / "pairs", []
    folder.mkdir(exist_ok=True)
    for file in sorted(held.iterdir())[:120]:
        link = folder / file.name
        if not link.is_symlink():
            link.symlink_to(file.resolve())
        lines.append(f"{file.name}\t{file.resolve().stem.replace('_', ' ').replace('-', ' ')}")
    (folder / "captions.tsv").write_text("\n".join(lines) + "\n")
    return folder


def run_stage(args: argparse.Namespace, name: str, changes: dict, kill: bool = False) -> dict:
    """Trains in a process of its own. With `kill`, that is killed behind its first checkpoint, and a second resumes."""
    import yaml

    folder = Sizes(args).folder
    # What a killed step left would be resumed, with the times of the rest
    shutil.rmtree(folder / name, ignore_errors=True)
    config = {
        "datasets": [{"path": str(folder / "tokens" / task)} for task in ("read", "draw")],
        "output_dir": str(folder / name),
        "train_modules": LEARNING,
        "learning_rate": 1e-4,
        "max_steps": NUM_STEPS,
        "per_device_train_batch_size": BATCH,
        "max_length": None,
        "remove_unused_columns": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "gradient_checkpointing": False,
        "bf16": False,
        "save_strategy": "steps" if kill else "no",
        "save_steps": NUM_STEPS // 2,
        "save_total_limit": 1,
        "logging_steps": 1,
        "include_num_input_tokens_seen": True,
        "report_to": "none",
        "seed": 0,
        **changes,
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config))
    words = ["-m", "transformers_unicode2.training.sft", "--config", file, "--use_cpu", "true"]
    run = run_training(args, words, folder / name / f"checkpoint-{NUM_STEPS // 2}" if kill else None)
    digest = hashlib.sha256()
    for weights in sorted((folder / name).glob("*.safetensors")):
        digest.update(weights.read_bytes())
    return run | {"digest": digest.hexdigest()}


def run_training(args: argparse.Namespace, words: list, killed_behind: Path | None = None) -> dict:
    """Runs a training. With `killed_behind`, it is killed once that folder is there, and started again.

    Returns the last loss, the number of tokens that a step has on average, its median seconds, and peak GiB.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "PYTHONUNBUFFERED": "1"}
    moments, logs, peak = [], [], 0.0
    for place in [killed_behind, None] if killed_behind else [None]:
        process = start_child(words, stdout=subprocess.PIPE, text=True, env=environment)
        with ThreadPoolExecutor(1) as pool:
            watched = pool.submit(watch_peak, process)
            for line in process.stdout:
                if line.startswith("{'loss'"):
                    moments.append(time.perf_counter())
                    logs.append(ast.literal_eval(line))
                if place and place.exists():
                    process.send_signal(signal.SIGKILL)
        peak = max(peak, watched.result())
        if process.returncode and not place:
            raise SystemExit(f"`{' '.join(map(str, words))}` ended with status {process.returncode}.")
    tokens = float(logs[-1].get("num_input_tokens_seen", 0)) / NUM_STEPS
    step = float(np.median(np.diff(moments)))
    return {"loss": float(logs[-1]["loss"]), "tokens": tokens, "step": step, "peak": peak}


def train_bare(args: argparse.Namespace) -> None:
    """The language model alone in the stock `Trainer`: its embeddings learn from rows of text of one length."""
    import torch
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    model = AutoModelForCausalLM.from_pretrained(args.llm, dtype=torch.float32)
    model.requires_grad_(False).get_input_embeddings().requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (NUM_STEPS * BATCH, args.length), generator=generator)
    training_args = TrainingArguments(
        output_dir=args.output, max_steps=NUM_STEPS, per_device_train_batch_size=BATCH, learning_rate=1e-4,
        save_strategy="no", logging_steps=1, report_to="none", use_cpu=True,
    )  # fmt: skip
    Trainer(model, training_args, train_dataset=[{"input_ids": row, "labels": row} for row in ids]).train()


def sum_parts(folder: Path, optimizer: str) -> dict[str, float]:
    """GiB of float32 weights, of gradients and of the state of an optimizer, by the sizes of a checkpoint's weights."""
    from safetensors import safe_open

    weights = learning = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="np") as stored:
            for name in stored.keys():
                size = int(np.prod(stored.get_slice(name).get_shape()))
                # The quantizer keeps its dtypes, the rest is in float32
                kept = BYTES[stored.get_slice(name).get_dtype()] if "quantizer" in name else 4
                weights += size * kept / 4
                learning += size * any(f"{part}." in name for part in LEARNING)
    state = STATE[optimizer] * learning
    return {"weights": 4 * weights / GIB, "gradients": 4 * learning / GIB, "optimizer": state / GIB}


def train(args: argparse.Namespace) -> list[dict]:
    """20 steps of reading and drawing by three optimizers, once more with a kill, beside the bare language model."""
    sizes, rows = Sizes(args), []
    run_command(
        "tokenize", "--data", write_pairs(args), "--task", "both", "--model", sizes.folder / "model-flat", "--output",
        sizes.folder / "tokens", "--max-bad-share", 0.5,
    )  # fmt: skip
    for head in HEADS:
        changes, runs = {"model": str(sizes.folder / f"model-{head}")}, {}
        for name, own in OPTIMIZERS.items():
            run = runs[name] = run_stage(args, f"train-{head}-{name.split()[0].lower()}", {**changes, **own})
            parts = sum_parts(Path(changes["model"]), name)
            parts["activations and the rest"] = run["peak"] - sum(parts.values())
            found = f"loss {run['loss']:.3f}, {run['tokens'] / run['step']:.0f} tokens/s; GiB: "
            found += ", ".join(f"{part} {size:.2f}" for part, size in parts.items())
            row = {"what": f"train, {head}, {name}: a step of {BATCH}", "s": run["step"], "peak GiB": run["peak"]}
            rows.append(row | {"found": found})
        again = run_stage(args, f"train-{head}-killed", changes, kill=True)
        assert again["digest"] == runs["AdamW"]["digest"], head
        row = {"what": f"train, {head}, AdamW, killed and resumed", "peak GiB": again["peak"]}
        rows.append(row | {"found": "weights equal to those of the run without a kill"})
    length = round(run["tokens"] / BATCH)
    bare = run_training(args, [__file__, "--llm", args.llm, "--output", sizes.folder / "bare", "--length", length])
    found = f"{length * BATCH / bare['step']:.0f} tokens/s"
    row = {"what": f"bare language model, AdamW: a step of {BATCH}, {length} tokens each", "s": bare["step"]}
    return [*rows, row | {"peak GiB": bare["peak"], "found": found}]


def update_rows(args: argparse.Namespace) -> list[dict]:
    """C2 and the two-level head alone: AdamW of all rows, and SparseAdam of those that a step has a gradient for.

    Four batches of random targets, as many as `train` has in a step, take turns.
    """
    import torch

    from transformers_unicode2.visual_head_unicode2 import (
        UniCode2TwoLevelVisualHead,
        UniCode2VisualEmbeddings,
        find_cells,
    )

    sizes, rows = Sizes(args), []
    codebook = SimpleNamespace(codebook_dim=NARROW, codebook_size=sizes.codes, num_cells=sizes.cells)
    config = SimpleNamespace(codebook_config=codebook, text_config=SimpleNamespace(hidden_size=576))
    for kind, options in ((torch.optim.AdamW, {"weight_decay": 0.0}), (torch.optim.SparseAdam, {})):
        torch.manual_seed(0)
        c2, head = UniCode2VisualEmbeddings(sizes.codes, NARROW), UniCode2TwoLevelVisualHead(config)
        torch.nn.init.normal_(c2.weight, std=0.02)
        optimizer, times, shares = kind([c2.weight], lr=1e-3, **options), [], []
        batches = [(torch.randn(NUM_TARGETS, 576), torch.randint(sizes.codes, (NUM_TARGETS,))) for _ in range(4)]
        for step in range(NUM_STEPS):
            hidden, codes = batches[step % 4]
            start = time.perf_counter()
            loss = head(hidden, c2.__call__, task="compute_nll", codes=codes) / NUM_TARGETS
            loss.backward()
            begun = time.perf_counter()
            touched = torch.isin(
                find_cells(head.cell_offsets, torch.arange(sizes.codes)), find_cells(head.cell_offsets, codes)
            ).nonzero()[:, 0]
            if kind is torch.optim.SparseAdam:
                gradient = c2.weight.grad[touched]
                made = {"is_coalesced": True, "check_invariants": False}
                c2.weight.grad = torch.sparse_coo_tensor(touched[None], gradient, c2.weight.shape, **made)
            optimizer.step()
            optimizer.zero_grad()
            times.append((time.perf_counter() - begun, begun - start))
            shares.append(len(touched) / sizes.codes)
        update, others = np.median(times, 0).tolist()
        found = f"loss {loss.item():.3f}; {np.mean(shares):.1%} of the rows of C2 have a gradient; "
        found += f"loss and gradient take {others:.2f} s"
        rows.append(
            {
                "what": f"two-level head, {NUM_TARGETS} targets: {kind.__name__} of C2, width {NARROW}",
                "s": update,
                "found": found,
            }
        )
        del c2, head, optimizer, loss
        gc.collect()
    return rows


MODEL_STEPS = {
    "compose": compose,
    "quantizer": load_quantizer,
    "generate": generate,
    "train": train,
    "update": update_rows,
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name, kind in (("--llm", str), ("--output", str), ("--length", int)):
        parser.add_argument(name, type=kind)
    train_bare(parser.parse_args())
