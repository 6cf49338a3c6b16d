"""Puts the figures of score cards into the metadata of a model card, where the Hub shows them.

    unicode2 evaluate model-index scenes.json geneval.json --readme outputs/pipe/README.md

Figures go into `model-index` of the front matter, each with the hash of its protocol and its 95 % interval. A figure of
the same protocol is replaced; the others stay, and so does the text. Where checkpoint files lie beside the model card,
score cards of another checkpoint are refused.
"""

import argparse
from pathlib import Path

from ..files import write_file
from .card_files import read_card
from .score_card import ScoreCard, describe_subject, make_index


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="unicode2 evaluate model-index", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("cards", nargs="+", metavar="CARD.json", help="score cards with figures")
    parser.add_argument("--readme", required=True, metavar="FILE", help="model card to change")
    return parser


def main(args: argparse.Namespace) -> None:
    readme, cards = Path(args.readme), {name: read_card(name) for name in args.cards}
    if not readme.is_file():
        raise ValueError(f"There is no model card {readme}.")
    for name, card in cards.items():
        if not card.figures:
            raise ValueError(f"{name} has no figures; its pictures are to be scored first.")
        check_subject(name, card, readme.parent)
    check_readme(readme)
    count = add_figures(readme, list(cards.values()))
    print(f"{readme}: {count} figures of {len(cards)} score cards")


def check_readme(readme: Path) -> None:
    """Raises `ValueError` when the front matter of a model card cannot be read, or has figures of several models."""
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    try:
        models = (metadata_load(readme) or {}).get("model-index") or []
    except (YAMLError, AttributeError, ValueError) as error:
        raise ValueError(
            f"The front matter of {readme}, between the lines ---, is no YAML of a model card "
            f"({' '.join(str(error).split())}); mend it."
        ) from error
    if len(models) > 1:
        names = ", ".join(str(one.get("name")) for one in models)
        raise ValueError(
            f"{readme} has a model-index of {len(models)} models ({names}), and score cards are of one; keep one."
        )


def check_subject(name: str, card: ScoreCard, folder: Path) -> None:
    """Raises `ValueError` when a score card is of another checkpoint than the one in a folder, if there is one."""
    is_pipeline = (folder / "model_index.json").is_file()
    if not is_pipeline and not (folder / "config.json").is_file():
        return
    held = describe_subject(str(folder), deep=is_pipeline)
    for part in ("checkpoint", "pipeline"):
        own, scored = held.get(part), card.subject.get(part)
        # Of a language model alone, there is no digest of a pipeline
        if own != scored and (part == "checkpoint" or own and scored):
            raise ValueError(
                f"{name} is of the {part} {str(scored)[:12]} ({card.subject.get('model')}), and {folder} holds "
                f"{own[:12]}."
            )


def add_figures(readme: Path, cards: list[ScoreCard]) -> int:
    """Writes the figures of score cards to a model card, and returns how many."""
    from huggingface_hub import ModelCard

    card = ModelCard.load(readme)
    new = [result for one in cards for result in make_index(one).eval_results]
    names = {identify(result) for result in new}
    kept = [result for result in card.data.eval_results or [] if identify(result) not in names]
    card.data.eval_results = kept + new
    card.data.model_name = card.data.model_name or make_index(cards[0]).model_name
    write_file(readme, str(card).encode())
    return len(new)


def identify(result) -> tuple:
    """What tells a figure from others: task, data set, metric and protocol."""
    protocol = (result.metric_args or {}).get("protocol")
    return result.task_type, result.dataset_type, result.metric_type, protocol
