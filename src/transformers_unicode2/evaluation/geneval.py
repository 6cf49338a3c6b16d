"""GenEval without mmdet: its published rules over the detections of a Mask2Former of Transformers.

    unicode2 evaluate geneval --images drawn --detector facebook/mask2former-swin-small-coco-instance \\
      --clip openai/clip-vit-large-patch14 --json card.json

The rules are those of GenEval (Ghosh et al., 2023). Detections count above a score of 0.3, or 0.9 where objects are
counted, and at most 16 of a class. A picture is right if every object that the prompt asks for is there in the right
number, with the right color (by a CLIP on its crop) and position (by the centers of boxes, with a tenth of their sizes
for tolerance), and no excluded object is. The figure of a tag is its share of right pictures; `overall` is the mean
over tags. Verdicts are kept in each prompt's folder, as geneval_hf.json, so a run that was killed resumes.

This is `geneval_hf`. The official scorer has another detector, of mmdet, and another CLIP library. How far the two
differ is not known until somebody measures it on the same pictures; call it by this name.
"""

import argparse
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..files import remove_unfinished, write_file
from ..images_unicode2 import load_image
from ..record import hash_source
from .card_files import begin_card, check_card_file, check_drawn, read_kept
from .prompts import RELATIONS, TAGS, check_metadata
from .score_card import ScoreCard, describe_run, hash_content, hash_data

THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9
MAX_OBJECTS = 16
# Of the summed sizes of two boxes, within which they are at one place
TOLERANCE = 0.1
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
# Of COCO's classes the names by which GenEval's prompts have them, all as `name_class` writes them
RENAMED = {
    "mouse": "computermouse", "remote": "tvremote", "remotecontrol": "tvremote", "keyboard": "computerkeyboard",
    "sofa": "couch", "motorbike": "motorcycle", "aeroplane": "airplane", "tvmonitor": "tv", "television": "tv",
    "doughnut": "donut", "hairdryer": "hairdrier", "mobilephone": "cellphone", "ski": "skis",
}  # fmt: skip
RESULT = "geneval_hf.json"
# Of what is in it; verdicts of other rules are not read again
RULES = "geneval_hf 1"


@dataclass(frozen=True)
class Detection:
    """An object in a picture. `box` is x from, y from, x to, y to in pixels; `mask` is bool `(height, width)`."""

    label: str
    score: float
    box: tuple[float, float, float, float]
    mask: np.ndarray | None = None


def score_picture(
    metadata: dict, detections: list[Detection], name_color: Callable[[Detection, str], str]
) -> tuple[bool, list[str]]:
    """
    Whether a picture shows what its prompt asks for, by the rules of GenEval.

    Args:
        metadata: of the prompt, see `prompts.check_metadata`.
        detections: of the picture, of any score.
        name_color: the color of an object of a class, one of `COLORS`.

    Returns:
        Whether it does, and the reasons why not.
    """
    found = group_detections(metadata, detections)
    reasons, matched = [], []
    for wanted in metadata["include"]:
        label, count = wanted["class"], wanted["count"]
        # The best of them, as many as are asked for
        objects, here = found.get(name_class(label), [])[:count], []
        if len(objects) < count:
            here.append(f"expected {label} >= {count}, found {len(objects)}")
        elif "color" in wanted:
            colors = [name_color(one, label) for one in objects]
            if colors.count(wanted["color"]) < count:
                here.append(f"expected {wanted['color']} {label} >= {count}, found {', '.join(colors)}")
        if "position" in wanted and not here:
            here += check_position(wanted, objects, matched)
        reasons += here
        matched.append(None if here else objects)
    for unwanted in metadata.get("exclude", []):
        number = len(found.get(name_class(unwanted["class"]), []))
        if number >= unwanted["count"]:
            reasons.append(f"expected {unwanted['class']} < {unwanted['count']}, found {number}")
    return not reasons, reasons


def group_detections(metadata: dict, detections: list[Detection]) -> dict[str, list[Detection]]:
    """The detections that count, by their class, see `name_class`, the best first."""
    limit = COUNTING_THRESHOLD if metadata["tag"] == "counting" else THRESHOLD
    found = {}
    for one in sorted(detections, key=lambda one: -one.score):
        here = found.setdefault(name_class(one.label), [])
        if one.score > limit and len(here) < MAX_OBJECTS:
            here.append(one)
    return found


def name_class(label: str) -> str:
    """One name for all spellings of a class: small letters without spaces, hyphens and underscores, see `RENAMED`."""
    name = re.sub(r"[\s_-]+", "", label.lower())
    return RENAMED.get(name, name)


def check_position(wanted: dict, objects: list[Detection], matched: list[list[Detection] | None]) -> list[str]:
    """A reason why objects are not where a prompt has them, if there is one."""
    relation, number = wanted["position"]
    if matched[number] is None:
        return [f"no target for {wanted['class']} to be {relation}"]
    for one in objects:
        for target in matched[number]:
            relations = relate(one.box, target.box)
            if relation not in relations:
                held = " and ".join(sorted(relations)) or "none of these"
                return [f"expected {wanted['class']} {relation} target, found {held}"]
    return []


def relate(box: tuple, other: tuple) -> set[str]:
    """Which of `RELATIONS` a box has to another one: none, one, or two at a corner."""
    (x, y, to_x, to_y), (x2, y2, to_x2, to_y2) = box, other
    offset = np.array([(x + to_x) / 2 - (x2 + to_x2) / 2, (y + to_y) / 2 - (y2 + to_y2) / 2])
    sizes = np.array([abs(to_x - x) + abs(to_x2 - x2), abs(to_y - y) + abs(to_y2 - y2)])
    beyond = np.maximum(np.abs(offset) - TOLERANCE * sizes, 0) * np.sign(offset)
    if (np.abs(beyond) < 1e-3).all():
        return set()
    across, down = beyond / np.linalg.norm(offset)
    holds = (across < -0.5, across > 0.5, down < -0.5, down > 0.5)
    return {relation for relation, flag in zip(RELATIONS, holds) if flag}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="unicode2 evaluate geneval", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--images", required=True, help="folder that `unicode2 evaluate generation --benchmark geneval` wrote")
    add("--detector", required=True, help="Mask2Former of COCO's instances: folder or Hub name")
    add("--clip", required=True, help="CLIP with both towers: folder or Hub name")
    add("--json", required=True, metavar="FILE", help="score card to write, and its page beside it")
    return parser


def main(args: argparse.Namespace) -> ScoreCard:
    import torch
    from tqdm import tqdm

    from .detectors import ColorNamer, Mask2FormerDetector, find_labels
    from .judges import check_clip

    start, folders = time.perf_counter(), find_folders(Path(args.images))
    check_card_file(args.json, "evaluate geneval")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scorer = {"detector": hash_source(args.detector), "clip": hash_source(args.clip), "rules": RULES}
    check_wanted(folders, find_labels(args.detector))
    check_clip(args.clip)
    judge, results, seen = None, {}, {}
    for folder in tqdm(folders, unit="prompt", desc="geneval_hf"):
        pictures = list_pictures(folder)
        asked = {**scorer, "metadata": read_metadata(folder), "pictures": hash_data(*pictures)}
        known = read_result(folder, asked)
        if known is None:
            remove_unfinished(folder, (RESULT,))
            judge = judge or (Mask2FormerDetector(args.detector, device), ColorNamer(args.clip, device))
            known = score_prompt(folder, pictures, *judge)
            write_file(folder / RESULT, (json.dumps({**asked, **known})).encode())
        results[folder.name], seen[folder.name] = known, asked["pictures"]
    card = make_card(args, results, scorer, [read_metadata(folder) for folder in folders], hash_content(seen))
    card.run = describe_run(device, start, detector=args.detector, clip=args.clip)
    card.write(args.json)
    print(card.make_page())
    return card


def find_folders(images: Path) -> list[Path]:
    """The folders of the prompts. Raises `ValueError` where metadata or pictures are missing, with the numbers."""
    folders = [path for path in images.iterdir() if path.name.isdecimal() and path.is_dir()] if images.is_dir() else []
    folders.sort(key=lambda path: int(path.name))
    if not folders:
        raise ValueError(f"{images} has no folders 00000, 00001 and so on, as GenEval's pictures have them.")
    again = "run `unicode2 evaluate generation` again until it is finished."
    if int(folders[-1].name) != len(folders) - 1:
        raise ValueError(f"{images} has {len(folders)} folders of prompts, and the last is {folders[-1].name}; {again}")
    pictures = {folder: list_pictures(folder) for folder in folders}
    most = max(map(len, pictures.values()))
    short = [folder.name for folder, files in pictures.items() if [int(one.stem) for one in files] != [*range(most)]]
    if short or not most:
        raise ValueError(
            f"{len(short) or len(folders)} of {len(folders)} prompts in {images} lack pictures, the first is "
            f"{(short or [folders[0].name])[0]}; {again}"
        )
    lost = [folder.name for folder in folders if not (folder / "metadata.jsonl").is_file()]
    if lost:
        raise ValueError(
            f"{len(lost)} of {len(folders)} prompts in {images} have no metadata.jsonl, the first is {lost[0]}; {again}"
        )
    for folder in folders:
        read_metadata(folder)
    check_drawn(images, {folder.name: len(files) for folder, files in pictures.items()})
    return folders


def list_pictures(folder: Path) -> list[Path]:
    """The pictures of a prompt, by their numbers; other files beside them, such as a grid of all, are none."""
    files = [file for file in (folder / "samples").glob("*.png") if file.stem.isdecimal()]
    return sorted(files, key=lambda file: int(file.stem))


def read_metadata(folder: Path) -> dict:
    try:
        content = json.loads((folder / "metadata.jsonl").read_text())
        check_metadata(content)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{folder}/metadata.jsonl is none of GenEval's: {error}.") from error
    return content


def check_wanted(folders: list[Path], labels: set[str]) -> None:
    """Raises `ValueError` on a class that the detector does not know, or a color that is not told apart: every picture
    would be wrong.
    """
    names = {*map(name_class, labels)}
    for folder in folders:
        metadata = read_metadata(folder)
        for wanted in (*metadata["include"], *metadata.get("exclude", [])):
            if name_class(wanted["class"]) not in names:
                known = ", ".join(sorted(labels)[:5])
                raise ValueError(
                    f"{folder}/metadata.jsonl has the class {wanted['class']!r}, which the detector does not know; its "
                    f"{len(labels)} classes begin with {known}. Give a Mask2Former of COCO's instances."
                )
            if wanted.get("color", COLORS[0]) not in COLORS:
                raise ValueError(
                    f"{folder}/metadata.jsonl has the color {wanted['color']!r}; it must be one of {', '.join(COLORS)}."
                )


def read_result(folder: Path, asked: dict) -> dict | None:
    """What this scorer said before of the same pictures and the same metadata, if it did."""
    content = read_kept(folder / RESULT, asked)
    kept = {name: content.get(name) for name in ("tag", "right", "reasons")} if content else {}
    return kept if isinstance(kept.get("right"), list) and kept["right"] and None not in kept.values() else None


def score_prompt(folder: Path, pictures: list[Path], detect: Callable, namer) -> dict:
    """What the rules say of each picture of a prompt."""
    metadata, right, reasons = read_metadata(folder), [], []
    for file in pictures:
        image = load_image(file)
        flag, why = score_picture(metadata, detect(image), lambda one, label, image=image: namer(image, one, label))
        right.append(flag)
        reasons.append(why)
    return {"tag": metadata["tag"], "right": right, "reasons": reasons}


def make_card(
    args: argparse.Namespace, results: dict[str, dict], scorer: dict, metadata: list[dict], seen: str
) -> ScoreCard:
    """Shares of pictures for each tag, and their mean over the tags. `seen` is a SHA-256 of all pictures."""
    card = begin_card("evaluate geneval", "geneval_hf", scorer, args.images, seen)
    pictures = {name: len(result["right"]) for name, result in results.items()}
    card.protocol |= {"prompts": hash_content(metadata), "num_pictures": sum(pictures.values())}
    tags, groups = {}, {name: result["tag"] for name, result in results.items()}
    for name, result in results.items():
        for number, flag in enumerate(result["right"]):
            tags.setdefault(result["tag"], {})[f"{name}/{number}"] = 100.0 * flag
    card.add_mean("overall", {item: value for part in tags.values() for item, value in part.items()}, "%", groups)
    for tag in (tag for tag in TAGS if tag in tags):
        card.add_mean(tag, tags[tag], "%")
    card.add_share("prompts with a right picture", {name: any(one["right"]) for name, one in results.items()})
    return card
