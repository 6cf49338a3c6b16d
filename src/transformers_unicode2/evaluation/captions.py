"""Whether a model reads its images, on captioned images that were tokenized and held out from training.

    unicode2 evaluate captions --model outputs/sft --data outputs/tokens-held --num-rows 200 --json card.json
    unicode2 evaluate captions --model outputs/sft --data outputs/tokens-held --draw

A row counts when it asks about one image and is answered with one text. Of rows with equal captions or equal codes one
is taken. Losses are in nats a token, the mean over rows of the mean over the caption's tokens:

- loss with its own image, and with the image of another row;
- image gap: the second less the first, with its standard error over the rows. Near 0, the images are not read;
- right of N: rows whose own caption is likelier than those of N - 1 other rows, in all and a token;
- named exactly: rows whose greedy answer is the caption, token for token.

With --draw the model also draws each caption. A drawing is right when its codes, without their places, are nearest to
those of its own image among all rows. Near is the cosine of code counts (`counts`), or that of the mean vectors in C1,
standardised over the rows (`vectors`).
"""

import argparse
import glob
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..cli import SEED, at_least
from ..planning_unicode2 import CACHE_NAME
from ..tokens import check_codes, find_tables
from .card_files import check_card_file
from .drawing import batches
from .score_card import ScoreCard, describe_generation, describe_run, describe_subject, hash_data

# Rows whose greedy answers are printed
NUM_EXAMPLES = 5
# Positions whose scores over the text vocabulary are in memory at a time
NUM_SCORED = 512


@dataclass(frozen=True)
class Pair:
    """A captioned image: the ids of its question, those of its answer with what ends its turn, its text, its codes."""

    prompt: list[int]
    answer: list[int]
    caption: str
    codes: list[int]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="unicode2 evaluate captions", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add, natural = parser.add_argument, at_least(1)
    add("--model", required=True, help="checkpoint or adapter: folder or Hub name")
    add("--data", required=True, metavar="DIR", help="folder that `unicode2 tokenize` wrote")
    add("--split", default="train", help="reads DIR/SPLIT-*.parquet (default: %(default)s)")
    add("--num-rows", type=at_least(2), default=200, help="rows to measure, at most (default: %(default)s)")
    add("--num-choices", type=at_least(2), default=10, help="captions to choose from (default: %(default)s)")
    add("--batch-size", type=natural, default=8, help="rows at a time (default: %(default)s)")
    add("--seed", type=SEED, default=0, help="decides which rows, and what is drawn (default: %(default)s)")
    add("--draw", action="store_true", help="also draw each caption, and compare the codes")
    add("--draw-prompt", default="{caption}", metavar="TEXT", help="asks for a drawing (default: %(default)s)")
    add("--guidance", type=at_least(0.0), help="guidance of a drawing (default: the model's)")
    add("--temperature", type=at_least(0.0), help="of a drawing; 0 takes the likeliest codes (default: the model's)")
    add("--json", metavar="FILE", help="also write a score card to a file, and its page beside it")
    return parser


def main(args: argparse.Namespace) -> dict:
    from transformers_unicode2.adapters import find_base, is_adapter
    from transformers_unicode2.checkpoints import load_model

    check_arguments(args)
    start = time.perf_counter()
    files = find_tables(args.data, args.split, "--data")
    rows = open_rows(files)
    model, processor = load_model(args.model)
    checkpoint = find_base(args.model)[0] if is_adapter(args.model) else args.model
    check_codes(files, checkpoint, model.config.codebook_config.codebook_size, model.config.num_image_tokens)
    pairs = choose_pairs(rows, model.config, processor, args.num_rows, args.seed)
    if len(pairs) < args.num_choices:
        raise ValueError(
            f"{args.data} has {len(pairs)} rows with one image, its own caption and its own codes, of {len(rows)}; "
            f"{args.num_choices} choices need as many."
        )
    report = {"model": args.model, "data": args.data, "split": args.split, "seed": args.seed, "num_rows": len(pairs)}
    report |= measure_reading(model, pairs, args.num_choices, args.batch_size)
    report["examples"] = answer_examples(model, processor, pairs[:NUM_EXAMPLES])
    if args.draw:
        options = {"guidance_scale": args.guidance}
        if args.temperature is not None:
            options |= {"do_sample": args.temperature > 0, "temperature": args.temperature or None}
        prompts = [args.draw_prompt.replace("{caption}", pair.caption) for pair in pairs]
        drawn = draw(model, processor, prompts, args.seed, args.batch_size, options)
        report["drawn"] = compare_bags(drawn, [pair.codes for pair in pairs], model.get_quantizer().codebook.codes)
    print_report(report)
    if args.json:
        make_card(args, report, model, files, start).write(args.json)
    return report


def make_card(args: argparse.Namespace, report: dict, model, files: list[Path], start: float) -> ScoreCard:
    """The score card of a report. Its items are the rows, in the order that the seed gives them."""
    protocol = {"benchmark": "captioned images", "data": hash_data(*files)}
    # Of the rows that there are, whatever was asked for
    protocol |= {name: report[name] for name in ("split", "num_rows", "num_choices", "seed")}
    protocol["dtype"] = str(model.dtype)
    card = ScoreCard("evaluate captions", protocol, describe_subject(args.model))
    for name in ("own_loss", "other_loss", "image_gap"):
        card.add_mean(name, name_items(report["items"][name]), "nats a token")
    for name in ("chosen", "chosen_per_token", "named_exactly"):
        card.add_share(name, name_items(report[name]["items"]))
    if args.draw:
        given = {"do_sample": None, "temperature": args.temperature} if args.temperature is not None else {}
        # A batch shares its random numbers
        protocol["drawing"] = describe_generation(model, args.guidance, prompt=args.draw_prompt, **given)
        protocol["batch_size"] = args.batch_size
        for name, share in report["drawn"].items():
            card.add_share(f"drawn, by {name}", name_items(share["items"]))
    card.run = describe_run(str(model.device), start, batch_size=args.batch_size)
    return card


def name_items(values: list) -> dict:
    return {str(number): value for number, value in enumerate(values)}


def check_arguments(args: argparse.Namespace) -> None:
    """Raises `ValueError` before any work on what would fail after it."""
    if args.json:
        check_card_file(args.json, "evaluate captions")
    if args.num_rows < args.num_choices:
        raise ValueError(f"--num-rows is {args.num_rows}; {args.num_choices} choices need at least as many.")
    if "{caption}" not in args.draw_prompt:
        raise ValueError(f"--draw-prompt {args.draw_prompt!r} has no {{caption}} in it.")


def open_rows(files: list[Path]):
    """The `messages` and `codes` of tokenized parquet files, as a `datasets.Dataset`. Raises `ValueError` if a column
    is missing.
    """
    from datasets import load_dataset

    rows = load_dataset("parquet", data_files=[glob.escape(str(file)) for file in files], split="train")
    missing = [name for name in ("messages", "codes") if name not in rows.column_names]
    if missing:
        raise ValueError(f"{files[0]} has no column `{missing[0]}`; it has {', '.join(rows.column_names)}.")
    return rows.select_columns(["messages", "codes"])


def choose_pairs(rows, config, processor, num_rows: int, seed: int) -> list[Pair]:
    """At most `num_rows` captioned images in a seeded order, no two with equal captions or equal codes."""
    pairs, seen, offset = [], set(), config.visual_token_offset
    for index in np.random.default_rng(seed).permutation(len(rows)).tolist():
        if len(pairs) == num_rows:
            break
        row = rows[index]
        caption = find_caption(row["messages"])
        if caption is None:
            continue
        codes = row["codes"][0]
        if caption in seen or tuple(codes) in seen:
            continue
        seen |= {caption, tuple(codes)}
        ids, mask = processor.encode_chat(row["messages"], [[offset + code for code in codes]])
        start = mask.index(1)
        answer = [id_ for id_, flag in zip(ids[start:], mask[start:]) if flag]
        pairs.append(Pair(ids[:start], answer, caption, codes))
    return pairs


def find_caption(messages: list[dict]) -> str | None:
    """The answer of a chat that asks about one image and is answered with one text; `None` of any other chat."""
    parts = [(message["role"], part) for message in messages for part in message["content"]]
    asked = [role for role, part in parts if part["type"] == "image"]
    answers = [part["text"] for role, part in parts if role == "assistant" and part["type"] == "text"]
    is_pair = asked == ["user"] and len(answers) == 1 and messages[-1]["role"] == "assistant"
    return answers[0] if is_pair and answers[0].strip() else None


def measure_reading(model, pairs: list[Pair], num_choices: int, batch_size: int) -> dict:
    """Losses, gap, choices and exact names, see the head of this file.

    Row i chooses among its own caption and those of the `num_choices - 1` rows that follow, around the end. So the
    loss of caption i with another image is that with the image of row i - 1.

    Raises `ValueError` when a loss is not finite.
    """
    count = len(pairs)
    nll, exact = torch.zeros(count, num_choices, dtype=torch.float64), torch.zeros(count, dtype=torch.bool)
    for chosen in batch_by_length([len(pair.prompt) for pair in pairs], batch_size, "reading"):
        answers = [pairs[(i + c) % count].answer for i in chosen for c in range(num_choices)]
        losses, greedy = score_answers(model, [pairs[i].prompt for i in chosen], answers)
        nll[chosen] = losses.view(len(chosen), num_choices)
        exact[chosen] = greedy.view(len(chosen), num_choices)[:, 0]
    if not nll.isfinite().all():
        raise ValueError(
            f"{(~nll.isfinite()).sum().item()} of {nll.numel()} losses are not finite; the model is broken."
        )
    lengths = torch.tensor([len(pair.answer) for pair in pairs])
    places = (torch.arange(count)[:, None] + torch.arange(num_choices)) % count
    own, other = nll[:, 0] / lengths, nll[:, 1].roll(1) / lengths
    gap = other - own
    return {
        "items": {"own_loss": own.tolist(), "other_loss": other.tolist(), "image_gap": gap.tolist()},
        "own_loss": own.mean().item(),
        "other_loss": other.mean().item(),
        "image_gap": gap.mean().item(),
        "image_gap_standard_error": (gap.std() / count**0.5).item(),
        "num_choices": num_choices,
        "chosen": count_right(nll.argmin(1) == 0),
        "chosen_per_token": count_right((nll / lengths[places]).argmin(1) == 0),
        "named_exactly": count_right(exact),
    }


def count_right(right: torch.BoolTensor) -> dict:
    percent = 100 * right.float().mean().item()
    return {"right": int(right.sum()), "of": len(right), "percent": percent, "items": right.tolist()}


def batch_by_length(lengths: list[int], size: int, description: str):
    """Yields lists of at most `size` indices whose lengths are equal, so that nothing is padded."""
    from tqdm import tqdm

    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    with tqdm(total=len(order), unit="row", desc=description) as bar:
        while order:
            chosen = [i for i in order[:size] if lengths[i] == lengths[order[0]]]
            yield chosen
            bar.update(len(chosen))
            order = order[len(chosen) :]


@torch.no_grad()
def score_answers(model, prompts: list[list[int]], answers: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """
    How likely answers are. The prompts are read once; the answers of a prompt share its key-value cache.

    Args:
        model (`UniCode2ForConditionalGeneration`): whose text scores count, as in text mode.
        prompts: ids of the unified vocabulary, lists of one length.
        answers: text ids, equally many lists for each prompt in turn.

    Returns:
        The summed negative log-likelihood of each answer in nats, `(num_answers,)`, float64; and whether greedy search
        writes it, `(num_answers,)`, bool. Any of the ids that end a text stands for the last.
    """
    repeats = len(answers) // len(prompts)
    outputs = model.model(input_ids=torch.tensor(prompts, device=model.device), use_cache=True)
    outputs[CACHE_NAME].batch_repeat_interleave(repeats)
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(answer) for answer in answers], True, -100).to(model.device)
    # Padding stands behind the answers, where no id of theirs sees it.
    read = model.model(input_ids=ids.clamp(min=0), **{CACHE_NAME: outputs[CACHE_NAME]}).last_hidden_state
    first = outputs.last_hidden_state[:, -1:].repeat_interleave(repeats, 0)
    hidden = torch.cat([first, read[:, :-1]], dim=1)  # (num_answers, num_tokens, hidden_size)
    is_real = ids >= 0
    nll, greedy = torch.zeros(ids.shape, dtype=torch.float64), torch.ones(ids.shape, dtype=torch.bool)
    targets, losses, best = ids[is_real], [], []
    for part, wanted in zip(hidden[is_real].split(NUM_SCORED), targets.split(NUM_SCORED)):
        logits = model.compute_logits(part, output_modality="text").float()
        losses.append(torch.nn.functional.cross_entropy(logits, wanted, reduction="none"))
        best.append(logits.argmax(-1))
    ends = torch.tensor(model.generation_config.eos_token_id or [], device=model.device).flatten()
    best = torch.cat(best)
    agrees = (best == targets) | (torch.isin(best, ends) & torch.isin(targets, ends))
    nll[is_real.cpu()], greedy[is_real.cpu()] = torch.cat(losses).double().cpu(), agrees.cpu()
    return nll.sum(1), greedy.all(1)


@torch.no_grad()
def answer_examples(model, processor, pairs: list[Pair]) -> list[dict]:
    """Captions and the greedy answers to their images, which end after the longest caption's number of ids."""
    prompts = {"input_ids": [pair.prompt for pair in pairs]}
    inputs = processor.tokenizer.pad(prompts, padding_side="left", return_tensors="pt").to(model.device)
    length = max(len(pair.answer) for pair in pairs)
    written = model.generate(**inputs, do_sample=False, max_new_tokens=length)[:, inputs["input_ids"].shape[1] :]
    answers = processor.batch_decode(written, skip_special_tokens=True)
    return [{"caption": pair.caption, "answer": answer.strip()} for pair, answer in zip(pairs, answers)]


@torch.no_grad()
def draw(
    model, processor, prompts: list[str], seed: int, batch_size: int, options: dict | None = None
) -> torch.LongTensor:
    """Codes that the model writes for prompts, `(num_prompts, num_image_tokens)`. Each batch has a seed of its own.

    `options` are those of `generate`.
    """
    written = []
    with torch.random.fork_rng():
        for number, batch in enumerate(batches(prompts, batch_size, "drawing")):
            chats = [[{"role": "user", "content": [{"type": "text", "text": prompt}]}] for prompt in batch]
            texts = processor.apply_chat_template(chats, add_generation_prompt=True)
            inputs = processor(text=texts, padding=True, add_special_tokens=False, return_tensors="pt")
            inputs = inputs.to(model.device)
            torch.manual_seed(np.random.SeedSequence([seed, number]).generate_state(1).item())
            written.append(model.generate(**inputs, generation_mode="image", **(options or {})).cpu())
    return torch.cat(written) - model.config.visual_token_offset


def compare_bags(drawn: torch.LongTensor, images: list[list[int]], codes: torch.Tensor) -> dict:
    """
    How many drawings are nearest to their own image among all, by two likenesses of codes without their places.

    Args:
        drawn: codes of the drawings, `(num_images, num_image_tokens)`.
        images: codes of the images, in the same order.
        codes: C1, `(codebook_size, codebook_dim)`.

    Returns:
        `{"counts", "vectors"}`, each as `count_right` has it.
    """
    both = torch.stack([drawn, torch.tensor(images)])  # (2, num_images, num_image_tokens)
    used, places = both.unique(return_inverse=True)
    counts = torch.zeros(*both.shape[:2], len(used)).scatter_add_(2, places, torch.ones(both.shape))
    vectors = codes[both.to(codes.device)].float().mean(2).cpu()  # (2, num_images, codebook_dim)
    vectors = (vectors - vectors[1].mean(0)) / (vectors[1].std(0) + 1e-6)
    found = {}
    for name, (written, wanted) in {"counts": counts, "vectors": vectors}.items():
        likeness = torch.nn.functional.normalize(written, dim=-1) @ torch.nn.functional.normalize(wanted, dim=-1).T
        found[name] = count_right(likeness.argmax(1) == torch.arange(len(drawn)))
    return found


def print_report(report: dict) -> None:
    count, choices = report["num_rows"], report["num_choices"]
    print(f"\n{report['model']}: {count} rows of {report['data']}, seed {report['seed']}")
    print(f"{'loss with its own image':>30} | {report['own_loss']:.3f} nats a token")
    print(f"{'with the image of another row':>30} | {report['other_loss']:.3f}")
    print(f"{'image gap':>30} | {report['image_gap']:.3f}, standard error {report['image_gap_standard_error']:.3f}")
    if report["image_gap"] < max(0.1, 3 * report["image_gap_standard_error"]):
        print(f"{'':>30} | near 0: the images are not read")
    shares = [
        (f"right of {choices}", report["chosen"], 100 / choices),
        (f"right of {choices}, a token", report["chosen_per_token"], 100 / choices),
        ("named exactly", report["named_exactly"], None),
        *((f"drawn, by {name}", share, 100 / count) for name, share in report.get("drawn", {}).items()),
    ]
    for name, share, chance in shares:
        by_chance = "" if chance is None else f", chance {chance:.1f} %"
        print(f"{name:>30} | {share['percent']:.1f} % ({share['right']} of {share['of']}{by_chance})")
    for example in report["examples"]:
        print(f"{example['caption']:>30.30} | {example['answer']:.80}")


if __name__ == "__main__":
    main(make_parser().parse_args())
