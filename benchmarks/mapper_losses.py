"""Which loss lets a mapper speak to a frozen decoder? Mappers from scratch on the drawn scenes, by equal steps.

    python benchmarks/mapper_losses.py --output outputs/mapper_losses

Decoder, VAE and language model of `unicode2-tiny` stay frozen. Its text encoders, and a counterpart of FLUX.1 Redux,
are fitted to it first (`mapper_parts.py`). A mapper is measured by the exact checker: scenes that no part has seen are
painted from their codes, and each shows the same objects at the same places or not. `flow gap` is the decoder's loss
with another image's conditioning less the one with the own. `retrieval` is the share of the images whose own caption is
the nearest of all.

The second table asks how many pairs are needed, the third whether a decoder should learn too (Table 5 of the paper, in
small): beside redrawing, prompts are drawn from the codes that the language model writes, and by the decoder's own text
encoders.

Runs are kept in runs.json, so a killed benchmark resumes. `--jobs` runs go side by side, but for the first one of each
cache, which fills it.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import yaml
from mapper_parts import BATCH, PROMPTS, TINY, fit_parts
from rows import Rows, describe_run

LOSSES = {
    "contrastive (the paper)": {"contrastive_weight": 1.0, "flow_matching_weight": 0.0},
    "contrastive + regression": {"contrastive_weight": 0.1, "flow_matching_weight": 0.0, "regression_weight": 1.0},
    "contrastive + flow": {"contrastive_weight": 0.1, "flow_matching_weight": 1.0},
}
BARE = {"position_embedding": False, "output_norm": False}
ROWS_PER_SHARD = 1024
TRAINING = {
    "per_device_train_batch_size": BATCH,
    "per_device_eval_batch_size": BATCH,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 50,
    "weight_decay": 0.0,
    "adam_beta2": 0.98,
    "bf16": True,
    "use_cpu": True,
    "report_to": "none",
    "logging_steps": 50,
    "save_strategy": "steps",
    "save_steps": 500,
    "save_total_limit": 1,
}
# Of diffusion
STEPS = {"flux": 8, "sdxl": 20}
KINDS = {"flux": "UniCode2FluxPipeline", "sdxl": "UniCode2StableDiffusionXLPipeline"}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--output", default="outputs/mapper_losses", help="folder for everything (default: %(default)s)")
    add("--num-pairs", type=int, nargs="+", default=[1024, 4096, 16384], help="the last is that of the losses")
    add("--steps", type=int, default=1000, help="of each mapper (default: %(default)s)")
    add("--fit-steps", type=int, default=2000, help="of the decoders' parts (default: %(default)s)")
    add("--num-scenes", type=int, default=300, help="to redraw, and prompts to draw (default: %(default)s)")
    add("--seeds", type=int, nargs="+", default=[0, 1])
    add("--threads", type=int, default=os.cpu_count(), help="in all (default: %(default)s)")
    add("--jobs", type=int, default=2, help="runs side by side, which share the threads (default: %(default)s)")
    add("--tables", nargs="+", choices=("losses", "pairs", "decoders"), default=["losses", "pairs", "decoders"])
    add("--plot", metavar="FILE", help="also draw the first two tables")
    add("--one", help=argparse.SUPPRESS)
    return parser


def main() -> None:
    args = make_parser().parse_args()
    if args.one:
        torch.set_num_threads(1)
        name, run = json.loads(args.one)
        Path(args.output, "runs", name, "figures.json").write_text(json.dumps(measure(args, run, name)))
        return
    torch.set_num_threads(args.threads)
    Path(args.output).mkdir(parents=True, exist_ok=True)
    setting = {name: getattr(args, name) for name in ("num_pairs", "steps", "fit_steps", "num_scenes")}
    rows = Rows(f"{args.output}/runs.json", setting)
    rows.measure("data", lambda: make_data(args))
    rows.measure("flux", lambda: fit_parts("flux", data(args), Path(args.output, "flux"), args.fit_steps))
    if "decoders" in args.tables:
        rows.measure("sdxl", lambda: fit_parts("sdxl", data(args), Path(args.output, "sdxl"), args.fit_steps))
        for kind in KINDS:
            rows.measure(f"own texts {kind}", lambda kind=kind: draw_by_texts(args, kind))
    runs, first = list(list_runs(args).items()), {}
    for item in runs:
        first.setdefault(place_cache(args, item[1]), item)
    with ThreadPoolExecutor(args.jobs) as jobs:
        for part in ([*first.values()], [item for item in runs if item not in first.values()]):
            list(jobs.map(lambda item: rows.measure(item[0], lambda: start_run(args, *item)), part))
    print_tables(args, rows.rows)
    if args.plot:
        draw_plot(args, rows.rows)


def data(args: argparse.Namespace) -> Path:
    return Path(args.output, "data")


def call(*words) -> float:
    """Runs a command and returns its seconds."""
    start = time.perf_counter()
    subprocess.run(list(map(str, words)), check=True, stdout=sys.stderr)
    return time.perf_counter() - start


def make_data(args: argparse.Namespace) -> dict:
    """Scenes, the codes of their images, and tokens that the language model writes for prompts."""
    unicode2, tokens = Path(sys.executable).with_name("unicode2"), Path(args.output, "tokens")
    tasks = Path(args.output, "tasks.yaml")
    tasks.write_text('caption: {user: "{image}describe the image.", assistant: "{dense_caption}"}\n')
    for split, count in (("train", args.num_pairs[-1]), ("test", 512)):
        call(unicode2, "scenes", "--output", data(args), "--split", split, "--num-scenes", count)
        words = ["--data", data(args), "--task", tasks, "--model", TINY, "--split", split]
        call(unicode2, "tokenize", *words, "--output", tokens, "--rows-per-shard", ROWS_PER_SHARD)
    for count in args.num_pairs[:-1]:
        part = Path(args.output, f"tokens-{count}")
        part.mkdir(exist_ok=True)
        for file in sorted(tokens.glob("train-*.parquet"))[: count // ROWS_PER_SHARD]:
            (part / file.name).unlink(missing_ok=True)
            os.link(file, part / file.name)
    write_prompts(args)
    return {}


def write_prompts(args: argparse.Namespace) -> None:
    from transformers_unicode2 import UniCode2FluxPipeline
    from transformers_unicode2.evaluation.drawing import Painter

    pipe = UniCode2FluxPipeline.from_pretrained(TINY)
    written = Painter(pipe).write([prompt.text for prompt in make_prompts(args)], 1)
    torch.save(written, Path(args.output, "written.pt"))


def make_prompts(args: argparse.Namespace) -> list:
    from transformers_unicode2.scenes.scene import SEEN_PAIRS
    from transformers_unicode2.scenes.texts import CATEGORIES, sample_prompt

    rng = np.random.default_rng(1)
    return [sample_prompt(CATEGORIES[i % len(CATEGORIES)], rng, SEEN_PAIRS) for i in range(args.num_scenes)]


def list_runs(args: argparse.Namespace) -> dict[str, dict]:
    """The options of every run that the tables need, by its name."""
    runs, most = {}, args.num_pairs[-1]
    for seed in args.seeds:
        for loss in LOSSES if "losses" in args.tables else ():
            for fields in ({}, BARE):
                name = f"{loss}{', bare' if fields else ''}, {most} pairs, seed {seed}"
                runs[name] = {"decoder": "flux", "loss": loss, "mapper": fields, "pairs": most, "seed": seed}
        best = {"decoder": "flux", "loss": "contrastive + flow", "mapper": {}, "seed": seed}
        for count in args.num_pairs[:-1] if "pairs" in args.tables else ():
            runs[f"contrastive + flow, {count} pairs, seed {seed}"] = best | {"pairs": count}
        for kind in KINDS if "decoders" in args.tables else ():
            if kind != "flux":
                runs[f"{kind}, frozen, seed {seed}"] = best | {"decoder": kind, "pairs": most}
            more = {"train_decoder": True, "learning_rates": {"decoder": 1e-4}}
            runs[f"{kind}, fine-tuned, seed {seed}"] = best | {"decoder": kind, "pairs": most, "options": more}
    return runs


def place_cache(args: argparse.Namespace, run: dict) -> str:
    """What the frozen parts make of the data, which runs share."""
    return f"{args.output}/cache/{run['decoder']}-{run['pairs']}-{run['seed']}"


def start_run(args: argparse.Namespace, name: str, run: dict) -> dict:
    """Trains a mapper by the command of its stage, and measures it, in processes of their own."""
    folder = Path(args.output, "runs", name)
    folder.mkdir(parents=True, exist_ok=True)
    tokens = "tokens" if run["pairs"] == args.num_pairs[-1] else f"tokens-{run['pairs']}"
    own = {"model": str(TINY), "datasets": [{"path": f"{args.output}/{tokens}"}], "images": [str(data(args))]}
    own |= {"eval_datasets": [{"path": f"{args.output}/tokens", "split": "test"}], "eval_images": own["images"]}
    own |= {"decoder": f"{args.output}/{run['decoder']}", "output_dir": str(folder / "mapper"), "muon": True}
    own |= {"image_prompts": f"{own['decoder']}/image_prompts"} if "regression" in run["loss"] else {}
    own |= {"mapper": {**PROMPTS, "num_layers": 2, "num_attention_heads": 3, **run["mapper"]}}
    own |= {"cache_dir": place_cache(args, run)}
    own |= {**LOSSES[run["loss"]], **TRAINING, "max_steps": args.steps, "seed": run["seed"], **run.get("options", {})}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(own))
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, args.threads // args.jobs))}
    words = ["-m", "transformers_unicode2.training.mapper", "--config", str(folder / "recipe.yaml")]
    start = time.perf_counter()
    with open(folder / "log.txt", "w") as log:
        subprocess.run([sys.executable, *words], check=True, stdout=log, stderr=log, env=environment)
        seconds = time.perf_counter() - start
        words = [__file__, "--output", args.output, "--num-scenes", str(args.num_scenes)]
        words += ["--one", json.dumps([name, run])]
        subprocess.run([sys.executable, *words], check=True, stdout=log, stderr=log, env=environment)
    return {"seconds": seconds, **json.loads((folder / "figures.json").read_text())}


def measure(args: argparse.Namespace, run: dict, name: str) -> dict:
    """The figures of a trained mapper with its decoder."""
    import transformers_unicode2
    from transformers_unicode2.scenes.check import check_drawing, same_scene
    from transformers_unicode2.scenes.sample import sample_scene
    from transformers_unicode2.scenes.scene import SEEN_PAIRS, draw_scene

    folder = Path(args.output, "runs", name, "mapper")
    kind = getattr(transformers_unicode2, KINDS[run["decoder"]])
    pipe = kind.from_unicode2(str(TINY), f"{args.output}/{run['decoder']}", str(folder))
    if "options" in run:
        part = kind.decoder_part
        pipe.register_modules(**{part: type(getattr(pipe, part)).from_pretrained(folder / part)})
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng, "test", SEEN_PAIRS) for _ in range(args.num_scenes)]
    pixels = pipe.processor.image_processor([draw_scene(scene, 64) for scene in scenes], return_tensors="pt")
    redrawn = paint(pipe, pipe.vision_language_encoder.get_image_tokens(pixels["pixel_values"]))
    kept = [same_scene(scene, image) for scene, image in zip(scenes, redrawn)]
    drawn = paint(pipe, torch.load(Path(args.output, "written.pt")))
    right = [check_drawing(prompt, image) for prompt, image in zip(make_prompts(args), drawn)]
    card = (folder / "README.md").read_text()
    figures = {line.split("|")[1].strip(): float(line.split("|")[2].replace(",", "")) for line in card.splitlines()
               if line.startswith("| eval_")}  # fmt: skip
    return {"redrawn": 100 * np.mean(kept), "drawn": 100 * np.mean(right), **figures}


def paint(pipe, tokens: torch.Tensor, batch: int = 50) -> list:
    """Paintings in 8 steps with guidance 2 away from zeros, as `unicode2-tiny` does."""
    pipe.set_progress_bar_config(disable=True)
    kind = next(kind for kind, name in KINDS.items() if name == type(pipe).__name__)
    guidance = {"true_cfg_scale": 2.0} if kind == "flux" else {"guidance_scale": 2.0}
    generator, images = torch.Generator().manual_seed(0), []
    for start in range(0, len(tokens), batch):
        images += pipe(
            visual_token_ids=tokens[start : start + batch], height=64, width=64, generator=generator,
            num_inference_steps=STEPS[kind], **guidance,
        ).images  # fmt: skip
    return images


def draw_by_texts(args: argparse.Namespace, kind: str) -> dict:
    """Prompts drawn by the stock pipeline with the decoder's own text encoders."""
    import diffusers

    from transformers_unicode2.scenes.check import check_drawing

    pipe = diffusers.DiffusionPipeline.from_pretrained(f"{args.output}/{kind}")
    pipe.set_progress_bar_config(disable=True)
    prompts, generator, right = make_prompts(args), torch.Generator().manual_seed(0), []
    for start in range(0, len(prompts), 50):
        texts = [prompt.text for prompt in prompts[start : start + 50]]
        options = {
            "height": 64,
            "width": 64,
            "generator": generator,
            "num_inference_steps": 8 if kind == "flux" else 20,
        }
        if kind == "flux":
            embeds, pooled, _ = pipe.encode_prompt(texts, max_sequence_length=64)
            options |= {"negative_prompt_embeds": torch.zeros_like(embeds), "true_cfg_scale": 2.0}
            options |= {"negative_pooled_prompt_embeds": torch.zeros_like(pooled)}
            images = pipe(prompt_embeds=embeds, pooled_prompt_embeds=pooled, **options).images
        else:
            images = pipe(texts, guidance_scale=2.0, **options).images
        right += [check_drawing(prompt, image) for prompt, image in zip(prompts[start : start + 50], images)]
    return {"drawn": 100 * np.mean(right)}


def average(rows: dict, name: str, seeds: list[int], figure: str) -> str:
    """Mean over the seeds, and the values."""
    values = [rows[f"{name}, seed {seed}"].get(figure) for seed in seeds if f"{name}, seed {seed}" in rows]
    values = [value for value in values if value is not None]
    if not values:
        return ""
    shares = {"eval_retrieval_accuracy": 100}
    values = [value * shares.get(figure, 1) for value in values]
    digits = 3 if figure.startswith("eval_flow") else 0 if figure == "seconds" else 1
    return f"{np.mean(values):.{digits}f} ({', '.join(f'{value:.{digits}f}' for value in values)})"


def draw_plot(args: argparse.Namespace, rows: dict) -> None:
    """Scenes that are redrawn right, by loss, and by the number of pairs."""
    from matplotlib import pyplot

    def values(name: str) -> list[float]:
        found = [rows.get(f"{name}, seed {seed}") for seed in args.seeds]
        return [row["redrawn"] for row in found if row] or [0.0]

    most = args.num_pairs[-1]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), sharey=True, width_ratios=(3, 2))
    for place, (bare, label) in enumerate((("", "with position and scale"), (", bare", "without"))):
        heights = [np.mean(values(f"{loss}{bare}, {most} pairs")) for loss in LOSSES]
        bars = left.bar(np.arange(len(LOSSES)) + 0.4 * (place - 0.5), heights, 0.38, label=label)
        left.bar_label(bars, fmt="%.1f", padding=2)
    left.set_xticks(range(len(LOSSES)), list(LOSSES), fontsize=8)
    left.set_ylabel("scenes redrawn right, %")
    left.legend(frameon=False)
    right.plot(args.num_pairs, [np.mean(values(f"contrastive + flow, {n} pairs")) for n in args.num_pairs], "o-")
    right.set_xscale("log", base=2)
    right.set_xticks(args.num_pairs, [f"{n:,}" for n in args.num_pairs])
    right.set_xlabel("pairs, contrastive + flow")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(args.plot, dpi=150)


def print_tables(args: argparse.Namespace, rows: dict) -> None:
    most = args.num_pairs[-1]
    print(describe_run(max(1, args.threads // args.jobs), "diffusers"))
    for part in ("flux", "sdxl"):
        if part in rows:
            ends = f"{rows[part]['first tenth']:.3f} to {rows[part]['last tenth']:.3f}"
            print(f"\nparts of {part}: {rows[part]['seconds']:.0f} s, loss {ends}")
    names = ("redrawn", "eval_retrieval_accuracy", "eval_flow", "eval_flow_gap", "drawn", "seconds")
    heads = ("redrawn, %", "retrieval, %", "flow", "flow gap", "prompts drawn, %", "s")
    if "losses" in args.tables:
        print(f"\n| loss | position and scale | {' | '.join(heads)} |\n| --- | --- |{' ---: |' * len(heads)}")
        for loss in LOSSES:
            for bare in ("", ", bare"):
                cells = [average(rows, f"{loss}{bare}, {most} pairs", args.seeds, figure) for figure in names]
                print(f"| {loss} | {'without' if bare else 'with'} | {' | '.join(cells)} |")
    if "pairs" in args.tables:
        print(f"\n| pairs | {' | '.join(heads)} |\n| ---: |{' ---: |' * len(heads)}")
        for count in args.num_pairs:
            cells = [average(rows, f"contrastive + flow, {count} pairs", args.seeds, figure) for figure in names]
            print(f"| {count:,} | {' | '.join(cells)} |")
    if "decoders" in args.tables:
        print(f"\n| decoder | | {' | '.join(heads)} |\n| --- | --- |{' ---: |' * len(heads)}")
        for kind in KINDS:
            frozen = f"contrastive + flow, {most} pairs" if kind == "flux" else f"{kind}, frozen"
            for label, name in (("frozen", frozen), ("fine-tuned", f"{kind}, fine-tuned")):
                cells = [average(rows, name, args.seeds, figure) for figure in names]
                print(f"| {kind} | {label} | {' | '.join(cells)} |")
            drawn = rows.get(f"own texts {kind}", {}).get("drawn")
            print(f"| {kind} | own text encoders | | | | | {drawn if drawn is None else f'{drawn:.1f}'} | |")


if __name__ == "__main__":
    main()
