"""Two score cards of one protocol beside each other, item by item.

    unicode2 evaluate compare A.json B.json

Values and difference are those of the items that both cards have; figures without common items are left out. Items that
are right or wrong and independent are tested by McNemar's exact test. Otherwise a sign-flip permutation test is used;
all pictures of a prompt are flipped together. The 95 % interval of the difference is a bootstrap over such groups.

Cards with different protocols are refused, with a list of what differs. `--ignore NAME` lets an entry of the protocol
differ, such as a setting that is to be compared.
"""

import argparse
import json
from math import comb
from pathlib import Path

import numpy as np

from ..cards import write_table
from ..files import write_file
from ..record import MOST, shorten
from .card_files import check_place, read_card
from .intervals import bootstrap, group_of, mean_of
from .score_card import ScoreCard, flatten

# Random signs of a test
FLIPS = 10_000


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="unicode2 evaluate compare", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("first", metavar="A.json", help="score card")
    add("second", metavar="B.json", help="score card of the same protocol")
    add("--ignore", nargs="+", default=[], metavar="NAME", help="entries of the protocol that may differ")
    add("--json", metavar="FILE", help="also write the comparison to a file")
    return parser


def main(args: argparse.Namespace) -> list[dict]:
    if args.json:
        check_output(args.json)
    first, second = read_card(args.first), read_card(args.second)
    check_protocols(first, second, args)
    rows = compare_cards(first, second)
    if not rows:
        raise ValueError(f"{args.first} and {args.second} have no figure, or no item of a figure, in common.")
    print(write_table([{name: write(value) for name, value in row.items()} for row in rows]))
    if args.json:
        write_file(args.json, (json.dumps(rows, indent=1) + "\n").encode())
    return rows


def check_output(file: str) -> None:
    """Raises `ValueError` when a comparison cannot be written to a file, or would replace something else."""
    check_place(file, "--json")
    if Path(file).is_file():
        try:
            rows = json.loads(Path(file).read_text())
        except (ValueError, RecursionError):
            rows = None
        if not isinstance(rows, list) or not all(isinstance(row, dict) and "B - A" in row for row in rows):
            raise ValueError(f"--json {file} is there, and is no comparison; it is not replaced.")


def write(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def check_protocols(first: ScoreCard, second: ScoreCard, args: argparse.Namespace) -> None:
    """Raises `ValueError` on cards that are not comparable, with what differs."""
    if first.command != second.command:
        raise ValueError(f"{args.first} is of `{first.command}`, and {args.second} of `{second.command}`.")
    one, other = flatten(first.protocol), flatten(second.protocol)
    unknown = [name for name in args.ignore if name not in one and name not in other]
    if unknown:
        raise ValueError(f"--ignore {unknown[0]} is no entry of the protocol; those are {', '.join(sorted(one))}.")
    for name in args.ignore:
        one.pop(name, None)
        other.pop(name, None)
    if not args.ignore and first.protocol_hash == second.protocol_hash:
        return
    # As JSON, in which neither 0 is false nor a missing entry null
    texts = [{name: json.dumps(value, sort_keys=True) for name, value in part.items()} for part in (one, other)]
    names = [name for name in {**one, **other} if texts[0].get(name) != texts[1].get(name)]
    if not names and args.ignore:
        return
    for file, entries in ((args.first, one), (args.second, other)):
        if "generation.not known, of the pictures" in entries:
            raise ValueError(
                f"{file} does not say how its pictures were drawn: they lay without generation.json, which `unicode2 "
                "evaluate generation` writes beside them. It can be compared with no other."
            )
    changes = [f"{name} is {tell(one, name)} in A and {tell(other, name)} in B" for name in names[:MOST]]
    changes += [f"and {len(names) - MOST} more"] * (len(names) > MOST)
    raise ValueError(
        f"{args.first} and {args.second} follow different protocols ({'; '.join(changes)}); --ignore NAME lets an "
        "entry differ."
    )


def tell(entries: dict, name: str) -> str:
    return shorten(entries[name]) if name in entries else "not given"


def compare_cards(first: ScoreCard, second: ScoreCard) -> list[dict]:
    """A row for each figure that both cards have: values, difference, interval, p and number of items."""
    others = {figure.name: figure for figure in second.figures}
    rows = []
    for figure in first.figures:
        other = others.get(figure.name)
        if other is None:
            continue
        one, two = first.items.get(figure.name, {}), second.items.get(figure.name, {})
        shared, strata = [item for item in one if item in two], first.strata.get(figure.name)
        if (one or two) and not shared:
            continue
        values = figure.value, other.value
        if shared:
            one, two = ({item: part[item] for item in shared} for part in (one, two))
            values = mean_of(one, strata), mean_of(two, strata)
        row = {"figure": figure.name, "A": values[0], "B": values[1], "B - A": values[1] - values[0]}
        row |= {"95 %": None, "p": None, "items": len(shared)}
        if shared:
            low, high = bootstrap({item: two[item] - one[item] for item in shared}, strata)
            row["95 %"] = None if low is None else f"{low:.4g} to {high:.4g}"
            row["p"] = compute_p(one, two, strata)
        rows.append(row)
    return rows


def compute_p(one: dict[str, float], other: dict[str, float], strata: dict[str, str] | None = None) -> float:
    """
    p of no difference of `mean_of`, on two sides.

    McNemar's exact test where every item is a group of its own and has one of two values, else a test of random signs
    of the groups.

    Args:
        one, other: values of the same items.
        strata: the stratum of each group.
    """
    groups, sizes = {}, {}
    for item in one:
        stratum = strata[group_of(item)] if strata else ""
        sizes[stratum] = sizes.get(stratum, 0) + 1
    for item in one:
        group = group_of(item)
        weight = sizes[strata[group] if strata else ""]
        groups[group] = groups.get(group, 0.0) + (other[item] - one[item]) / weight
    differences = np.array([*groups.values()])
    if not differences.any():
        return 1.0
    if not strata and len(groups) == len(one) and len({*one.values(), *other.values()}) == 2:
        gained, lost = int((differences > 0).sum()), int((differences < 0).sum())
        count, least = gained + lost, min(gained, lost)
        return min(1.0, 2 * sum(comb(count, k) for k in range(least + 1)) / 2**count)
    rng, observed, reached = np.random.default_rng(0), abs(differences.sum()), 0
    for _ in range(FLIPS // 1000):
        signs = rng.choice((-1.0, 1.0), (1000, len(differences)))
        reached += int((abs((signs * differences).sum(1)) >= observed - 1e-12).sum())
    return (reached + 1) / (FLIPS + 1)


if __name__ == "__main__":
    main(make_parser().parse_args())
