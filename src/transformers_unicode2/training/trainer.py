"""The drop-in for TRL's `SFTTrainer` that trains both heads, and what it refuses since its loss would ignore it."""

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow.compute as pc
import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader, SequentialSampler
from tqdm.auto import tqdm
from transformers import AutoConfig, TrainingArguments
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from .checkpointing import WholeCheckpoints
from .optimizer import PartRates
from .prompt_images import swap_images, thin_images

# Nats per token. A smaller image gap may be more than chance, and is of no use: 0.1 is a tenth of the perplexity.
SMALL_GAP = 0.1
# Options that this trainer's loss does not follow: their defaults, and why
UNFOLLOWED = {
    "label_smoothing_factor": (0.0, "the loss is the model's own, over two heads"),
    "loss_type": ("nll", "the loss is the model's own, over two heads"),
    "neftune_noise_alpha": (None, "the noise would reach text embeddings, but not those of images"),
    "use_liger_kernel": (False, "there are no Liger kernels for this model"),
    "liger_kernel_config": (None, "there are no Liger kernels for this model"),
}
# Options about how texts become ids, and their defaults
OF_TEXTS = {
    "completion_only_loss": None,
    "assistant_only_loss": False,
    "dataset_text_field": "text",
    "chat_template_path": None,
    "eos_token": None,
}


# When the image gap is not measured
JOINED = (
    "No image gap: `packing` and `padding_free` join rows; it is measured with `eval_packing: false` and "
    "`per_device_eval_batch_size: 1`."
)


class UniCode2SFTTrainer(PartRates, WholeCheckpoints, SFTTrainer):
    """`SFTTrainer` whose loss is the model's own, over both heads; TRL's fused one knows a single head.

    Takes what `SFTTrainer` takes: tokenized rows, texts, and chats with images (`messages` and `images`) with the
    processor as `processing_class`. With `assistant_only_loss` an image in an answer is learnt as the codes of its
    pixels, and a question is not learnt.

    Logs `text_loss` (Eq. 7) and `visual_loss` (Eq. 8) beside the loss, to which each text token adds `text_weight`
    times its share. Evaluation adds the share of targets with the best score, `text_accuracy` and `visual_accuracy`,
    and the image gap of tokenized rows, see `measure_gap`. `predict`, and `evaluate` with `compute_metrics`, give
    scores over the unified vocabulary, `(batch_size, num_tokens, visual_token_offset + codebook_size)`;
    `preprocess_logits_for_metrics` can make less of them.

    Attributes:
        text_weight (`float`): weight of a text token in the loss.
        codes_per_image (`int`, *optional*): codes of each image in a prompt that a training step reads, drawn anew in
            each step; evaluation reads all. Not for joined rows (`packing`, `padding_free`) nor for chats with images.
        processor (`UniCode2Processor`, *optional*): saved with each checkpoint, which can then be loaded for use.

    Raises:
        `ValueError`: on options that this loss or data that are tokenized already would ignore, see `check_options`.
    """

    text_weight = 1.0
    codes_per_image: int | None = None
    processor = None

    def __init__(self, model, args=None, **kwargs):
        check_options(model, args, kwargs)
        super().__init__(model, args, **kwargs)
        # One for each evaluated row so far: negative log-likelihood, targets and hits of texts, then of images
        self.rows = []
        if self.aux_loss_enabled:
            raise ValueError(
                "The loss has no part for the routers of experts; set `router_aux_loss_coef` to 0 to train without it."
            )

    def train(self, *args, **kwargs):
        """As of `Trainer`. Raises `ValueError` on data that `codes_per_image` is not for."""
        if self.codes_per_image is not None:
            check_thinning(self.args)
            if not isinstance(self.data_collator, DataCollatorForLanguageModeling):
                raise ValueError(
                    "`codes_per_image` is for tokenized rows, and these are chats with images; give the data to "
                    "`unicode2 tokenize`, or leave it out."
                )
        return super().train(*args, **kwargs)

    def _get_eval_sampler(self, eval_dataset: Dataset) -> SequentialSampler:
        # How training orders rows is not for evaluation, where the image gap finds rows by their places
        return SequentialSampler(eval_dataset)

    def get_eval_dataloader(self, *args, **kwargs) -> DataLoader:
        with all_rows(self.args):
            return super().get_eval_dataloader(*args, **kwargs)

    def get_test_dataloader(self, *args, **kwargs) -> DataLoader:
        with all_rows(self.args):
            return super().get_test_dataloader(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.processor is not None:
            self.processor.save_pretrained(output_dir or self.args.output_dir)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        offset = self.accelerator.unwrap_model(model).config.visual_token_offset
        if self.codes_per_image is not None and self.model.training:
            inputs = thin_images(inputs, offset, self.codes_per_image, self.state.global_step)
        if isinstance(self.data_collator, DataCollatorForLanguageModeling):
            # It pads on the right, where a causal model needs no mask
            inputs = {name: value for name, value in inputs.items() if name != "attention_mask"}
        # The scores of all positions, which the loss does without.
        if return_outputs:
            length = inputs["input_ids"].shape[1]
            inputs = {**inputs, "logits_to_keep": torch.arange(length, device=inputs["input_ids"].device)}
        measured = {} if self.model.training else {"measure_targets": True}
        outputs = model(**inputs, use_cache=False, num_items_in_batch=num_items_in_batch, **measured)
        loss = outputs.loss
        if self.text_weight != 1:
            targets = inputs["labels"][:, 1:]
            text = (targets >= 0) & (targets < offset)
            count = (targets >= 0).sum() if num_items_in_batch is None else num_items_in_batch
            loss = loss + (self.text_weight - 1) * outputs.text_loss * text.sum() / count
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        if measured:
            self.note_rows(outputs, offset)
        else:
            for name in ("text_loss", "visual_loss"):
                value = self.accelerator.gather_for_metrics(getattr(outputs, name).detach()).mean().item()
                self._metrics["train"][name].append(value)
        return (loss, outputs) if return_outputs else loss

    def note_rows(self, outputs, visual_token_offset: int) -> None:
        """Notes how well the targets of a batch were foretold, see `rows`."""
        targets, columns = outputs.measured.targets, []
        for chosen in ((targets >= 0) & (targets < visual_token_offset), targets >= visual_token_offset):
            columns += [(value * chosen).sum(1) for value in (outputs.measured.nll, chosen, outputs.measured.hits)]
        rows = torch.stack([column.double() for column in columns], dim=1)  # (batch_size, 6)
        self.rows.append(self.accelerator.gather_for_metrics(rows).cpu())

    def evaluation_loop(
        self,
        dataloader: torch.utils.data.DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ):
        """As of `Trainer`, with the metrics that the class names."""
        self.rows = []
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        rows = torch.cat(self.rows)
        metrics = {}
        for kind, (nll, count, hits) in (("text", rows.sum(0)[:3]), ("visual", rows.sum(0)[3:])):
            if count > 0:
                metrics |= {f"{kind}_loss": (nll / count).item(), f"{kind}_accuracy": (hits / count).item()}
        if description == "Evaluation":
            metrics |= self.measure_gap(dataloader.dataset, rows)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def measure_gap(self, dataset, rows: torch.Tensor) -> dict[str, float]:
        """
        The image gap: how much more the text of an answer costs when its images are those of another row.

        That is the mean over rows of the difference of the loss per text token, in nats, beside its standard error.
        Rows without images in questions do not count. Near 0, the model does not read its images.

        Args:
            dataset: tokenized rows; of other data there is no gap.
            rows: what was noted of them, `(num_rows, 6)`.

        Returns:
            `image_gap`, `image_gap_se` and `image_gap_rows`, or nothing when fewer than two rows count.
        """
        is_tokenized = isinstance(dataset, Dataset) and {"input_ids", "labels"} <= set(dataset.column_names)
        if not is_tokenized:
            return {}
        if joins_rows(self.args) or len(rows) != len(dataset):
            if self.is_world_process_zero():
                tqdm.write(JOINED)
            return {}
        offset = self.accelerator.unwrap_model(self.model).config.visual_token_offset
        chosen, swapped = swap_images(dataset, offset)
        if len(chosen) < 2:
            return {}
        self.rows = []
        super().evaluation_loop(self.get_eval_dataloader(swapped), "Other images", prediction_loss_only=True)
        own, other = rows[chosen], torch.cat(self.rows)
        gaps = other[:, 0] / other[:, 1] - own[:, 0] / own[:, 1]
        gap, error = gaps.mean().item(), (gaps.std() / len(gaps) ** 0.5).item()
        if self.is_world_process_zero():
            verdict = "the images are read" if gap > SMALL_GAP else "the images are hardly read"
            verdict = verdict if gap > 2 * error else "nothing shows that the images are read"
            tqdm.write(f"Image gap {gap:.3f} nats per token, standard error {error:.3f}, {len(gaps)} rows: {verdict}.")
        return {"image_gap": gap, "image_gap_se": error, "image_gap_rows": len(gaps)}

    def evaluate(self, eval_dataset=None, *args, **kwargs):
        # A string is the name of one that the trainer has.
        if not isinstance(eval_dataset, str):
            check_datasets({"eval": eval_dataset}, self.args, self._formatting_func, find_offset(self.model))
        return super().evaluate(eval_dataset, *args, **kwargs)

    def predict(self, test_dataset, *args, **kwargs):
        """As of `Trainer`, with data of the kinds that training takes."""
        check_datasets({"test": test_dataset}, self.args, self._formatting_func, find_offset(self.model))
        if not self._skip_prepare_dataset:
            options = (self.processing_class, self.args, False, self._formatting_func, "test")
            test_dataset = self._prepare_dataset(test_dataset, *options)
        return super().predict(test_dataset, *args, **kwargs)

    def create_model_card(self, *args, **kwargs):
        """None is written: TRL's knows neither the stage nor its data, and would lie beside weights that are not there
        yet.
        """


@contextmanager
def all_rows(args: TrainingArguments) -> Iterator[None]:
    """Sets `dataloader_drop_last`, which is for training, aside for a while."""
    drop_last, args.dataloader_drop_last = args.dataloader_drop_last, False
    try:
        yield
    finally:
        args.dataloader_drop_last = drop_last


def joins_rows(args: SFTConfig) -> bool:
    """Whether evaluation joins rows, so that they cannot be told apart."""
    packed = args.packing if args.eval_packing is None else args.eval_packing
    joins_batches = args.padding_free or (args.packing and args.packing_strategy != "wrapped")
    return packed or (joins_batches and args.per_device_eval_batch_size > 1)


def check_thinning(args: SFTConfig) -> None:
    """Raises `ValueError` on options with which `codes_per_image` cannot be followed."""
    for name in ("packing", "padding_free"):
        if getattr(args, name):
            raise ValueError(
                f"`codes_per_image` is not for rows that are joined, and `{name}` joins them; leave out one of the two."
            )


def check_options(model, args: TrainingArguments | None, others: dict) -> None:
    """Raises `ValueError` on what is handed to a trainer and would be ignored: by the loss, or because data are
    tokenized already.

    Args:
        model: model, or name of one.
        args: training arguments.
        others: further arguments of `SFTTrainer`.
    """
    loss = others.get("compute_loss_func")
    if loss is not None:
        raise ValueError(f"`compute_loss_func` is {loss}; it is not followed, since the loss is the model's own.")
    args = as_sft_config(args)
    for name, (default, reason) in UNFOLLOWED.items():
        if getattr(args, name) != default:
            raise ValueError(f"`{name}` is {getattr(args, name)}; it is not followed, since {reason}.")
    if args.activation_offloading and not torch.accelerator.is_available():
        raise ValueError("`activation_offloading` is true; it moves activations off an accelerator, and there is none.")
    if not isinstance(model, str) and (args.model_init_kwargs or others.get("quantization_config")):
        raise ValueError(
            "`model_init_kwargs` and `quantization_config` are for a model by name; load the model with them."
        )
    datasets = {"train": others.get("train_dataset"), "eval": others.get("eval_dataset")}
    check_datasets(datasets, args, others.get("formatting_func"), find_offset(model))


def as_sft_config(args: TrainingArguments | None) -> SFTConfig:
    """The training arguments that `SFTTrainer` makes of others, or of none."""
    if isinstance(args, SFTConfig):
        return args
    if args is None:
        return SFTConfig("trainer_output")
    settings = args.to_dict()
    # `to_dict` hides the tokens
    settings |= {"hub_token": args.hub_token}
    settings.pop("push_to_hub_token", None)
    return SFTConfig(**settings)


def find_offset(model) -> int | None:
    """First visual token id of a model, or of one by name; `None` of a model of another kind."""
    config = AutoConfig.from_pretrained(model) if isinstance(model, str) else model.config
    return getattr(config, "visual_token_offset", None)


def check_datasets(datasets: dict, args: SFTConfig, formatting_func, visual_token_offset: int | None) -> None:
    """`check_dataset` of all data sets, and of those in dictionaries."""
    for name, dataset in datasets.items():
        if isinstance(dataset, dict):
            parts = {f"{name} {key}": part for key, part in dataset.items()}
            check_datasets(parts, args, formatting_func, visual_token_offset)
        elif dataset is not None:
            check_dataset(name, dataset, args, formatting_func, visual_token_offset)


def check_dataset(name: str, dataset, args: SFTConfig, formatting_func, visual_token_offset: int | None) -> None:
    """Raises `ValueError` when `args` ask for what is not done to this data set, or would cut its images."""
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise ValueError(
            f"The {name} data are a {type(dataset).__name__}; give a `Dataset` or an `IterableDataset` of the library "
            "`datasets`."
        )
    tokenized = "input_ids" in (dataset.column_names or next(iter(dataset)))
    asked = [option for option, default in OF_TEXTS.items() if getattr(args, option) != default]
    asked += ["formatting_func"] if formatting_func else []
    if tokenized and asked:
        raise ValueError(f"The {name} data are tokenized already, so `{asked[0]}` has no effect on them; leave it out.")
    if not (args.dataset_kwargs or {}).get("skip_prepare_dataset"):
        if tokenized and args.max_length is not None and visual_token_offset is not None:
            check_cuts(name, dataset, args, visual_token_offset)
        return
    asked = [option for option in ("packing", "shuffle_dataset") if getattr(args, option)]
    if asked:
        raise ValueError(f"`{asked[0]}` has no effect with `skip_prepare_dataset`; leave out one of the two.")
    if args.max_length is not None:
        check_lengths(name, dataset, args.max_length)


def check_lengths(name: str, dataset, max_length: int) -> None:
    """Raises `ValueError` when an example is longer than `max_length`, or may be, since nothing cuts it."""
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            f"`max_length` is {max_length}, and `skip_prepare_dataset` leaves all lengths; set it to null."
        )
    batches = dataset.select_columns("input_ids").with_format("arrow").iter(4096)
    lengths = [length for batch in batches for length in pc.list_value_length(batch["input_ids"]).to_pylist()]
    too_long = sum(length > max_length for length in lengths)
    if too_long:
        raise ValueError(
            f"{too_long} of {len(lengths)} {name} examples are longer than `max_length` {max_length}, the longest has "
            f"{max(lengths)} ids; none is cut, since images would be: raise `max_length` or set it to null."
        )


def check_cuts(name: str, dataset, args: SFTConfig, visual_token_offset: int) -> None:
    """Raises `ValueError` when TRL would cut tokenized rows with images, or may, since it cuts anywhere."""
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            f"`max_length` is {args.max_length}, at which a stream would be cut, images too; set it to null."
        )
    batches = dataset.select_columns("input_ids").with_format("arrow").iter(4096)
    largest = [pc.max(pc.list_flatten(batch["input_ids"])).as_py() or 0 for batch in batches]
    if max(largest, default=0) < visual_token_offset:
        return
    if args.packing and args.packing_strategy == "wrapped":
        raise ValueError("`packing_strategy` is wrapped, which cuts images; take bfd, which cuts none of these rows.")
    check_lengths(name, dataset, args.max_length)
