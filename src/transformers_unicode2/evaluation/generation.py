"""Draws the prompts of a benchmark into the folders that its official scorer reads.

    unicode2 evaluate generation --benchmark geneval --prompts evaluation_metadata.jsonl --model pipe --output drawn
    unicode2 evaluate generation --benchmark dpg --prompts dpg_bench/prompts --model pipe --output drawn
    accelerate launch -m transformers_unicode2.evaluation.generation --benchmark geneval ...
    torchrun --nproc_per_node 2 -m transformers_unicode2.evaluation.generation --benchmark geneval ...  # on CPUs

GenEval: OUTPUT/00000/metadata.jsonl and OUTPUT/00000/samples/00000.png. DPG-Bench: OUTPUT/ID.png, a grid of 2 x 2. The
codes of each picture are written, and the picture painted, one at a time, with a seed of its own, made of --seed, its
prompt and its number. So it does not depend on the number of processes, nor on what was drawn before. A run that was
killed resumes. On a CPU, another number of --threads rounds in another way, and so draws other pictures.

OUTPUT/generation.json is a card with every setting of the language model and of the decoder; the scorers read it.
--rewritten names prompts that a language model has rewritten, one a line. The card says so, and scores of rewritten
prompts are not comparable with others.
"""

import argparse
import json
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..checkpoints import check_checkpoint
from ..cli import SEED, at_least
from ..control_tokens import find_control_tokens
from ..files import explained, make_folders, remove, remove_unfinished, whole_file, write_file
from ..planning_unicode2 import first_given
from ..processes import agree, follow_launcher, join
from ..record import Record, hash_file
from .card_files import DRAWN
from .prompts import BenchmarkPrompt, check_control, list_dpg, read_dpg, read_geneval, replace_texts
from .score_card import ScoreCard, describe_generation, describe_run, describe_subject

# Single pictures of DPG-Bench, until their grid is there
PARTS = "parts"
# Of the decoder, what a call may set, by the options
DECODER = {"steps": "num_inference_steps", "guidance": "guidance_scale", "true_cfg_scale": "true_cfg_scale"}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="unicode2 evaluate generation", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add, natural = parser.add_argument, at_least(1)
    add("--benchmark", choices=BENCHMARKS, required=True, help="whose prompts and folders")
    add("--prompts", required=True, help="GenEval's evaluation_metadata.jsonl, or DPG-Bench's folder of prompts")
    add("--model", required=True, help="assembled pipeline: folder or Hub name")
    add("--output", required=True, help="folder for the pictures")
    add("--rewritten", metavar="FILE", help="texts to draw in the places of the prompts, one a line")
    add("--seed", type=SEED, default=0, help="default: %(default)s")
    add("--images-per-prompt", type=natural, default=4, help="default: %(default)s, as both benchmarks have it")
    add("--image-size", type=natural, help="pixels of a side (default: the pipeline's)")
    add("--steps", type=natural, help="diffusion steps (default: the pipeline's)")
    add("--guidance", type=at_least(0.0), help="guidance_scale of the decoder (default: the pipeline's)")
    add("--true-cfg-scale", type=at_least(1.0), help="classifier-free guidance of FLUX (default: the pipeline's)")
    add("--prior-guidance", type=at_least(0.0), help="guidance of the language model (default: its own)")
    add("--temperature", type=at_least(0.0), help="of the language model; 0 is greedy (default: its own)")
    add(
        "--num-candidates", type=natural, help="images written for each, of which one is kept (default: the pipeline's)"
    )
    add("--max-plan-tokens", type=at_least(0), help="longest plan of a picture; 0 is none (default: the model's)")
    add("--threads", type=natural, default=1, help="of each process on a CPU (default: %(default)s)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of all weights (default: bfloat16 on a GPU)")
    return parser


def main(args: argparse.Namespace) -> None:
    follow_launcher()
    state, threads = join(cpu=not torch.cuda.is_available()), torch.get_num_threads()
    if state.device.type == "cpu":
        torch.set_num_threads(args.threads)
    try:
        run(args, state)
    finally:
        torch.set_num_threads(threads)
        # Gloo's threads can abort the process if they live until the interpreter ends.
        state.destroy_process_group()


def run(args: argparse.Namespace, state) -> None:
    from tqdm import tqdm

    start, prompts = time.perf_counter(), agree(lambda: read_prompts(args))
    pipe, output = load_pipeline(args, state.device), Path(args.output)
    card = agree(lambda: describe(args, pipe, len(prompts)))
    record = Record(output, {"protocol": card.protocol, "subject": card.subject}, BENCHMARKS[args.benchmark].owns)
    with explained(output), ExitStack() as stack:
        if agree(lambda: stack.enter_context(record.making())):
            if state.is_main_process:
                print(f"{output} is finished; nothing to do")
            return
        benchmark = BENCHMARKS[args.benchmark](output, args)
        # One process looks, since the others may be drawing by the time that a slow one does
        todo = agree(lambda: list_missing(benchmark, prompts, args.images_per_prompt))
        mine = todo[state.process_index :: state.num_processes]
        for i, j in tqdm(mine, unit="picture", desc="drawing", disable=not state.is_main_process):
            benchmark.write(prompts[i], j, draw(pipe, prompts[i].text, (args.seed, i, j), args))
        state.wait_for_everyone()
        if state.is_main_process:
            missing = list_missing(benchmark, prompts, args.images_per_prompt)
            if missing:
                raise ValueError(f"{len(missing):,} pictures are missing in {output}; run the command again.")
            benchmark.finish(prompts)
            card.run = describe_run(str(state.device), start, processes=state.num_processes, drawn=len(todo))
            card.write(output / DRAWN)
    if state.is_main_process:
        print(f"{output}: {len(prompts) * args.images_per_prompt:,} pictures of {len(prompts):,} prompts")


def list_missing(benchmark, prompts: list[BenchmarkPrompt], count: int) -> list[tuple[int, int]]:
    """Numbers of the prompts and of their pictures that are not there."""
    every = ((i, j) for i in range(len(prompts)) for j in range(count))
    return [(i, j) for i, j in every if not benchmark.has(prompts[i], j)]


def read_prompts(args: argparse.Namespace) -> list[BenchmarkPrompt]:
    from transformers import AutoTokenizer

    check_checkpoint(args.model, "model_index.json")
    prompts = (read_geneval if args.benchmark == "geneval" else read_dpg)(args.prompts)
    if args.benchmark == "dpg" and args.images_per_prompt != 4:
        raise ValueError(f"--images-per-prompt is {args.images_per_prompt}; a grid of DPG-Bench has 4.")
    prompts = replace_texts(prompts, args.rewritten)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    check_control(prompts, find_control_tokens(tokenizer, len(tokenizer)), args.rewritten or args.prompts)
    return prompts


def load_pipeline(args: argparse.Namespace, device):
    """The pipeline of a repository, of whichever decoder it has."""
    from diffusers import DiffusionPipeline

    import transformers_unicode2.diffusion.registration  # noqa: F401

    dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    pipe = DiffusionPipeline.from_pretrained(args.model, dtype=getattr(torch, dtype)).to(device)
    pipe.set_progress_bar_config(disable=True)
    wrong = [option for option in DECODER if getattr(args, option) is not None and not has(pipe, DECODER[option])]
    if wrong:
        raise ValueError(f"--{wrong[0].replace('_', '-')} is not an option of {type(pipe).__name__}; leave it out.")
    return pipe


def has(pipe, name: str) -> bool:
    from inspect import signature

    return name in signature(type(pipe).__call__).parameters


def describe(args: argparse.Namespace, pipe, num_prompts: int) -> ScoreCard:
    """The card of the pictures, without figures: what they depend on."""
    sampling = {} if args.temperature is None else {"do_sample": args.temperature > 0, "temperature": args.temperature}
    plan = {"max_plan_tokens": args.max_plan_tokens}
    protocol = {"benchmark": args.benchmark, "task_type": "text-to-image", "prompts": hash_prompts(args)}
    protocol |= {"num_prompts": num_prompts, "seed": args.seed}
    protocol["rewritten"] = hash_file(args.rewritten) if args.rewritten else "none"
    protocol["images_per_prompt"] = args.images_per_prompt
    protocol["language model"] = describe_generation(
        pipe.vision_language_encoder, args.prior_guidance, **sampling, **plan
    )
    protocol["num_candidates"] = args.num_candidates or pipe.config.num_candidates
    protocol["decoder"] = describe_decoder(args, pipe)
    protocol["image_size"] = args.image_size or pipe.config.image_size
    protocol["dtype"] = str(pipe.condition_mapper.dtype)
    protocol |= {"threads": args.threads} if pipe.device.type == "cpu" else {}
    return ScoreCard("evaluate generation", protocol, describe_subject(args.model, deep=True))


def describe_decoder(args: argparse.Namespace, pipe) -> dict:
    """The settings of the decoder: of a call, else of the pipeline, else the default of its `__call__`."""
    from inspect import signature

    defaults, settings = signature(type(pipe).__call__).parameters, {}
    for option, name in DECODER.items():
        if has(pipe, name):
            settings[name] = first_given(getattr(args, option), pipe.config.get(name), defaults[name].default)
    # As it is saved; its private entries are versions of libraries
    scheduler = json.loads(pipe.scheduler.to_json_string())
    kept = {name: value for name, value in scheduler.items() if not name.startswith("_")}
    return settings | {"pipeline": type(pipe).__name__, "scheduler": {"class": type(pipe.scheduler).__name__, **kept}}


def hash_prompts(args: argparse.Namespace) -> str:
    from ..record import hash_files

    if args.benchmark == "geneval":
        return hash_file(args.prompts)
    return hash_files(list_dpg(args.prompts), args.prompts)


def draw(pipe, text: str, seed: tuple[int, int, int], args: argparse.Namespace) -> Image.Image:
    """One picture, by the seed of its place alone."""
    own = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1)
    generation = {"max_plan_tokens": args.max_plan_tokens}
    if args.temperature is not None:
        generation |= {"do_sample": args.temperature > 0, "temperature": args.temperature or None}
    given = {name: getattr(args, option) for option, name in DECODER.items()}
    given |= {"height": args.image_size, "width": args.image_size, "num_candidates": args.num_candidates}
    given["prior_guidance_scale"] = args.prior_guidance
    given = {name: value for name, value in given.items() if value is not None}
    generation = {name: value for name, value in generation.items() if value is not None or name == "temperature"}
    generator = torch.Generator().manual_seed(own)
    return pipe(text, generator=generator, prior_generation_kwargs=generation or None, **given).images[0]


class GenEval:
    """OUTPUT/{i:05d}/metadata.jsonl and OUTPUT/{i:05d}/samples/{j:05d}.png."""

    owns = ("[0-9]*/metadata.jsonl", "[0-9]*/samples", DRAWN, "generation.md")

    def __init__(self, output: Path, args: argparse.Namespace):
        self.output = output

    def has(self, prompt: BenchmarkPrompt, number: int) -> bool:
        return self.place(prompt, number).is_file()

    def place(self, prompt: BenchmarkPrompt, number: int) -> Path:
        return self.output / prompt.name / "samples" / f"{number:05d}.png"

    def write(self, prompt: BenchmarkPrompt, number: int, image: Image.Image) -> None:
        file = self.place(prompt, number)
        make_folders(file.parent)
        save_picture(file, image)

    def finish(self, prompts: list[BenchmarkPrompt]) -> None:
        for prompt in prompts:
            content = json.dumps(prompt.metadata) + "\n"
            # What a kill left of it; scorers have files of their own beside it
            remove_unfinished(self.output / prompt.name, ("metadata.jsonl",))
            write_file(self.output / prompt.name / "metadata.jsonl", content.encode())


class Dpg:
    """OUTPUT/{id}.png: four pictures, top left, top right, bottom left and bottom right."""

    owns = ("*.png", PARTS, DRAWN, "generation.md")

    def __init__(self, output: Path, args: argparse.Namespace):
        self.output, self.count = output, args.images_per_prompt

    def has(self, prompt: BenchmarkPrompt, number: int) -> bool:
        return (self.output / f"{prompt.name}.png").is_file() or self.place(prompt, number).is_file()

    def place(self, prompt: BenchmarkPrompt, number: int) -> Path:
        return self.output / PARTS / f"{prompt.name}-{number}.png"

    def write(self, prompt: BenchmarkPrompt, number: int, image: Image.Image) -> None:
        make_folders(self.output / PARTS)
        save_picture(self.place(prompt, number), image)

    def finish(self, prompts: list[BenchmarkPrompt]) -> None:
        for prompt in prompts:
            file = self.output / f"{prompt.name}.png"
            if not file.is_file():
                tiles = [Image.open(self.place(prompt, number)) for number in range(self.count)]
                width, height = tiles[0].size
                grid = Image.new("RGB", (2 * width, 2 * height))
                for number, tile in enumerate(tiles):
                    grid.paste(tile, (number % 2 * width, number // 2 * height))
                save_picture(file, grid)
        remove(self.output / PARTS)


BENCHMARKS = {"geneval": GenEval, "dpg": Dpg}


def save_picture(file: Path, image: Image.Image) -> None:
    with whole_file(file) as temporary:
        image.save(temporary, "PNG")


if __name__ == "__main__":
    from ..cli import main as run_command

    sys.argv[1:1] = ["evaluate", "generation"]
    run_command()
