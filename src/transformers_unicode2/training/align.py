"""Alignment of images with their captions before the language model sees them. It needs neither that nor the encoder.

    accelerate launch -m transformers_unicode2.training.align --config align.yaml

    model: unicode2
    datasets: [{path: tokens}]
    output_dir: aligned
    per_device_train_batch_size: 256
    max_steps: 200
    lr_scheduler_type: constant
    weight_decay: 0.01

The paper does not have this stage; it is ours. An image is the mean of its projected codes, a caption the mean of its
token embeddings, both less the mean token embedding. InfoNCE in both directions draws the two of a row together: cosine
over temperature, the other rows of the batch as negatives. C2 and the projector learn, and nothing else. In the end the
projector's output has the mean and the spread of the token embeddings again, see `projection.py`.

Rows with one image and a text about it take part: an answer behind it, or what was asked for in front of it.
"""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy, embedding_bag, normalize
from transformers import TrainingArguments

from ..cards import write_card
from ..checkpoints import find_safetensors
from ..processes import agree
from ..projection import measure_embeddings, rescale_projector
from .messages import find_pair
from .mixtures import MixturePart, check_mixture, find_parts, hash_parts, open_mixture
from .outcome import describe_part
from .parameters import read_rates
from .stage import Stage, StageTrainer, hash_inputs, run, stage

# Rows whose captions are compared where there are no `eval_datasets`
NUM_COMPARED = 256
C2 = "model.visual_embeddings.weight"
PROJECTOR = "model.projector."
# Suffixes of what a checkpoint has beside its weights and its card.
COPIED = (".json", ".jinja", ".py", ".txt", ".model")


@dataclass
class AlignArguments:
    model: str = field(metadata={"help": "checkpoint whose C2 and projector are aligned"})
    datasets: list[dict] = field(
        metadata={"help": "folders that `unicode2 tokenize` wrote: {path, fraction, split} of each"}
    )
    eval_datasets: list[dict] = field(
        default_factory=list, metadata={"help": "data to compare captions on, in the same form"}
    )
    learning_rates: dict = field(
        default_factory=lambda: {"projector": 1e-3, "visual_embeddings": 3e-3},
        metadata={"help": "learning rates of the two parts"},
    )
    temperature: float = field(default=0.07, metadata={"help": "what cosines are divided by"})

    def __post_init__(self):
        self.learning_rates = read_rates(self.learning_rates)


class Alignment(torch.nn.Module):
    """C2 and the projector, which learn, and the frozen token embeddings, which are not in the state dict.

    Args:
        visual_embeddings (`UniCode2VisualEmbeddings`): C2.
        projector (`UniCode2Projector`): of codes to the width of the language model.
        embedding (`torch.nn.Embedding`): of the text ids.
        temperature (`float`): what cosines are divided by.
    """

    def __init__(
        self,
        visual_embeddings: torch.nn.Module,
        projector: torch.nn.Module,
        embedding: torch.nn.Embedding,
        temperature: float,
    ):
        super().__init__()
        self.visual_embeddings, self.projector, self.temperature = visual_embeddings, projector, temperature
        mean, self.spread = measure_embeddings(embedding)
        # In a list, so that nothing of it is registered
        self.frozen = [embedding.requires_grad_(False), mean]

    def embed_images(self, codes: torch.LongTensor) -> torch.Tensor:
        """Codes `(batch_size, num_codes)` to unit vectors `(batch_size, hidden_size)`."""
        used, places = codes.unique(return_inverse=True)
        projected = self.projector(self.visual_embeddings(used))  # (num_used, hidden_size)
        mean = self.frozen[1].to(projected.device)
        return normalize(embedding_bag(places, projected, mode="mean") - mean, dim=-1)

    def embed_captions(self, caption_ids: torch.LongTensor, caption_mask: torch.Tensor) -> torch.Tensor:
        """Ids and mask `(batch_size, num_tokens)` to unit vectors `(batch_size, hidden_size)`."""
        embedding, mean = (part.to(caption_ids.device) for part in self.frozen)
        summed = (embedding(caption_ids).float() * caption_mask[..., None]).sum(1)
        return normalize(summed / caption_mask.sum(1, keepdim=True) - mean, dim=-1)

    def forward(
        self,
        codes: torch.LongTensor,
        caption_ids: torch.LongTensor,
        caption_mask: torch.Tensor,
        image_key: torch.LongTensor,
        caption_key: torch.LongTensor,
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            codes (`torch.LongTensor` of shape `(batch_size, num_codes)`): of the images.
            caption_ids (`torch.LongTensor` of shape `(batch_size, num_tokens)`): of the captions.
            caption_mask (`torch.FloatTensor` of shape `(batch_size, num_tokens)`): 1 for ids, 0 for padding.
            image_key, caption_key (`torch.LongTensor` of shape `(batch_size,)`): equal keys, equal contents; such rows
                are no negatives of each other.

        Returns:
            `loss`, InfoNCE of images to captions and back, and the `accuracy` of the first direction.
        """
        images, captions = self.embed_images(codes), self.embed_captions(caption_ids, caption_mask)
        scores = images @ captions.T / self.temperature  # (batch_size, batch_size)
        twins = (image_key[:, None] == image_key) | (caption_key[:, None] == caption_key)
        scores = scores.masked_fill(twins.fill_diagonal_(False), -torch.inf)
        own = torch.arange(len(scores), device=scores.device)
        loss = (cross_entropy(scores, own) + cross_entropy(scores.T, own)) / 2
        return {"loss": loss, "accuracy": (scores.argmax(1) == own).float().mean().detach()}

    @torch.no_grad()
    def compare(self, rows, batch_size: int = 256) -> float:
        """Share of the images of `rows` whose own caption, or an equal one, is the nearest of all their captions."""
        device = self.visual_embeddings.weight.device
        batches = [collate(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]
        batches = [{name: value.to(device) for name, value in batch.items()} for batch in batches]
        captions = torch.cat([self.embed_captions(batch["caption_ids"], batch["caption_mask"]) for batch in batches])
        keys = torch.cat([batch["caption_key"] for batch in batches])
        nearest = [keys[(self.embed_images(batch["codes"]) @ captions.T).argmax(1)] for batch in batches]
        return (torch.cat(nearest) == keys).float().mean().item()


class AlignmentTrainer(StageTrainer):
    """Logs `accuracy` beside the loss: the share of the images of a batch whose own caption is the nearest."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.accuracies = []

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        self.accuracies.append(outputs["accuracy"])
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.accuracies:
            logs["accuracy"] = torch.stack(self.accuracies).mean().item()
            self.accuracies = []
        super().log(logs, start_time)


def build_pairs(rows, tokenizer, option: str):
    """Chats to rows of `codes`, `caption_ids`, `image_key` and `caption_key`. Raises `ValueError` if there are none."""

    def convert(batch: dict[str, list]) -> dict[str, list]:
        pairs = [find_pair(*row) for row in zip(batch["messages"], batch["codes"])]
        codes, captions = zip(*[pair for pair in pairs if pair]) if any(pairs) else ((), ())
        return {
            "codes": list(codes),
            "caption_ids": tokenizer(list(captions), add_special_tokens=False)["input_ids"] if captions else [],
            "image_key": [make_key(json.dumps(image)) for image in codes],
            "caption_key": [make_key(caption) for caption in captions],
        }

    pairs = rows.map(convert, batched=True, remove_columns=rows.column_names, desc="building pairs")
    if not len(pairs):
        raise ValueError(f"No row of {option} has one image and a text about it.")
    return pairs


def make_key(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), signed=True)


def collate(rows: list[dict] | dict[str, list]) -> dict[str, torch.Tensor]:
    """Rows of `build_pairs`, or their columns, to the inputs of `Alignment`, captions padded on the right."""
    columns = rows if isinstance(rows, dict) else {name: [row[name] for row in rows] for name in rows[0]}
    captions = [torch.tensor(ids) for ids in columns["caption_ids"]]
    masks = [torch.ones(len(ids)) for ids in captions]
    padded = [torch.nn.utils.rnn.pad_sequence(parts, batch_first=True) for parts in (captions, masks)]
    others = {name: torch.tensor(columns[name]) for name in ("codes", "image_key", "caption_key")}
    return {"caption_ids": padded[0], "caption_mask": padded[1], **others}


def load_alignment(model: str, temperature: float) -> tuple[Alignment, object]:
    """The parts of a checkpoint that alignment needs, in float32, and its configuration; the rest is not read."""
    from transformers_unicode2 import UniCode2Config, UniCode2ForConditionalGeneration

    config = UniCode2Config.from_pretrained(model)
    with torch.device("meta"):
        whole = UniCode2ForConditionalGeneration(config)
    names = {id(module): name for name, module in whole.named_modules()}
    parts = (whole.model.visual_embeddings, whole.model.projector, whole.get_input_embeddings())
    for part in parts:
        name = names[id(part)]
        part.to_empty(device="cpu").float()
        if part is whole.get_input_embeddings():
            # Numbers that are not in the state dict, such as the factor of Gemma's embedding
            whole.model.language_model._init_weights(part)
        wanted = {f"{name}.{key}": key for key in part.state_dict()}
        part.load_state_dict({wanted[full]: value.float() for full, value in read_tensors(model, wanted).items()})
    return Alignment(*parts, temperature), config


def read_tensors(model: str, names: dict[str, str]) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint that have these names."""
    found = {}
    for file in find_safetensors(model):
        with safe_open(file, framework="pt") as stored:
            found |= {name: stored.get_tensor(name) for name in names if name in stored.keys()}
    return found


def main(args: AlignArguments, training_args: TrainingArguments) -> None:
    """See `stage` for what may change when a stage is started again."""
    if not args.datasets:
        raise ValueError("`datasets` is empty; name at least one folder that `unicode2 tokenize` wrote.")
    if not args.temperature > 0:
        raise ValueError(f"`temperature` is {args.temperature:g}; it must be above 0.")
    default = next(field.default for field in fields(training_args) if field.name == "learning_rate")
    if training_args.learning_rate != default and {"projector", "visual_embeddings"} <= args.learning_rates.keys():
        raise ValueError(
            f"`learning_rate` is {training_args.learning_rate:g}, and `learning_rates` has one for each part that "
            "learns; leave out one of the two."
        )
    if training_args.per_device_train_batch_size < 2:
        raise ValueError("`per_device_train_batch_size` is 1; a caption is told from those of other rows of a batch.")
    parts, eval_parts = find_parts(args.datasets, "`datasets`"), find_parts(args.eval_datasets, "`eval_datasets`")

    def hash_all() -> dict:
        return {**hash_inputs(args, checkpoints=("model",)), "datasets": hash_parts(parts)}

    with stage("align", args, training_args, hash_all) as held:
        if not held.finished:
            train(args, training_args, parts, eval_parts, held)


def train(
    args: AlignArguments,
    training_args: TrainingArguments,
    parts: list[MixturePart],
    eval_parts: list[MixturePart],
    held: Stage,
) -> None:
    from transformers import AutoTokenizer, set_seed

    set_seed(training_args.seed)
    alignment, config = load_alignment(args.model, args.temperature)
    agree(lambda: check_mixture([*parts, *eval_parts], args.model, config))
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    pairs = build_pairs(open_mixture(parts, training_args.seed), tokenizer, "`datasets`")
    if eval_parts:
        compared = build_pairs(open_mixture(eval_parts, training_args.seed), tokenizer, "`eval_datasets`")
    else:
        compared = pairs.select(range(min(NUM_COMPARED, len(pairs))))
    alignment.to(training_args.device)
    before = alignment.compare(compared)
    trainer = AlignmentTrainer(alignment, training_args, train_dataset=pairs, data_collator=collate)
    trainer.learning_rates = args.learning_rates
    held.train(trainer)
    after = alignment.compare(compared)
    if trainer.is_world_process_zero():
        kind = "held-out" if eval_parts else "training"
        print(f"Own caption nearest among {len(compared)} {kind} rows: {before:.1%} before, {after:.1%} after.")
    with held.result() as folder:
        if trainer.is_world_process_zero():
            alignment.cpu()
            codes, mean = alignment.visual_embeddings.weight, alignment.frozen[1]
            rescale_projector(alignment.projector, codes, mean, alignment.spread)
            write_aligned(args.model, alignment, folder)
            shares = [{"rows": len(compared), "before": before, "after": after}]
            write_aligned_card(folder, args, training_args, parts, held.made_of, shares)


def write_aligned(model: str, alignment: Alignment, output: Path) -> None:
    """Writes a checkpoint with the aligned parts in their former dtype; everything else is copied, file by file."""
    files = find_safetensors(model)
    folder = files[0].parent if Path(model).is_dir() else Path(snapshot_download(model, ignore_patterns=["*/*"]))
    new = {C2: alignment.visual_embeddings.weight.detach()}
    new |= {f"{PROJECTOR}{name}": value for name, value in alignment.projector.state_dict().items()}
    for file in files:
        with safe_open(file, framework="pt") as stored:
            state = {name: stored.get_tensor(name) for name in stored.keys()}
            metadata = stored.metadata()
        changed = {name: new[name].to(state[name].dtype).contiguous() for name in new.keys() & state.keys()}
        save_file({**state, **changed}, output / file.name, metadata=metadata)
    for file in folder.iterdir():
        if file.is_file() and file.suffix in COPIED and not file.name.startswith("."):
            shutil.copyfile(file, output / file.name)


def write_aligned_card(
    folder: Path,
    args: AlignArguments,
    training_args: TrainingArguments,
    parts: list[MixturePart],
    made_of: dict,
    shares: list[dict],
) -> None:
    data = [describe_part(part, made_of["datasets"][str(number)]) for number, part in enumerate(parts, 1)]
    write_card(
        folder,
        training_args.output_dir,
        f"`{args.model}` whose C2 and projector were aligned with captions by `transformers_unicode2.training.align`. "
        "Its language model has not been trained on images yet.",
        [args.model],
        {"Images whose own caption is the nearest": shares, "Data": data},
        {**asdict(args), "max_steps": training_args.max_steps, "batch": training_args.per_device_train_batch_size},
    )


if __name__ == "__main__":
    run(main, AlignArguments, TrainingArguments)
