"""Checkpoints of a `Trainer` that are whole or absent, and runs that resume from the newest."""

import os
from contextlib import suppress
from pathlib import Path

import torch
from transformers.trainer_callback import ProgressCallback

from ..files import WORK, explained, remove, settle
from ..record import Record, find_changed, read_record


class ResumedProgress(ProgressCallback):
    """The progress bar of a run: from the step that it resumes from, so that the time left is that of this run."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.current_step = state.global_step
        if state.is_world_process_zero:
            self.training_bar.initial = self.training_bar.n = self.training_bar.last_print_n = state.global_step
            self.training_bar.refresh()

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        bar = self.prediction_bar
        if bar is not None and bar.total is not None and bar.n >= bar.total:
            # The same evaluation goes on, with the images of other rows
            bar.total += len(eval_dataloader)
        super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)


class WholeCheckpoints:
    """Mixin of a `Trainer` whose checkpoints are whole or absent.

    A checkpoint is written to a hidden folder, and takes its name and place once all of it is there. Its own
    `.unicode2/record.json` says what it is made of and how large its files are. Only then older ones are removed.
    """

    made_of: dict = {}
    hidden: str | None = None

    def _get_output_dir(self, trial):
        return self.hidden or super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial):
        place, name = Path(self._get_output_dir(trial)), f"checkpoint-{self.state.global_step}"
        new = place / WORK / "checkpoints"
        try:
            with explained(place):
                if self.args.should_save:
                    # Of a run that was killed
                    remove(new)
                self.accelerator.wait_for_everyone()
                self.hidden = str(new)
                super()._save_checkpoint(model, trial)
                self.name_best(new / name, place / name)
                self.accelerator.wait_for_everyone()
                # Where nodes share no disk, the first process of each has the random states of its own node
                for writes in (self.args.should_save, self.args.local_process_index == 0):
                    if writes and (new / name).is_dir():
                        self.put_in_place(new / name, place / name)
                    self.accelerator.wait_for_everyone()
        finally:
            self.hidden = None
            if self.args.should_save:
                remove(new)
                # A stage keeps its record there
                with suppress(OSError):
                    new.parent.rmdir()
        if self.args.should_save:
            self.rotate(place)

    def rotate(self, place: Path) -> None:
        """Removes the oldest checkpoints beyond `save_total_limit`, but neither the newest nor the best one."""
        limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
        found = list_checkpoints(place)
        if limit is None or limit <= 0 or not found:
            return
        kept = {found[0], *([Path(best)] if best else [])}
        surplus = len(found) - max(limit, len(kept))
        for checkpoint in [path for path in reversed(found) if path not in kept][: max(0, surplus)]:
            discard(checkpoint)

    def name_best(self, new: Path, final: Path) -> None:
        """Notes where the best checkpoint will be, if it is the one that has been written."""
        if self.state.best_model_checkpoint == str(new):
            self.state.best_model_checkpoint = str(final)
            if self.args.should_save:
                self.state.save_to_json(new / "trainer_state.json")

    def put_in_place(self, new: Path, final: Path) -> None:
        Record(new, self.made_of).write(finished=True)
        for file in new.rglob("*"):
            if file.is_file():
                settle(file)
        discard(final)
        new.rename(final)

    def _run_epoch(self, *args, **kwargs):
        # A run that was killed after its last step would take one more
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint):
        """The learning rate becomes that of this schedule, which may be longer than the one of the checkpoint."""
        super()._load_optimizer_and_scheduler(checkpoint)
        schedule = self.lr_scheduler
        if checkpoint is not None and isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
            rates = [rate * at(schedule.last_epoch) for rate, at in zip(schedule.base_lrs, schedule.lr_lambdas)]
            for group, rate in zip(schedule.optimizer.param_groups, rates):
                group["lr"] = rate
            schedule._last_lr = rates

    def _issue_warnings_after_load(self, load_result):
        """Stock, but for weights that the checkpoint holds under the name that they are tied to."""
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        missing = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As of `Trainer`; `resume_from_checkpoint=True` takes the newest whole checkpoint.

        Raises `ValueError` when there is none, and when DeepSpeed or FSDP was asked for and is not in use.
        """
        check_sharding(self.accelerator, self.args)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = find_last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"{self.args.output_dir} has no whole checkpoint to resume from.")
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(ResumedProgress)
        return super().train(resume_from_checkpoint, *args, **kwargs)


def check_sharding(accelerator, args) -> None:
    """Raises `ValueError` when several processes were to share a model, and Accelerate gives each the whole of it.

    That is what it does on CPUs, without a word.
    """
    if accelerator.num_processes == 1:
        return
    asked = {"DEEPSPEED": args.deepspeed, "FSDP": args.fsdp}
    instead = {
        "DEEPSPEED": "start by `accelerate launch` with DeepSpeed in its configuration, `use_cpu: false` and "
        "`ddp_backend: gloo`",
        "FSDP": "use DeepSpeed, or leave FSDP out",
    }
    for kind, option in asked.items():
        wanted = option or os.environ.get(f"ACCELERATE_USE_{kind}", "false").lower() == "true"
        if wanted and accelerator.distributed_type.value != kind:
            name = kind.replace("DEEPSPEED", "DeepSpeed")
            raise ValueError(
                f"{name} is asked for, and Accelerate passes it over on {accelerator.device.type.upper()}: each of "
                f"{accelerator.num_processes} processes would hold the whole model; {instead[kind]}."
            )


def list_checkpoints(folder: str | Path) -> list[Path]:
    """`checkpoint-N` folders, the newest first; none where there is no such folder."""
    found = [path for path in Path(folder).glob("checkpoint-*") if path.is_dir() and path.name[11:].isdecimal()]
    return sorted(found, key=lambda path: int(path.name[11:]), reverse=True)


def discard(checkpoint: Path) -> None:
    """Removes a checkpoint, if it is there. A run that is killed meanwhile leaves no part of it under its name."""
    if checkpoint.exists():
        old = checkpoint.parent / WORK / "old"
        remove(old)
        old.parent.mkdir(exist_ok=True)
        checkpoint.rename(old)
        remove(old)
        # A stage keeps its record there
        with suppress(OSError):
            old.parent.rmdir()


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint is there as it was written."""
    try:
        record = read_record(checkpoint)
    except ValueError:
        return False
    return record is not None and record["finished"] and not find_changed(checkpoint, record["files"])


def find_last_checkpoint(folder: str | Path) -> str | None:
    """The newest whole checkpoint that a run can resume from; `None` when there is none, or not even a folder."""
    whole = (str(path) for path in list_checkpoints(folder) if is_whole(path) and has_optimizer(path))
    return next(whole, None)


def has_optimizer(checkpoint: Path) -> bool:
    """Whether a checkpoint is more than the weights that `save_only_model` keeps."""
    # Random states are beside those of the optimizer
    return any(checkpoint.glob("rng_state*.pth"))
