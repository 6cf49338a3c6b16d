"""DPG-Bench by any model of Transformers that answers questions about images.

    unicode2 evaluate dpg --images drawn --questions dpg_bench.csv --vqa Qwen/Qwen2.5-VL-7B-Instruct --json card.json

Each picture of a grid is asked the questions of its prompt, to be answered by yes or no. A question whose parent was
answered by no counts as no, whatever the answer. An answer that is neither yes nor no counts as no, and such answers
are counted. The score of a picture is the share of yes; that of a prompt the mean over its pictures; `overall` the mean
over prompts. A category is the share of yes of all its questions, without that rule. Answers are kept in IMAGES/dpg_hf,
so a run that was killed resumes.

This is `dpg_hf`. The official scorer asks an mPLUG of another library, so the two are not comparable. It also has
faults that are not repeated here. It passes over the first question of its file. Pictures that it fails on are left out
of the mean. Categories are those of the last picture of a grid alone.
"""

import argparse
import csv
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..files import remove_unfinished, write_file
from ..images_unicode2 import load_image, one_line
from ..record import hash_file, hash_source
from .card_files import begin_card, check_card_file, check_drawn, read_kept
from .judges import load_judge
from .score_card import ScoreCard, describe_run, hash_content, hash_data

COLUMNS = ("item_id", "proposition_id", "dependency", "category_broad", "question_natural_language")
ASK = "{question} Answer with yes or no."
RESULTS = "dpg_hf"
# Of what is in it; answers by other rules are not read again
RULES = "dpg_hf 2"
UNREADABLE = "answers that are neither yes nor no"
# Of answers that are neither yes nor no, beyond which a judge says nothing about the pictures
MAX_UNREADABLE = 0.5


@dataclass(frozen=True)
class Question:
    """A question about the pictures of a prompt. `parents` are the numbers of those that it makes sense after."""

    number: int
    text: str
    category: str
    parents: tuple[int, ...]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="unicode2 evaluate dpg", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--images", required=True, help="folder that `unicode2 evaluate generation --benchmark dpg` wrote")
    add("--questions", required=True, help="dpg_bench.csv of DPG-Bench")
    add("--vqa", required=True, help="model of `image-text-to-text`: folder or Hub name")
    add("--pictures", choices=("1", "4"), default="4", help="pictures in a file: a grid of 4, or 1 (default: 4)")
    add("--ask", default=ASK, metavar="TEXT", help="what is asked (default: %(default)s)")
    add("--json", required=True, metavar="FILE", help="score card to write, and its page beside it")
    return parser


def main(args: argparse.Namespace) -> ScoreCard:
    from tqdm import tqdm

    if "{question}" not in args.ask:
        raise ValueError(f"--ask {args.ask!r} has no {{question}} in it.")
    check_card_file(args.json, "evaluate dpg")
    start, questions = time.perf_counter(), read_questions(args.questions)
    files = find_grids(Path(args.images), questions, args.pictures)
    judge = {"vqa": hash_source(args.vqa), "ask": args.ask, "rules": RULES, "pictures": args.pictures}
    judge["questions"] = hash_file(args.questions)
    folder, answer, results = Path(args.images) / RESULTS, None, {}
    folder.mkdir(exist_ok=True)
    remove_unfinished(folder)
    for name, asked in tqdm(questions.items(), unit="prompt", desc="dpg_hf"):
        known = read_result(folder / f"{name}.json", judge, files[name], asked, int(args.pictures))
        if known is None:
            answer = answer or Judge(args.vqa)
            known = [ask_all(tile, asked, answer, args.ask) for tile in split(files[name], int(args.pictures))]
            content = {**judge, "picture": hash_data(files[name]), "answers": known}
            write_file(folder / f"{name}.json", json.dumps(content).encode())
        results[name] = known
    card = make_card(args, questions, results, judge)
    card.run = describe_run("cuda" if answer and answer.device.type == "cuda" else "cpu", start, vqa=args.vqa)
    card.write(args.json)
    print(card.make_page())
    return card


def read_questions(file: str | Path) -> dict[str, list[Question]]:
    """The questions of each prompt by its name. Raises `ValueError` with line and column when the file is another."""
    try:
        with open(file, newline="", encoding="utf-8-sig") as content:
            # Strictly, or a quote that is never closed takes in the rest of the file
            reader = csv.DictReader(content, strict=True)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise ValueError(f"{file} has no column {missing[0]}; give dpg_bench.csv of DPG-Bench.")
            questions = {}
            for row in reader:
                where = f"{file} line {reader.line_num}"
                add_question(questions.setdefault(row["item_id"], []), read_question(row, where), where)
    except csv.Error as error:
        # That of `DictReader` is still the one before
        line = reader.reader.line_num
        raise ValueError(f"{file} line {line} cannot be read ({error}); give dpg_bench.csv whole.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read ({error}).") from error
    if not questions:
        raise ValueError(f"{file} has no questions.")
    for name, asked in questions.items():
        numbers = {question.number for question in asked}
        lost = [parent for question in asked for parent in question.parents if parent not in numbers]
        if lost:
            raise ValueError(f"{file}: a question of {name} depends on question {lost[0]}, which it does not have.")
    return questions


def add_question(asked: list[Question], question: Question, where: str) -> None:
    """Raises `ValueError` when the prompt has a question of this number already."""
    if question.number in [one.number for one in asked]:
        raise ValueError(f"{where}: this prompt has a question {question.number} already; give each its own number.")
    asked.append(question)


def read_question(row: dict, where: str) -> Question:
    if None in row or None in row.values():
        raise ValueError(f"{where} has another number of fields than the first line; give dpg_bench.csv whole.")
    try:
        number = int(row["proposition_id"])
        parents = tuple(int(part) for part in str(row["dependency"]).split(",") if part.strip() and int(part))
    except ValueError as error:
        raise ValueError(f"{where}: proposition_id and dependency must be numbers ({error}).") from error
    if not row["question_natural_language"]:
        raise ValueError(f"{where}: question_natural_language is empty.")
    return Question(number, row["question_natural_language"], row["category_broad"].strip() or "other", parents)


def find_grids(images: Path, questions: dict, pictures: str) -> dict[str, Path]:
    """The grid of each prompt. Raises `ValueError` when some are missing, with the numbers."""
    files = {name: images / f"{name}.png" for name in questions}
    lost = [name for name, file in files.items() if not file.is_file()]
    if lost:
        how = "run `unicode2 evaluate generation --benchmark dpg` until it is finished"
        how = how if pictures == "4" else "bring one picture of each prompt, under its name"
        raise ValueError(
            f"{len(lost)} of {len(files)} pictures are missing in {images}, the first is {lost[0]}.png; {how}."
        )
    check_drawn(images)
    return files


def split(file: Path, count: int) -> list[Image.Image]:
    """The pictures of a file: itself, or the four of a grid, top left, top right, bottom left and bottom right."""
    grid = load_image(file)
    if count == 1:
        return [grid]
    width, height = grid.width // 2, grid.height // 2
    return [grid.crop((x, y, x + width, y + height)) for y in (0, height) for x in (0, width)]


def ask_all(image: Image.Image, questions: list[Question], answer: Callable, ask: str) -> dict[str, str]:
    """The answers to all questions about a picture, by their numbers."""
    return {str(one.number): answer(image, ask.replace("{question}", one.text)) for one in questions}


def read_answer(text: str) -> bool | None:
    """Whether an answer is yes, `None` if it is neither yes nor no."""
    word = re.match(r"\W*(yes|no)\b", text.lower())
    return word[1] == "yes" if word else None


def apply_dependencies(yes: dict[str, bool], questions: list[Question]) -> dict[str, bool]:
    """The same answers, with no where a question that another one depends on was answered by no."""
    known = {}

    def holds(number: int, above: tuple = ()) -> bool:
        question = next(one for one in questions if one.number == number)
        if number not in known:
            parents = [holds(parent, (*above, number)) for parent in question.parents if parent not in above]
            known[number] = yes[str(number)] and all(parents)
        return known[number]

    return {str(question.number): holds(question.number) for question in questions}


class Judge:
    """What a chat model answers to a question about an image.

    Args:
        name: folder or Hub name of a model of `image-text-to-text`.
    """

    def __init__(self, name: str):
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = load_judge(AutoModelForImageTextToText, name, "--vqa", dtype="auto")
        processor = AutoProcessor.from_pretrained(name)
        self.pipe = pipeline("image-text-to-text", model=model, processor=processor, device=self.device)

    def __call__(self, image: Image.Image, question: str) -> str:
        content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        chat = [{"role": "user", "content": content}]
        written = self.pipe(text=chat, max_new_tokens=8, do_sample=False, return_full_text=False)
        return written[0]["generated_text"].strip()


def read_result(
    file: Path, judge: dict, picture: Path, questions: list[Question], count: int
) -> list[dict[str, str]] | None:
    """What this judge said of the same `count` pictures of a file before, if it answered all questions."""
    answers = (read_kept(file, {**judge, "picture": hash_data(picture)}) or {}).get("answers")
    numbers = {str(one.number) for one in questions}
    fits = isinstance(answers, list) and all(isinstance(one, dict) and one.keys() == numbers for one in answers)
    return answers if fits and len(answers) == count else None


def make_card(args: argparse.Namespace, questions: dict, results: dict, judge: dict) -> ScoreCard:
    """The mean over prompts, the share of yes of each category, and that of answers that are neither yes nor no.

    Raises `ValueError` when these are too many.
    """
    seen = hash_content({name: hash_data(Path(args.images, f"{name}.png")) for name in results})
    card = begin_card("evaluate dpg", "dpg_hf", judge, args.images, seen)
    pictures, categories, unreadable = {}, {}, {}
    for name, answers in results.items():
        for number, texts in enumerate(answers):
            read = {question: read_answer(text) for question, text in texts.items()}
            unreadable |= {f"{name}/{number}/{question}": flag is None for question, flag in read.items()}
            one = {question: bool(flag) for question, flag in read.items()}
            counted = apply_dependencies(one, questions[name])
            pictures[f"{name}/{number}"] = 100 * float(np.mean([*counted.values()]))
            for question in questions[name]:
                part = categories.setdefault(question.category, {})
                part[f"{name}/{number}/{question.number}"] = 100.0 * one[str(question.number)]
    card.add_mean("overall", pictures, "%")
    for category, flags in sorted(categories.items()):
        card.add_mean(category, flags, "%")
    card.add_mean(UNREADABLE, {item: 100.0 * flag for item, flag in unreadable.items()}, "%")
    count = sum(unreadable.values())
    if count > MAX_UNREADABLE * len(unreadable):
        name, number, question = next(item for item, flag in unreadable.items() if flag).rsplit("/", 2)
        said = one_line(results[name][int(number)][question])
        raise ValueError(
            f"{count} of {len(unreadable)} answers of --vqa {args.vqa} are neither yes nor no, such as {said!r:.60}; "
            "give another model, or ask in another way by --ask."
        )
    return card
