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
import math
import platform
import subprocess
import time
from dataclasses import asdict, dataclass, field
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..cards import name_places, write_table
from ..files import remove_unfinished, write_file
from ..planning_unicode2 import IMAGE_OPTIONS
from ..record import shorten
from .intervals import bootstrap, group_of, mean_of, wilson

FORMAT = 3
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
        self.check_items(name, right)
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
        self.check_items(name, values)
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
        self.check_items(name, {name: value})
        self.figures.append(Figure(name, value, None, None, count, unit, "none"))

    def check_items(self, name: str, items: dict[str, float]) -> None:
        """Raises `ValueError` on a second figure of a name, and on an item that has no finite value, or no name before
        its slash, so that it would be in no group.
        """
        if name in [figure.name for figure in self.figures]:
            raise ValueError(f"There are two figures {name!r}; a card has one of each name.")
        for item, value in items.items():
            if not group_of(item):
                raise ValueError(f"{name}: the item {item!r} has no name before its first slash.")
            if not math.isfinite(value):
                what = name if item == name else f"{name}, item {item!r},"
                raise ValueError(f"{what} got {value}, which is no finite score.")

    def to_dict(self) -> dict:
        content = {"format": FORMAT, "command": self.command, "protocol_hash": self.protocol_hash}
        content |= {"protocol": self.protocol, "subject": self.subject}
        content |= {"figures": [asdict(figure) for figure in self.figures], "items": self.items}
        content |= {"strata": self.strata, "run": self.run}
        return json.loads(json.dumps(content, default=str, allow_nan=False))

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

    name = Path(str(card.subject.get("model", "model"))).name
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
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


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
