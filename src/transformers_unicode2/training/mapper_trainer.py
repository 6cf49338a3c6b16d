"""The `Trainer` of the condition mapper: captions of all processes as negatives, held-out figures, and pictures."""

from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..files import make_folders, whole_file
from .mapper_losses import contrastive_loss, find_own
from .stage import StageTrainer


class MapperTrainer(StageTrainer):
    """
    Trains a `MapperWithLosses`.

    Args:
        show: conditioning and latents to pairs of images, the originals and the paintings, for the pictures that an
            evaluation leaves in `validation`.

    Raises:
        `ValueError`: on options that the losses do not follow.
    """

    def __init__(self, model, args, show=None, **kwargs):
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs would share a batch; start one process for each by `accelerate launch`."
            )
        if args.gradient_checkpointing:
            decoder = model.frozen[0]
            if decoder is None or decoder.painter is None:
                raise ValueError("`gradient_checkpointing` is of the decoder, and no loss needs it; leave it out.")
            decoder.painter.enable_gradient_checkpointing()
            args.gradient_checkpointing = args.activation_checkpointing = False
        super().__init__(model, args, **kwargs)
        self.show, self.parts = show, defaultdict(list)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The batches of a step, each with a seed for its random numbers, and whether the decoder's loss is part of it.

        Their captions, with those of all other processes, are the negatives of each.
        """
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        for number, batch in enumerate(batches):
            place = [self.args.seed, self.state.global_step, number]
            # All processes pass through the decoder, or none; but each has noise of its own
            share = np.random.default_rng(place).random()
            batch["with_flow"] = share < self.model.args.flow_matching_share
            own = np.random.SeedSequence([*place, self.accelerator.process_index])
            batch["seed"] = int(own.generate_state(1)[0])
        if batches and "text" in batches[0]:
            sizes = [len(batch["text"]) for batch in batches]
            mine = torch.cat([batch["text"].to(self.args.device) for batch in batches])
            start = len(mine) * self.accelerator.process_index
            every = self.accelerator.gather(mine)
            for batch, size in zip(batches, sizes):
                batch |= {"text": every, "own": torch.arange(start, start + size, device=every.device)}
                start += size
        return batches, count

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        devices = [] if self.args.device.type == "cpu" else [self.args.device]
        with torch.random.fork_rng(devices):
            torch.manual_seed(inputs.pop("seed"))
            outputs = model(**inputs)
        for name, value in outputs.items():
            if name != "loss":
                self.parts[name].append(value)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            means = {f"loss_{name}": torch.stack(values).mean()[None] for name, values in self.parts.items()}
            # The loss itself is that of all processes, too
            logs |= {name: self.accelerator.gather(value).mean().item() for name, value in means.items()}
            self.parts.clear()
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """
        Figures on held-out pairs, by the same random numbers each time.

        Returns:
            The parts of the loss, each under its name. Of the contrastive one all captions are the negatives, and
            `retrieval_accuracy` is the share of the images whose own caption, or an equal one, is the nearest of all
            `pairs`. `flow_gap` is the decoder's loss with another image's conditioning less the one with the own.
        """
        args = self.model.args
        self.model.eval()
        devices = [] if self.args.device.type == "cpu" else [self.args.device]
        with torch.random.fork_rng(devices), self.accelerator.autocast():
            torch.manual_seed(self.args.seed)
            figures = self.measure(self.get_eval_dataloader(eval_dataset))
        self.model.train()
        weights = {"contrastive": args.contrastive_weight, "flow": args.flow_matching_weight}
        weights["regression"] = args.regression_weight
        figures["loss"] = sum(weight * figures[name] for name, weight in weights.items() if weight and name in figures)
        figures = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        self.log(figures)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, figures)
        return figures

    def measure(self, batches) -> dict[str, float]:
        """The figures of `evaluate`, but for the loss; writes the pictures, too."""
        model, args = self.model, self.model.args
        parts, pooled, texts, shown, before = defaultdict(list), [], [], [], None
        for batch in batches:
            batch = self._prepare_inputs(batch)
            condition, size = model.make_condition(batch["codes"]), len(batch["codes"])
            if "text" in batch:
                both = self.accelerator.gather_for_metrics((condition.pooled_prompt_embeds.float(), batch["text"]))
                pooled.append(both[0])
                texts.append(both[1])
            if "prompt_embeds" in batch:
                parts["regression"].append((model.compute_distance(condition, batch["prompt_embeds"]), size))
            if args.flow_matching_weight and "latents" in batch:
                for name, value in self.compare_flow(batch["latents"], condition, before).items():
                    parts[name].append((value, size))
                before = {name: value[-1:] for name, value in condition.items()}
            if sum(len(one.prompt_embeds) for one, _ in shown) < args.num_validation_images:
                shown.append((condition, batch.get("latents")))
        figures = {name: self.average(values) for name, values in sorted(parts.items())}
        if pooled:
            pooled, texts = torch.cat(pooled), torch.cat(texts)
            figures["contrastive"] = contrastive_loss(pooled, texts, args.temperature).item()
            figures |= {"retrieval_accuracy": find_own(pooled, texts).float().mean().item(), "pairs": len(pooled)}
        if self.show and self.is_world_process_zero():
            self.write_sheet(shown)
        return figures

    def average(self, values: list[tuple[torch.Tensor, int]]) -> float:
        """The mean over the pairs of all batches and processes, of means and numbers of pairs."""
        sums = torch.stack([torch.stack([value.double() * size, value.double() * 0 + size]) for value, size in values])
        total, count = self.accelerator.gather(sums.sum(0)[None]).sum(0).tolist()
        return total / count

    def compare_flow(self, latents: torch.Tensor, condition, before: dict | None) -> dict[str, torch.Tensor]:
        """The decoder's loss with the own conditioning, and what another image's adds to it, by the same noise.

        That of the image in front of each, of the first one by `before`, or by the last one of the batch.
        """
        others = {name: value.roll(1, 0) for name, value in condition.items()}
        if before is not None:
            others = {name: torch.cat([before[name], value[:-1]]) for name, value in condition.items()}
        elif len(latents) == 1:
            # Alone, there is no other
            return {"flow": self.model.compute_flow(latents, condition)}
        seed, losses = torch.randint(2**31, ()).item(), []
        for values in (condition, others):
            torch.manual_seed(seed)
            losses.append(self.model.compute_flow(latents, type(condition)(**values)))
        return {"flow": losses[0], "flow_gap": losses[1] - losses[0]}

    def write_sheet(self, shown: list) -> None:
        """Writes the originals and below them the paintings to `validation/step-N.png`."""
        limit = self.model.args.num_validation_images
        pairs = [pair for condition, latents in shown for pair in self.show(condition, latents)][:limit]
        width, height = pairs[0][1].size
        sheet = Image.new("RGB", (width * len(pairs), height * 2))
        for number, images in enumerate(pairs):
            for row, image in enumerate(images):
                if image is not None:
                    sheet.paste(image, (width * number, height * row))
        folder = Path(self.args.output_dir, "validation")
        make_folders(folder)
        with whole_file(folder / f"step-{self.state.global_step:06d}.png") as temporary:
            sheet.save(temporary, format="PNG")


def make_show(decoder, args, seed: int):
    """`show` of a `MapperTrainer`: the originals, as the decoder's VAE gives them back, or `None`, with the paintings.

    It is `None` where no pictures are asked for.
    """

    def show(condition, latents: torch.Tensor | None) -> list[tuple]:
        size = 2 * (args.image_size,)
        if latents is not None:
            size = tuple(side * decoder.pipeline.vae_scale_factor for side in latents.shape[-2:])
        painted = decoder.paint(condition, size, args.validation_steps, seed)
        originals = [None] * len(painted) if latents is None else decoder.decode_latents(latents)
        return list(zip(originals, painted))

    return show if args.num_validation_images else None
