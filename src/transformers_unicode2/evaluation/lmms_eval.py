"""UniCode² as a model of lmms-eval, found by its entry point `lmms_eval.models`; nothing of lmms-eval is changed.

    lmms-eval --model unicode2 --model_args pretrained=org/unicode2-7b --tasks mmstar
    lmms-eval --model unicode2 --model_args pretrained=org/pipeline,mode=draw,output_dir=drawn --tasks WISE

In the mode `read`, chats with images are answered in text. In the mode `draw`, a text is drawn by an assembled
pipeline; an answer is then lmms-eval's JSON text of `text` and the paths of `images`. Every request is answered alone,
so answers depend neither on `--batch_size` nor on the number of processes.

With `answers`, each answer is kept in that folder as soon as it is there, under what was asked, its pictures and the
digest of the checkpoint. lmms-eval's own cache knows neither the weights nor the pictures, and is written at the end.
"""

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages
from PIL import Image
from tqdm import tqdm

from .score_card import describe_subject

# Of a task's arguments those that `generate` takes
SAMPLING = ("max_new_tokens", "temperature", "top_p", "num_beams", "do_sample")
# Of a task that sets no length, as other models of lmms-eval have it
MAX_NEW_TOKENS = 1024


def manifest() -> ModelManifest:
    return ModelManifest(model_id="unicode2", chat_class_path=f"{__name__}.UniCode2")


class UniCode2(lmms):
    """
    Args:
        pretrained: checkpoint, adapter or assembled pipeline, a folder or Hub name.
        mode: `read` or `draw`.
        output_dir: folder of drawn pictures.
        seed: of drawn pictures; each has one of its own, made of it, its task and its number.
        dtype: of all weights but the codebook's and the encoder's; `auto` is that of the checkpoint.
        system_prompt: text, or a file of it.
        answers: folder to keep answers in, by any number of processes.
        batch_size, device, max_batch_size: as lmms-eval gives them; requests are answered alone.

    Attributes:
        asked (`dict[str, dict[int, str]]`): digest of each request without the checkpoint, by task and number.
        dtype (`torch.dtype`): of the language model.

    Raises:
        `ValueError`: on another mode.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        mode: str = "read",
        output_dir: str = "outputs/lmms_eval",
        seed: int = 0,
        dtype: str = "auto",
        system_prompt: str = "",
        answers: str = "",
        batch_size: int = 1,
        device: str | None = None,
        max_batch_size: int | None = None,
    ):
        from accelerate import Accelerator

        super().__init__()
        if mode not in ("read", "draw"):
            raise ValueError(f"`mode` is {mode}; it must be read or draw.")
        self.mode, self.seed, self.asked = mode, int(seed), {}
        self.system_prompt = self._resolve_system_prompt(system_prompt)
        # lmms-eval gathers by it
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        alone = device and self._world_size == 1
        self._device = torch.device(device) if alone else self.accelerator.device
        self.load(pretrained, dtype)
        self.checkpoint = f"{describe_subject(pretrained, deep=mode == 'draw')} {dtype}"
        # Pictures of another checkpoint stay where its answers name them
        digest = hashlib.sha256(f"{self.checkpoint} {self.seed}".encode()).hexdigest()
        self.folder = Path(output_dir) / digest[:12]
        self.known = KeptAnswers(Path(answers), self._rank) if answers else {}

    def load(self, pretrained: str, dtype: str) -> None:
        from ..checkpoints import load_model

        if dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"`dtype` is {dtype}; it must be auto, float32, bfloat16 or float16.")
        kind = None if dtype == "auto" else getattr(torch, dtype)
        if self.mode == "draw":
            from diffusers import DiffusionPipeline

            import transformers_unicode2.diffusion.registration  # noqa: F401

            options = {} if kind is None else {"dtype": kind}
            self.pipe = DiffusionPipeline.from_pretrained(pretrained, **options).to(self.device)
            self.pipe.set_progress_bar_config(disable=True)
            self.model, self.processor = self.pipe.vision_language_encoder, self.pipe.processor
        else:
            self.model, self.processor = load_model(pretrained, dtype=kind or "auto")
            self.model.to(self.device).eval()
        # Kept for a card, since lmms-eval frees the model
        self.dtype = self.model.dtype

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size

    def loglikelihood(self, requests):
        raise NotImplementedError("UniCode² answers in text; take tasks of the type generate_until.")

    def generate_until_multi_round(self, requests):
        raise NotImplementedError("UniCode² answers one round; take tasks of the type generate_until.")

    def generate_until(self, requests) -> list[str]:
        """The answers to requests of lmms-eval, in their order."""
        answers, times = [], Counter()
        for request in tqdm(requests, desc="answering", unit="request", disable=self.rank > 0):
            _, to_messages, given, number, task, split = request.args
            messages = ChatMessages(messages=to_messages(self.task_dict[task][split][number])).to_hf_messages()
            messages = self._apply_system_prompt(messages, self.system_prompt)
            asked = hash_request([messages, choose_options(given), self.mode])
            self.asked.setdefault(task, {})[number] = asked
            # A task may ask the same several times, and take samples
            times[asked] += 1
            key = hash_request([self.checkpoint, asked, task, number, times[asked]])
            if key not in self.known:
                torch.manual_seed(np.random.SeedSequence([self.seed, int(key, 16)]).generate_state(1).item())
                draws = self.mode == "draw"
                answer = self.draw(messages, task, number) if draws else self.answer(messages, choose_options(given))
                self.known[key] = answer
            answers.append(self.known[key])
        return answers

    @torch.no_grad()
    def answer(self, messages: list[dict], options: dict) -> str:
        """The answer to a chat, up to the first of the texts in `until`."""
        until = options.pop("until")
        inputs = self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self.device)
        written = self.model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
        text = self.processor.decode(written, skip_special_tokens=True)
        for end in until:
            text = text.split(end)[0] if end else text
        return text.strip()

    def draw(self, messages: list[dict], task: str, number: int) -> str:
        """Draws a text. Raises `ValueError` on a request with pictures or earlier turns, which would be ignored."""
        parts = [part for message in messages for part in message["content"]]
        pictures, turns = sum(part["type"] != "text" for part in parts), len(messages)
        if pictures or turns > 1:
            raise ValueError(
                f"{task}, request {number} has {turns} turns and {pictures} pictures; the mode draw takes one text. "
                "Leave out a system prompt, and take tasks that draw from texts alone."
            )
        texts = [part["text"] for part in parts]
        seed = np.random.SeedSequence([self.seed, *task.encode(), number]).generate_state(1).item()
        image = self.pipe(" ".join(texts).strip(), generator=torch.Generator().manual_seed(seed)).images[0]
        file = self.folder / task / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file)
        return json.dumps({"text": "", "images": [str(file)]})


def choose_options(given: dict) -> dict:
    """Arguments of `generate`, and the list `until`, of what a task sets."""
    options = {name: given[name] for name in SAMPLING if given.get(name) is not None}
    options.setdefault("max_new_tokens", MAX_NEW_TOKENS)
    options.setdefault("do_sample", bool(options.get("temperature")))
    if not options["do_sample"]:
        options = {name: value for name, value in options.items() if name not in ("temperature", "top_p")}
    until = given.get("until") or []
    return {**options, "until": [until] if isinstance(until, str) else list(until)}


def hash_request(content) -> str:
    """SHA-256 of what JSON can hold, and of pictures by their pixels."""

    def hash_picture(value) -> str:
        if isinstance(value, Image.Image):
            return hashlib.sha256(f"{value.mode} {value.size}".encode() + value.tobytes()).hexdigest()
        return str(value)

    return hashlib.sha256(json.dumps(content, sort_keys=True, default=hash_picture).encode()).hexdigest()


class KeptAnswers(dict):
    """Answers by their keys, which a folder keeps: one line of JSON each, in a file of each process.

    A line that a kill cut off is passed over.
    """

    def __init__(self, folder: Path, rank: int):
        super().__init__()
        folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(folder.glob("*.jsonl")):
            for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    one = json.loads(line)
                    super().__setitem__(one["key"], one["answer"])
                except (ValueError, KeyError, TypeError):
                    continue
        self.file = open(folder / f"{rank:05d}.jsonl", "a", encoding="utf-8")
        # Ends what a kill cut off
        self.file.write("\n")

    def __setitem__(self, key: str, answer: str) -> None:
        super().__setitem__(key, answer)
        self.file.write(json.dumps({"key": key, "answer": answer}) + "\n")
        self.file.flush()
