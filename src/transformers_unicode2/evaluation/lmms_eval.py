"""UniCode² as a model of lmms-eval, found by its entry point `lmms_eval.models`; nothing of lmms-eval is changed.

    lmms-eval --model unicode2 --model_args pretrained=org/unicode2-7b --tasks mmstar
    lmms-eval --model unicode2 --model_args pretrained=org/pipeline,mode=draw,output_dir=drawn --tasks wise

In the mode `read`, chats with images are answered in text. In the mode `draw`, the last turn is drawn by an assembled
pipeline; an answer is then lmms-eval's JSON text of `text` and the paths of `images`. Every request is answered alone,
so answers depend neither on `--batch_size` nor on the number of processes.
"""

import json
from pathlib import Path

import numpy as np
import torch
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm

# Of a task's arguments those that `generate` takes
SAMPLING = ("max_new_tokens", "temperature", "top_p", "num_beams", "do_sample")


def manifest() -> ModelManifest:
    return ModelManifest(model_id="unicode2", chat_class_path=f"{__name__}.UniCode2")


class UniCode2(lmms):
    """
    Args:
        pretrained: checkpoint, adapter or assembled pipeline, a folder or Hub name.
        mode: `read` or `draw`.
        output_dir: folder of drawn pictures.
        seed: of drawn pictures; each has one of its own, made of it, its task and its number.
        dtype: of all weights.
        system_prompt: text, or a file of it.
        batch_size, device, max_batch_size: as lmms-eval gives them; requests are answered alone.

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
        batch_size: int = 1,
        device: str | None = None,
        max_batch_size: int | None = None,
    ):
        from accelerate import PartialState

        super().__init__()
        if mode not in ("read", "draw"):
            raise ValueError(f"`mode` is {mode}; it must be read or draw.")
        self.mode, self.folder, self.seed = mode, Path(output_dir), int(seed)
        self.system_prompt = self._resolve_system_prompt(system_prompt)
        state = PartialState()
        self._rank, self._world_size, self.accelerator = state.process_index, state.num_processes, state
        self.place = torch.device(device) if device and state.num_processes == 1 else state.device
        self.load(pretrained, dtype)

    def load(self, pretrained: str, dtype: str) -> None:
        from ..checkpoints import load_model

        if self.mode == "draw":
            from diffusers import DiffusionPipeline

            import transformers_unicode2.diffusion.registration  # noqa: F401

            options = {} if dtype == "auto" else {"dtype": getattr(torch, dtype)}
            self.pipe = DiffusionPipeline.from_pretrained(pretrained, **options).to(self.place)
            self.pipe.set_progress_bar_config(disable=True)
            self.model, self.processor = self.pipe.vision_language_encoder, self.pipe.processor
        else:
            self.model, self.processor = load_model(pretrained)
            self.model.to(self.place).eval()

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
        answers = []
        for request in tqdm(requests, desc="answering", unit="request", disable=self.rank > 0):
            context, to_messages, given, number, task, split = request.args
            messages = ChatMessages(messages=to_messages(self.task_dict[task][split][number])).to_hf_messages()
            messages = self._apply_system_prompt(messages, self.system_prompt)
            if self.mode == "draw":
                answer = self.draw(messages, task, number)
            else:
                answer = self.answer(messages, dict(given))
            self.cache_hook.add_partial("generate_until", (context, given), answer)
            answers.append(answer)
        return answers

    @torch.no_grad()
    def answer(self, messages: list[dict], given: dict) -> str:
        """The answer to a chat, up to the first of the texts in `until`."""
        until = given.pop("until", None) or []
        options = {name: given[name] for name in SAMPLING if given.get(name) is not None}
        options.setdefault("do_sample", bool(options.get("temperature")))
        if not options["do_sample"]:
            options = {name: value for name, value in options.items() if name not in ("temperature", "top_p")}
        inputs = self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self.place)
        written = self.model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
        text = self.processor.decode(written, skip_special_tokens=True)
        for end in [until] if isinstance(until, str) else until:
            text = text.split(end)[0] if end else text
        return text.strip()

    def draw(self, messages: list[dict], task: str, number: int) -> str:
        """Draws what the last turn asks for."""
        texts = [part["text"] for part in messages[-1]["content"] if part["type"] == "text"]
        seed = np.random.SeedSequence([self.seed, *task.encode(), number]).generate_state(1).item()
        image = self.pipe(" ".join(texts).strip(), generator=torch.Generator().manual_seed(seed)).images[0]
        file = self.folder / task / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file)
        return json.dumps({"text": "", "images": [str(file)]})
