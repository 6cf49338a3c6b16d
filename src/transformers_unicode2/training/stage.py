"""One stage of training in one folder, by one run at a time.

It resumes from its newest whole checkpoint, and its result is whole or absent.
"""

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import MISSING, asdict, fields
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import get_args, get_origin, get_type_hints

import torch
import yaml
from accelerate import PartialState
from transformers import Trainer
from transformers.integrations import get_reporting_integration_callbacks
from trl import TrlParser

from ..checkpoints import check_no_adapter
from ..files import WORK, explained, remove, whole_folder
from ..images_unicode2 import one_line
from ..processes import agree, expected_peers, follow_launcher
from ..record import Record, hash_file, hash_source, read_record
from ..tokens import find_tables, hash_table
from .checkpointing import WholeCheckpoints, discard, find_last_checkpoint, has_optimizer, is_whole, list_checkpoints
from .optimizer import PartRates

# `TrainingArguments` that do not change what is learnt: where and how it runs, what is logged, evaluated and kept.
FREE_PREFIXES = tuple("logging_ log_ eval_ hub_ trackio_ save_ ddp_ fsdp activation_ gradient_checkpointing".split())
FREE = frozenset(
    """output_dir report_to run_name project disable_tqdm skip_memory_metrics debug do_train do_eval do_predict
    push_to_hub enable_jit_checkpoint include_num_input_tokens_seen include_for_metrics use_cpu prediction_loss_only
    per_device_eval_batch_size batch_eval_metrics bf16_full_eval fp16_full_eval dataloader_num_workers
    dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context
    local_rank deepspeed parallelism_config torch_empty_cache_steps resume_from_checkpoint
    restore_callback_states_from_checkpoint ignore_data_skip remove_unused_columns dataset_num_proc
    trust_remote_code cache_dir num_validation_images validation_steps decoder_offload""".split()
)
# Types of options, as a reader of YAML calls them
WORDS = {
    str: "a text",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "names and values, {name: value}",
    NoneType: "null",
}
# A stage may be continued to more of them
LENGTH = ("max_steps", "num_train_epochs")
RESULT = ("*.safetensors", "*.json", "*.jinja", "*.bin", "*_unicode2.py", "README.md")
PASSING = ("checkpoint-*",)


class StageTrainer(PartRates, WholeCheckpoints, Trainer):
    """The `Trainer` of stages whose model computes the loss, and whose collator makes its inputs of rows.

    Raises:
        `ValueError`: on options that such a loss does not follow.
    """

    def __init__(self, model, args, **kwargs):
        unfollowed = (
            "label_smoothing_factor",
            "neftune_noise_alpha",
            "gradient_checkpointing",
            "activation_checkpointing",
        )
        for name in unfollowed:
            if getattr(args, name):
                raise ValueError(
                    f"`{name}` is {getattr(args, name)}; the model of this stage does not follow it, so leave it out."
                )
        # The collator knows which columns are used, the model does not
        args.remove_unused_columns = False
        super().__init__(model, args, **kwargs)


class Stage:
    """A stage that is held, see `stage`.

    Attributes:
        finished (`bool`): its result is there, nothing is left to do.
    """

    def __init__(self, training_args, made_of: dict, defaults: dict):
        self.folder, self.args, self.finished = Path(training_args.output_dir), training_args, False
        self.made_of, self.defaults = made_of, defaults

    def enter(self, stack: ExitStack, result: tuple[str, ...]) -> bool:
        known, last = read_record(self.folder), find_last_checkpoint(self.folder)
        # A checkpoint that was copied here says what it is made of
        if known is None and last is not None:
            made_of = read_record(last)["made_of"]
            Record(self.folder, made_of, RESULT + result).write(finished=False)
        record = Record(
            self.folder,
            self.made_of,
            RESULT + result,
            option="output_dir",
            free=LENGTH,
            passing=PASSING,
            defaults=self.defaults,
        )
        finished = stack.enter_context(record.making())
        if finished:
            print(f"{self.folder} is finished; nothing to do")
        return finished

    def choose_checkpoint(self) -> str | None:
        """The checkpoint to resume from; those that are not whole are removed.

        Raises `ValueError` when it is of something else, or beyond the end.
        """
        last = find_last_checkpoint(self.folder)
        for checkpoint in list_checkpoints(self.folder):
            if not (checkpoint / WORK).is_dir() and any(checkpoint.iterdir()):
                raise ValueError(f"{checkpoint} was not written by this stage; move it out of {self.folder}.")
            if not is_whole(checkpoint):
                print(f"{checkpoint} is not whole; it is removed, and the stage resumes from {last or 'the start'}.")
                discard(checkpoint)
            elif not has_optimizer(checkpoint):
                print(
                    f"{checkpoint} has no optimizer (`save_only_model`); the stage resumes from {last or 'the start'}."
                )
        if last is not None:
            settings = {"option": "output_dir", "free": LENGTH, "defaults": self.defaults}
            # It may have been copied here from another stage
            Record(last, self.made_of, **settings).check()
            state = json.loads((Path(last) / "trainer_state.json").read_text())
            steps, epochs = self.args.max_steps, self.args.num_train_epochs
            if state["global_step"] > steps > 0 or steps <= 0 and (state["epoch"] or 0) > epochs:
                length = f"`max_steps` is {steps}" if steps > 0 else f"`num_train_epochs` is {epochs:g}"
                raise ValueError(
                    f"{last} is at step {state['global_step']} and {length}; choose another output_dir, or remove the "
                    "checkpoint."
                )
            print(f"{self.folder} resumes from {Path(last).name}")
        return last

    def train(self, trainer: WholeCheckpoints) -> None:
        """Trains, and resumes from the newest whole checkpoint if there is one."""
        trainer.made_of = self.made_of
        last = agree(self.choose_checkpoint)
        if last is not None and not Path(last).is_dir():
            raise ValueError(f"{last} is not on the disk of this node; give an output_dir that all nodes share.")
        trainer.train(resume_from_checkpoint=last)
        check_finite(trainer.model, self.folder)

    @contextmanager
    def result(self) -> Iterator[Path]:
        """Yields an empty folder for the result to all processes; the first one then moves its content to the stage."""
        state = PartialState()
        with whole_folder(self.folder) if state.is_main_process else nullcontext(self.folder / WORK / "new") as new:
            state.wait_for_everyone()
            yield new
            state.wait_for_everyone()
            if state.is_main_process:
                # A pickle with the paths of a machine
                remove(new / "training_args.bin")
                if not any(new.rglob("*.safetensors")):
                    raise ValueError(
                        f"No weights of {self.folder} were saved; with FSDP set `fsdp_state_dict_type: "
                        "FULL_STATE_DICT`, with DeepSpeed `zero3_save_16bit_model: true`, and run the stage again."
                    )


@contextmanager
def stage(
    command: str,
    args,
    training_args,
    hash_inputs: Callable[[], dict],
    result: tuple[str, ...] = (),
    evaluates: bool = False,
) -> Iterator[Stage]:
    """Holds the output folder of a stage for this run, whose processes count as one. If the body ends well, its result
    is there.

    A stage may be started again with a larger `max_steps` or `num_train_epochs`. It then resumes from its last
    checkpoint, with the learning rate that the longer schedule has there. It may also change what `FREE` names.
    Everything else is compared. Checkpoints and data are compared by their content, which is read once for that.

    Args:
        command: name of the stage's module.
        args: dataclass of its own arguments.
        training_args: `TrainingArguments`.
        hash_inputs: gives digests of what some of the arguments name, by their names.
        result: globs of what the stage writes beside checkpoints and the files of a model.
        evaluates: whether the stage has data to evaluate on.

    Raises:
        `ValueError`: when another run holds the folder, or it was begun with something else.
    """
    check_training_arguments(training_args, evaluates)

    def describe() -> dict:
        own = {name: value for name, value in asdict(args).items() if is_compared(name)}
        return {"command": command, **own, **read_settings(training_args), **hash_inputs()}

    with explained(training_args.output_dir), ExitStack() as stack:
        defaults = {**read_defaults(type(training_args)), **read_defaults(type(args))}
        held = Stage(training_args, agree(describe), defaults)
        held.finished = agree(lambda: held.enter(stack, result))
        yield held


def hash_inputs(
    args,
    images: tuple[str, ...] = (),
    tokens: tuple[str, ...] = (),
    checkpoints: tuple[str, ...] = (),
    pipelines: tuple[str, ...] = (),
) -> dict:
    """Digests of what the arguments of a stage name, by the names of the arguments that are given.

    Args:
        args: dataclass of arguments.
        images: arguments that name a folder of parquet files with images.
        tokens: arguments that name a folder of parquet files with codes.
        checkpoints: arguments that name a checkpoint by folder or Hub name.
        pipelines: the same of checkpoints with parts in subfolders.
    """
    kinds = ((images, hash_table), (tokens, hash_file))
    digests = {
        name: {file.name: hash_one(file) for file in find_tables(getattr(args, name), "train", f"`{name}`")}
        for names, hash_one in kinds
        for name in names
    }
    for name in (*checkpoints, *pipelines):
        if getattr(args, name):
            check_no_adapter(getattr(args, name))
            digests[name] = hash_source(getattr(args, name), deep=name in pipelines)
    return digests


def read_settings(training_args) -> dict:
    """The training arguments that what is learnt depends on, as JSON has them, with the number of processes."""
    names = [field.name for field in fields(training_args)]
    settings = {name: getattr(training_args, name) for name in names if is_compared(name)}
    return {**settings, "num_processes": training_args.world_size}


def check_finite(model: torch.nn.Module, folder: Path) -> None:
    """Raises `ValueError` when weights that have learnt are not finite, so that they are no result."""
    learnt = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    # Of weights that processes share, each looks at its part
    parts = {name: getattr(weight, "to_local", lambda weight=weight: weight)() for name, weight in learnt.items()}
    wrong = [name for name, part in parts.items() if not torch.isfinite(part).all()]
    if wrong:
        raise ValueError(
            f"{len(wrong)} of {len(learnt)} weights that have learnt are not finite, the first is {wrong[0]}: the "
            f"training diverged. Lower the learning rate, and start anew with another output_dir than {folder}."
        )


def read_defaults(kind: type) -> dict:
    """Defaults of a dataclass, which a record of an earlier version of it may lack."""
    made = {field.name: field.default_factory() for field in fields(kind) if field.default_factory is not MISSING}
    return made | {field.name: field.default for field in fields(kind) if field.default is not MISSING}


def is_compared(name: str) -> bool:
    return name not in FREE and not name.startswith(FREE_PREFIXES)


def check_training_arguments(training_args, evaluates: bool) -> None:
    """Raises `ValueError` on what no stage follows, and on evaluation by one that has no data for it."""
    refused = {
        "push_to_hub": "upload output_dir once the stage is finished, for example by `hf upload`",
        "resume_from_checkpoint": "a stage finds its newest whole checkpoint by itself",
        "use_liger_kernel": "there are no Liger kernels for these models",
        "do_predict": "a stage only trains; its trainer can predict",
    }
    if not evaluates:
        refused["do_eval"] = "this stage only trains"
    if Path(training_args.output_dir) == Path("trainer_output"):
        # What they write to if nothing is named
        raise ValueError("`output_dir` is not given; name the folder of this stage.")
    for name, instead in refused.items():
        if getattr(training_args, name):
            raise ValueError(f"`{name}` is not followed: {instead}.")
    try:
        for make_callback in get_reporting_integration_callbacks(training_args.report_to):
            make_callback()
    except (RuntimeError, ImportError) as error:
        raise ValueError(f"`report_to` is {', '.join(training_args.report_to)}: {error}") from error


def check_types(args) -> None:
    """Raises `ValueError` on a value of a recipe that is of another type than its option. YAML converts nothing.

    Args:
        args: dataclass of the arguments of a stage.
    """
    # Not those of the fields, which parsers change
    for name, annotation in get_type_hints(type(args)).items():
        kinds = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
        value, kinds = getattr(args, name), [get_origin(kind) or kind for kind in kinds]
        fits = isinstance(value, (*kinds, int) if float in kinds else tuple(kinds))
        if not fits or (isinstance(value, bool) and bool not in kinds):
            expected = " or ".join(WORDS[kind] for kind in kinds)
            raise ValueError(f"`{name}` is {value!r}; it must be {expected}.")


def run(main: Callable, *classes: type) -> None:
    """Runs a stage as a command: reads the recipe and options, and says what is wrong in one sentence."""
    from ..cli import sentences

    follow_launcher()
    # The configurations of TRL set it themselves, by the name that Transformers calls old
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)
    # Else a wrong option would print all of them
    parser = RecipeParser(classes, usage="%(prog)s --config RECIPE.yaml [--OPTION VALUE ...]")
    if not torch.accelerator.is_available() and os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
        # Else the training arguments refuse a machine without one; with it, Accelerate passes DeepSpeed over
        parser.set_defaults(use_cpu=True)
    with sentences(Path(sys.argv[0]).stem):
        # The training arguments look for peers
        with expected_peers():
            parsed = parser.parse_recipe()
        check_types(parsed[0])
        check_not_alone()
        main(*parsed)
        # Threads of a group that is still there end the process as if it had failed
        PartialState().wait_for_everyone()
        PartialState().destroy_process_group()


class RecipeParser(TrlParser):
    """The parser of TRL, with a sentence about a recipe that is no YAML, or has an option that no stage has."""

    def parse_recipe(self) -> tuple:
        try:
            return self.parse_args_and_config()
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"The recipe is no YAML: {one_line(str(error))}.") from error

    def set_defaults_with_config(self, **kwargs) -> list[str]:
        unknown = super().set_defaults_with_config(**kwargs)
        if unknown:
            name = unknown[0].removeprefix("--")
            near = get_close_matches(name, [action.dest for action in self._actions], 1)
            instead = f"; did you mean `{near[0]}`?" if near else "; `--help` lists those that it has."
            raise ValueError(f"The recipe has `{name}`, which is no option of this stage{instead}")
        return unknown


def check_not_alone() -> None:
    """Raises `ValueError` when a launcher started several processes and each of them takes itself for the only one.

    Accelerate does so with `deepspeed` in a recipe on CPUs. They would then write into one folder at once.
    """
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started > 1 and "LOCAL_RANK" in os.environ and PartialState().num_processes == 1:
        raise ValueError(
            f"{started} processes were started, and each of them would train alone. With DeepSpeed, leave `deepspeed` "
            "out of the recipe and start by `accelerate launch` with a configuration that names it."
        )
