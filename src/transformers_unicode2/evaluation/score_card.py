"""The score card of an evaluation: figures with intervals, and everything that they depend on.

A card is a JSON file and a page beside it. Its parts are:

- `protocol`: what was measured and how: data by their SHA-256, scorer, judge, and every setting of the language model
  and of the decoder. `protocol_hash` is its SHA-256. Figures of two cards may be compared if these are equal.
- `subject`: which checkpoint, codebook, mapper and decoder, by their digests.
- `figures`: values with 95 % intervals over the items, and their counts.
- `items`: what each item got, for paired tests, see `compare.py`. Items that depend on each other, as the pictures of a
  prompt do, are a group: what their names have before the first slash.
- `strata`: of figures that are means of means, such as GenEval's over its tags, the stratum of each group.
- `run`: date, commit, device, versions, seconds, and what changes no figure, such as the batch size.
"""

import hashlib
import json
import platform
import subprocess
import time
from dataclasses import asdict, dataclass, field
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from ..cards import name_places, write_table
from ..files import remove_unfinished, write_file
from ..planning_unicode2 import IMAGE_OPTIONS
from ..record import shorten

FORMAT = 3
# Resamples of a bootstrap, and the quantile of a normal distribution for 95 % on two sides
RESAMPLES, NORMAL = 2000, 1.959963984540054
# Of them computed at a time
CHUNK = 50
# Settings by which image mode draws ids, beside its own
SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty")
LIBRARIES = (
    "transformers_unicode2",
    "torch",
    "transformers",
    "diffusers",
    "lmms_eval",
    "torchmetrics",
    "numpy",
    "pillow",
)


GROUPED = """
Intervals are over items, or over groups of items that depend on each other, such as the pictures of a prompt.
"""


@dataclass(frozen=True)
class Figure:
    """A value with its 95 % interval, how many items it is of, and in how many groups these are.

    `interval` is `binomial` (Wilson), `bootstrap`, `too few` of fewer than two groups of items, or two of a stratum, or
    `none` of a figure that no items make up.
    """

    name: str
    value: float
    low: float | None
    high: float | None
    count: int
    unit: str = "%"
    interval: str = "binomial"
    groups: int | None = None


@dataclass
class ScoreCard:
    """See the head of this file."""

    command: str
    protocol: dict
    subject: dict
    figures: list[Figure] = field(default_factory=list)
    items: dict[str, dict[str, float]] = field(default_factory=dict)
    strata: dict[str, dict[str, str]] = field(default_factory=dict)
    run: dict = field(default_factory=dict)

    @property
    def protocol_hash(self) -> str:
        """SHA-256 of command and protocol."""
        return hash_content([FORMAT, self.command, self.protocol])

    def add_share(self, name: str, right: dict[str, bool]) -> None:
        """Adds the percentage of the items that are right, with its Wilson interval."""
        check_items(name, right)
        count = len(right)
        low, high = (100 * limit for limit in wilson(sum(right.values()), count))
        value = 100 * sum(right.values()) / count if count else 0.0
        groups = len({group_of(item) for item in right})
        self.figures.append(Figure(name, value, low, high, count, groups=groups))
        self.items[name] = {item: 100.0 * flag for item, flag in right.items()}

    def add_mean(self, name: str, values: dict[str, float], unit: str, strata: dict[str, str] | None = None) -> None:
        """Adds the mean of the items, or the mean over strata of their means, with its bootstrap interval over groups.

        Where all shares are 0 % or all are 100 %, there is nothing to resample, and the interval is Wilson's of the
        groups.
        """
        check_items(name, values)
        low, high = bootstrap(values, strata)
        interval, groups = "too few" if low is None else "bootstrap", len({group_of(item) for item in values})
        if unit == "%" and values and {*values.values()} in ({0.0}, {100.0}):
            right = groups if max(values.values()) else 0
            interval, (low, high) = "binomial", (100 * limit for limit in wilson(right, groups))
        value = mean_of(values, strata) if values else 0.0
        self.figures.append(Figure(name, value, low, high, len(values), unit, interval, groups))
        self.items[name] = dict(values)
        if strata:
            self.strata[name] = dict(strata)

    def add_figure(self, name: str, value: float, count: int, unit: str) -> None:
        """Adds a figure that no items make up, such as a distance of distributions."""
        self.figures.append(Figure(name, value, None, None, count, unit, "none"))

    def to_dict(self) -> dict:
        content = {"format": FORMAT, "command": self.command, "protocol_hash": self.protocol_hash}
        content |= {"protocol": self.protocol, "subject": self.subject}
        content |= {"figures": [asdict(figure) for figure in self.figures], "items": self.items}
        content |= {"strata": self.strata, "run": self.run}
        return json.loads(json.dumps(content, default=str))

    def write(self, file: str | Path) -> None:
        """Writes the card to a JSON file, and its page beside it, with the suffix `.md`."""
        file = Path(file)
        names = (file.name, file.with_suffix(".md").name)
        # What a kill left of them
        remove_unfinished(file.absolute().parent, names)
        write_file(file, (json.dumps(self.to_dict(), indent=1) + "\n").encode())
        write_file(file.with_suffix(".md"), self.make_page().encode())

    def make_page(self) -> str:
        """The card as Markdown, with the metadata that a model card on the Hub may take over."""
        rows = [
            {"figure": f.name, "value": f"{f.value:.4g} {f.unit}", "95 %": write_interval(f), "items": write_count(f)}
            for f in self.figures
        ]
        parts = [f"---\n{make_index(self).to_yaml()}\n---\n"] if rows else []
        parts += [f"# Score card: `unicode2 {self.command}`\n"]
        parts += [f"Protocol {self.protocol_hash[:12]}. Compare only cards of the same protocol.\n"]
        parts += [write_table(rows), GROUPED] if rows else []
        for heading in ("subject", "protocol", "run"):
            values = name_places(flatten(getattr(self, heading)))
            rows = [{heading: name, "value": shorten(value)} for name, value in values.items()]
            parts += [f"## {heading.capitalize()}\n", write_table(rows)] if rows else []
        return "\n".join(parts)


def write_interval(figure: Figure) -> str:
    if figure.low is None:
        return "" if figure.interval == "none" else figure.interval
    return f"{figure.low:.4g} to {figure.high:.4g} ({figure.interval})"


def write_count(figure: Figure) -> str:
    is_grouped = figure.groups not in (None, figure.count)
    return f"{figure.count} in {figure.groups} groups" if is_grouped else str(figure.count)


def flatten(values: dict, prefix: str = "") -> dict:
    """Nested entries under names with dots."""
    flat = {}
    for name, value in values.items():
        inner = isinstance(value, dict) and value
        flat |= flatten(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return flat


def make_index(card: ScoreCard):
    """`model-index` of a Hub model card for the figures of a score card, as `ModelCardData`."""
    from huggingface_hub import EvalResult, ModelCardData

    name = Path(card.subject.get("model", "model")).name
    results = [
        EvalResult(
            task_type=card.protocol.get("task_type", "image-text-to-text"),
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type=metric,
            metric_name=metric,
            metric_value=round(figure.value, 4),
            metric_args={"protocol": card.protocol_hash[:12], **list_limits(figure)},
        )
        for figure in card.figures
        for dataset, metric in [name_dataset(card, figure)]
    ]
    return ModelCardData(model_name=name, eval_results=results) if results else ModelCardData()


def list_limits(figure: Figure) -> dict[str, list[float]]:
    return {} if figure.low is None else {"interval": [round(figure.low, 4), round(figure.high, 4)]}


def name_dataset(card: ScoreCard, figure: Figure) -> tuple[str, str]:
    """Data set and metric of a figure: of several tasks, its name begins with the one that it is of."""
    if "tasks" in card.protocol:
        return tuple(figure.name.split(", ", 1))
    return card.protocol.get("benchmark", card.command), figure.name


def read_card(file: str | Path) -> ScoreCard:
    """Reads a card. Raises `ValueError` on a file that is none, or whose protocol was changed by hand."""
    if not Path(file).is_file():
        raise ValueError(f"There is no file {file}.")
    try:
        content = json.loads(Path(file).read_text())
        figures = [Figure(**figure) for figure in content["figures"]]
        names = ("command", "protocol", "subject", "items", "strata", "run")
        card = ScoreCard(**{name: content[name] for name in names}, figures=figures)
        found = content["protocol_hash"], content["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no score card ({type(error).__name__}: {error}).") from error
    if found != (card.protocol_hash, FORMAT):
        raise ValueError(f"{file} was changed by hand, or is of another version: its protocol has another hash.")
    return card


def begin_card(command: str, benchmark: str, scorer: dict, images: str | Path, pictures: str) -> ScoreCard:
    """The card of drawn pictures, with how they were drawn, as `unicode2 evaluate generation` left it beside them.

    `pictures` is a SHA-256 of all of them. Where it is not known how they were drawn, it is part of the protocol.
    """
    file = Path(images, "generation.json")
    drawn = read_card(file) if file.is_file() else None
    protocol = {"benchmark": benchmark, "task_type": "text-to-image", "scorer": scorer}
    protocol["generation"] = drawn.protocol if drawn else {"not known, of the pictures": pictures}
    subject = drawn.subject if drawn else {"model": "not known"}
    return ScoreCard(command, protocol, {**subject, "pictures": pictures})


def check_replaced(file: Path, card: ScoreCard) -> None:
    """Raises `ValueError` when a card would take the place of one with figures, or items of them, that it lacks."""
    counts = {figure.name: figure.count for figure in card.figures}
    for figure in read_card(file).figures if file.is_file() else ():
        if counts.get(figure.name, 0) < figure.count:
            raise ValueError(
                f"{file} has {figure.name!r} of {figure.count} items, and this run gives {counts.get(figure.name, 0)}; "
                "choose another --output, or delete the card."
            )


def check_card_file(file: str) -> None:
    """Raises `ValueError`, before any work, when a card cannot be written to the file of the option `--json`, or
    would take the place of something else. A card that is there is replaced.
    """
    path, page = Path(file), Path(file).with_suffix(".md")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--json {file}: there is no folder {path.absolute().parent}.")
    if path.is_dir():
        raise ValueError(f"--json {file} is a folder; give a file.")
    if path.suffix != ".json":
        raise ValueError(f"--json {file} must end in .json; the page of the card is written beside it, to .md.")
    if path.is_file() and '"protocol_hash"' not in path.read_text(errors="replace"):
        raise ValueError(f"--json {file} is there, and is no score card; it is not replaced.")
    if page.is_file() and "# Score card: " not in page.read_text(errors="replace"):
        raise ValueError(f"{page} is there, and is no page of a score card; --json {file} would replace it.")


def check_items(name: str, items: dict) -> None:
    """Raises `ValueError` when an item has no name before its slash, so that it would be in no group."""
    unnamed = [item for item in items if not group_of(item)]
    if unnamed:
        raise ValueError(f"{name}: the item {unnamed[0]!r} has no name before its first slash.")


def group_of(item: str) -> str:
    """The group of an item: what its name has before the first slash, or all of it."""
    return item.split("/", 1)[0]


def mean_of(values: dict[str, float], strata: dict[str, str] | None = None) -> float:
    """The mean of the items, or the mean over strata of their means."""
    parts = {}
    for item, value in values.items():
        parts.setdefault(strata[group_of(item)] if strata else "", []).append(value)
    return float(np.mean([np.mean(part) for part in parts.values()]))


def wilson(right: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a binomial share, exact at 0 and 1."""
    if not count:
        return 0.0, 1.0
    share, square = right / count, NORMAL**2
    middle = (share + square / (2 * count)) / (1 + square / count)
    half = NORMAL / (1 + square / count) * (share * (1 - share) / count + square / (4 * count**2)) ** 0.5
    return middle - half if right else 0.0, middle + half if right < count else 1.0


def bootstrap(values: dict[str, float], strata: dict[str, str] | None = None) -> tuple[float | None, float | None]:
    """
    A 95 % percentile interval of `mean_of`, the same in every run: groups of items are resampled with replacement,
    within their strata.

    Args:
        values: by item.
        strata: the stratum of each group.

    Returns:
        Its limits; `None` of fewer than two groups, or of a stratum of one, which cannot tell how much it varies.
    """
    groups = {}
    for item, value in values.items():
        total = groups.setdefault(group_of(item), np.zeros(2))
        total += value, 1
    if len(groups) < 2:
        return None, None
    rng, parts = np.random.default_rng(0), {}
    for group, total in groups.items():
        parts.setdefault(strata[group] if strata else "", []).append(total)
    if min(map(len, parts.values())) < 2:
        return None, None
    means = np.zeros(RESAMPLES)
    for part in map(np.array, parts.values()):
        for start in range(0, RESAMPLES, CHUNK):
            drawn = part[rng.integers(len(part), size=(CHUNK, len(part)))].sum(1)  # sums and counts
            means[start : start + CHUNK] += drawn[:, 0] / drawn[:, 1] / len(parts)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def describe_run(device: str, start: float, **settings) -> dict:
    """What a card says of its run, with `settings` that change no figure.

    Args:
        device: that ran the model.
        start: `time.perf_counter()` at the beginning.
    """
    versions = {}
    for library in LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            continue
    run = {"date": datetime.now().astimezone().isoformat(timespec="seconds"), "commit": find_commit()}
    run |= {"seconds": round(time.perf_counter() - start, 1), "device": device, "machine": platform.machine()}
    return {**run, "python": platform.python_version(), "versions": versions, **settings}


def find_commit() -> str | None:
    """The commit of this package's repository, if it runs out of one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


def hash_content(content) -> str:
    """SHA-256 of what JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def hash_data(*files: str | Path) -> dict[str, str]:
    """SHA-256 of data files by their last names."""
    from ..record import hash_file

    return {Path(file).name: hash_file(file) for file in files}


def describe_generation(model, guidance_scale: float | None = None, **changes) -> dict:
    """The settings by which a model writes images, those of a call before its own.

    Args:
        model (`UniCode2ForConditionalGeneration`): whose own settings are taken where a call names none.
        guidance_scale: of the call.
        **changes: further ones of it.
    """
    config = model.generation_config
    settings = {name: getattr(config, name, None) for name in (*SAMPLING, *IMAGE_OPTIONS)}
    settings |= getattr(config, "image_generation", None) or {}
    settings = {name: value for name, value in settings.items() if value is not None}
    given = {"guidance_scale": guidance_scale, **changes}
    return settings | {name: value for name, value in given.items() if value is not None}


def describe_subject(model: str, deep: bool = False) -> dict:
    """Which checkpoint, by its digest and that of its quantizer; of an adapter, also that of its checkpoint.

    Args:
        model: folder or Hub name.
        deep: whether it is a pipeline, with parts in subfolders, and has a digest as such.
    """
    from ..adapters import find_base, is_adapter
    from ..record import hash_source
    from ..tokens import hash_quantizer

    base = find_base(model)[0] if is_adapter(model) else model
    # The same name for the same files, whether the language model alone is scored or all of a pipeline
    subject = {"model": model, "checkpoint": hash_source(model)}
    subject |= {"pipeline": hash_source(model, deep=True)} if deep else {}
    subject |= {"base": hash_source(base)} if base != model else {}
    return {**subject, "quantizer": hash_quantizer(base)}
