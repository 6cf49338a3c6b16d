"""Language models that a checkpoint can be made of, their tokens, and their weights under the names of UniCode².

A language model is taken as Transformers builds it: an embedding, layers and a norm under `model`, and a head without a
bias, `lm_head`. The image tokens that its tokenizer lacks are added. Their rows are those that pad the embedding, or
new ones behind the others. Text scores of all ids of before stay exactly as they are.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ..checkpoints import find_safetensors
from ..processing_unicode2 import read_chat_template
from .chat_templates import teach_template

# Names of placeholder, begin and end of an image, as Qwen and Gemma have them. Others get the first.
IMAGE_TOKENS = (
    ("<|image_pad|>", "<|vision_start|>", "<|vision_end|>"),
    ("<image_soft_token>", "<start_of_image>", "<end_of_image>"),
)
# Settings of what a head does beside its product. Only the bound of Gemma 2 is part of UniCode².
OTHER_HEADS = ("logit_scale", "logits_scaling", "lm_head_multiplier", "logits_soft_cap", "unpadded_vocab_size")
# Settings that count the experts of a mixture.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
CHAT_TEMPLATES = ("own", "chatml")
# What the settings of a tokenizer say of the lengths of texts.
LENGTHS = ("max_length", "stride", "truncation_strategy", "pad_to_multiple_of")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Settings of generation that say which texts are possible.
CONSTRAINTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias", "no_repeat_ngram_size")
# Those that choose one.
SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
SAMPLING += ("repetition_penalty", "num_beams", "length_penalty", "penalty_alpha", "stop_strings")
# Numbers that old files hold, and that Transformers computes from the configuration.
COMPUTED = "rotary_emb.inv_freq"
# Numbers in no file that are right again after loading, as names end. The `weights` are positions of XGLM.
BUFFERS = ("inv_freq", "embed_scale", ".weights")


def load_text_config(llm: str):
    """The configuration of a language model.

    Raises `ValueError`, with the name of its family, on a model that cannot be a part of UniCode².
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import find_adapter_config_file

    try:
        is_adapter = find_adapter_config_file(llm) is not None
        config = None if is_adapter else AutoConfig.from_pretrained(llm)
    except (OSError, ValueError) as error:
        raise ValueError(f"--llm {llm} has no configuration that can be read: {first_line(error)}") from error
    if is_adapter:
        raise ValueError(f"--llm {llm} is an adapter; merge it into its language model with PEFT, and give that.")
    what, models = f"{llm} is a {config.model_type} model", AutoModelForCausalLM._model_mapping
    if type(config) not in models:
        raise ValueError(f"{what}; --llm must be a causal language model.")
    prefix = models[type(config)].base_model_prefix
    if prefix != "model":
        raise ValueError(f"{what}, whose weights begin with {prefix!r}, not with 'model'.")
    if config.is_encoder_decoder or config.get_text_config() is not config:
        raise ValueError(f"{what}, which has more than one part; --llm must be a language model alone.")
    settings = config.to_dict()
    if settings.get("quantization_config"):
        raise ValueError(f"{what} whose weights are quantized; give the one that it was made of, in 16 or 32 bits.")
    experts = next((name for name in EXPERTS if settings.get(name)), None)
    if experts:
        raise ValueError(f"{what}, a mixture of {settings[experts]} experts; UniCode² has no loss for their router.")
    if settings.get("hidden_size_per_layer_input"):
        raise ValueError(f"{what}, each of whose layers reads token ids, which the codes of an image do not have.")
    other = next((name for name in OTHER_HEADS if settings.get(name) not in (None, 1)), None)
    if other:
        raise ValueError(f"{what}, whose head changes its scores by `{other}`; UniCode² would not keep them.")
    check_build(what, config)
    return config


def check_build(what: str, config) -> None:
    """Raises `ValueError` unless a model, called `what`, has `model.embed_tokens`, a plain `lm_head` and no more."""
    from transformers import AutoModel, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            whole, base = AutoModelForCausalLM.from_config(config), AutoModel.from_config(config)
    except Exception as error:
        # What the code of a family raises of a configuration can be anything.
        raise ValueError(f"{what} that Transformers cannot build: {first_line(error)}") from error
    parts = [name for name, _ in whole.named_children()]
    if sorted(parts) != ["lm_head", "model"] or type(whole.model) is not type(base):
        raise ValueError(f"{what} of {', '.join(parts)}; it must be a `model` and an `lm_head`.")
    if find_last_norm(whole.model) is None:
        raise ValueError(f"{what}; it must end in a norm.")
    names = set(whole.state_dict())
    if EMBEDDING not in names or {name for name in names if name.startswith("lm_head.")} != {HEAD}:
        raise ValueError(f"{what}; it must have `embed_tokens`, and a head without a bias.")
    lost = [name for name, _ in whole.named_buffers() if name not in names and not name.endswith(BUFFERS)]
    if lost:
        raise ValueError(f"{what} with {lost[0]}, which no file of weights holds; UniCode² would lose it.")


def find_last_norm(model) -> str | None:
    """Name of the norm behind the layers of a language model, which most families call `norm`."""
    return next((name for name, _ in reversed(list(model.named_children())) if "norm" in name), None)


def settle_config(llm: str, config) -> None:
    """Changes a configuration where the weights say otherwise, as loading with Transformers does.

    A head of its own in the files is kept, though the configuration ties it. Without a dtype, that of the embedding
    counts. Reads names, and of the weights no more than an embedding and a head beside it.

    Raises:
        `ValueError`: when the files lack the embedding, or a head that is not tied, or rows are not finite.
    """
    files = {}
    for file in find_safetensors(llm):
        with safe_open(file, framework="pt") as tensors:
            files |= dict.fromkeys(tensors.keys(), file)
    if EMBEDDING not in files:
        raise ValueError(f"The weights of {llm} lack {EMBEDDING}.")
    if not config.tie_word_embeddings and HEAD not in files:
        raise ValueError(
            f"The weights of {llm} lack {HEAD}, and `tie_word_embeddings` in config.json is false; set it to true if "
            "the embedding is the head, too."
        )
    found = {}
    for name in (name for name in (EMBEDDING, HEAD) if name in files):
        with safe_open(files[name], framework="pt") as tensors:
            found[name] = tensors.get_tensor(name)
    check_finite(found, llm)
    if HEAD in found and not torch.equal(found[EMBEDDING], found[HEAD]):
        config.tie_word_embeddings = False
    config.dtype = config.dtype or found[EMBEDDING].dtype


@dataclass
class TextSide:
    """
    Tokenizer and vocabulary of a language model, with what was added.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): pads on the left; knows the image tokens and the chat template.
        image_tokens (`tuple[str, str, str]`): placeholder, begin and end of an image.
        end (`str`): what ends an answer.
        vocab_size (`int`): rows of the embedding.
        num_known (`int`): those that the language model has learnt.
        num_rows (`int`): all of them, with those that are added.
        fresh_ids (`list[int]`): ids whose rows begin at the mean of the known ones.
        generation (`dict`): settings of generation that say how a text may end, and which are possible.
        notes (`list[str]`): sentences about all this.
    """

    tokenizer: object
    image_tokens: tuple[str, str, str]
    end: str
    vocab_size: int
    num_known: int
    num_rows: int
    fresh_ids: list[int]
    generation: dict
    notes: list[str]


def prepare_text(llm: str, config, chat_template: str) -> TextSide:
    """Loads the tokenizer of a language model and gives it image tokens and a chat template that marks answers.

    Args:
        llm (`str`): folder or Hub name.
        config (`PreTrainedConfig`): its configuration.
        chat_template (`str`): `"own"` teaches the model's own, `"chatml"` puts ChatML in its place.

    Raises:
        `ValueError`: without a tokenizer, and on a template that cannot be taught.
    """
    tokenizer, vocab_size = load_tokenizer(llm), config.vocab_size
    before, num_before = set(tokenizer.get_vocab().values()), len(tokenizer)
    image_tokens = next((names for names in IMAGE_TOKENS if set(names) <= set(tokenizer.get_vocab())), IMAGE_TOKENS[0])
    missing = [name for name in image_tokens if name not in tokenizer.get_vocab()]
    # A piece of this name is only found in texts as a token that was added. Its id stays.
    found = {token.content for token in tokenizer.added_tokens_decoder.values()}
    tokenizer.add_tokens([name for name in image_tokens if name not in found], special_tokens=True)
    split = [name for name in image_tokens if len(tokenizer.encode(name, add_special_tokens=False)) != 1]
    if split:
        raise ValueError(f"The tokenizer of {llm} splits {split[0]}, which must be one id; add it as a special token.")
    ids, added = set(tokenizer.get_vocab().values()), tokenizer.convert_tokens_to_ids(missing)
    num_rows = max(vocab_size, max(ids) + 1)
    fresh_ids = sorted({*added, *range(vocab_size, num_rows)})
    new = ", ".join(f"`{name}` ({id_})" for name, id_ in zip(missing, added))
    notes = [f"new tokens: {new}"] if missing else []
    if num_rows > vocab_size:
        notes.append(f"the embedding grows from {vocab_size:,} to {num_rows:,} rows")
    if before & set(added):
        raise ValueError(
            f"The tokenizer of {llm} gives new tokens the ids {added}, which others of its {num_before} have."
        )
    end, note = give_template(llm, tokenizer, image_tokens[0], chat_template)
    num_known = min(vocab_size, num_before)
    generation, told = make_generation(llm, config, tokenizer, end)
    notes += [note, *told]
    return TextSide(tokenizer, image_tokens, end, vocab_size, num_known, num_rows, fresh_ids, generation, notes)


def load_tokenizer(llm: str):
    """The tokenizer of a language model, which pads on the left. Raises `ValueError` when none can be used."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(llm, padding_side="left")
    except Exception as error:
        # What the readers of damaged files raise can be anything
        reason = f"it lacks {error}" if isinstance(error, KeyError) else first_line(error)
        raise ValueError(f"{llm} has no tokenizer that can be read: {reason}") from error
    if not tokenizer("Which one?", add_special_tokens=False)["input_ids"]:
        raise ValueError(f"{llm} has no tokenizer: the one that Transformers makes of it knows no words.")
    if not tokenizer.is_fast:
        raise ValueError(f"The tokenizer of {llm} is a slow one, which cannot mark answers; it needs a tokenizer.json.")
    if tokenizer.eos_token is None:
        raise ValueError(f"The tokenizer of {llm} has no `eos_token`, which ends a text; set one.")
    # A processor would cut and fill up all texts by these settings.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    for name in LENGTHS:
        tokenizer.init_kwargs.pop(name, None)
    if tokenizer.pad_token is None:
        # Padding is masked, so it may be any token.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def give_template(llm: str, tokenizer, image_token: str, chat_template: str) -> tuple[str, str]:
    """Gives a tokenizer its chat template. Returns the token that ends an answer, and a sentence about the template.

    Without the tokens of ChatML, `<|im_start|>` is plain text and a turn ends with the tokenizer's own end of a text:
    so no token has to be learnt. Raises `ValueError` when the template cannot be taught.
    """
    if chat_template == "own" and tokenizer.chat_template is not None:
        try:
            others = choose_template(tokenizer)
            thinks = "; it may write thoughts before answers" if "<think>" in tokenizer.chat_template else ""
            tokenizer.chat_template, end = teach_template(tokenizer, image_token)
        except ValueError as error:
            raise ValueError(
                f"The chat template of {llm} cannot be taught to carry images and to mark answers: {error}. Use "
                "`--chat-template chatml`."
            ) from error
        return end, f"the chat template is the language model's own{others}; its answers end with `{end}`{thinks}"
    known = {"<|im_start|>", "<|im_end|>"} <= set(tokenizer.get_vocab())
    end = "<|im_end|>" if known else tokenizer.eos_token
    reason = "" if tokenizer.chat_template else ", as the tokenizer has no chat template"
    template = read_chat_template(image_token, end_token=end)
    if tokenizer.bos_token and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
        template = "{{- bos_token -}}" + template
    tokenizer.chat_template = template
    return end, f"chats are written in ChatML{reason}; answers end with `{end}`"


def choose_template(tokenizer) -> str:
    """Leaves a tokenizer with several chat templates the one for chats, and says so; nothing if it has but one."""
    if not isinstance(tokenizer.chat_template, dict):
        return ""
    names = sorted(tokenizer.chat_template)
    if "default" not in names:
        raise ValueError(f"it has those named {', '.join(names)}, and none is named default")
    tokenizer.chat_template = tokenizer.chat_template["default"]
    return f", `default` of {', '.join(names)}"


def make_generation(llm: str, config, tokenizer, end: str) -> tuple[dict, list[str]]:
    """What a language model says of how its texts are generated: ids that end or may not be in a text.

    Its sampling is left out, so that answers are the same each time; the returned sentences name it.
    """
    from transformers import GenerationConfig

    try:
        given = GenerationConfig.from_pretrained(llm).to_diff_dict()
    except OSError:
        given = {"eos_token_id": getattr(config, "eos_token_id", None)}
    own = given.get("eos_token_id")
    own = own if isinstance(own, list) else [own]
    ends = [*own, tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(end)]
    ends = list(dict.fromkeys(id_ for id_ in ends if id_ is not None))
    kept = {name: given[name] for name in CONSTRAINTS if name in given}
    left = {name: given[name] for name in SAMPLING if given.get(name) not in (None, False)}
    named = ", ".join(f"{name} {value}" for name, value in sorted(left.items()))
    notes = [f"its generation settings are for calls of `generate`, and not defaults: {named}"] if left else []
    return {"eos_token_id": ends[0] if len(ends) == 1 else ends, **kept}, notes


def read_language_model(llm: str, is_tied: bool, text: TextSide) -> Iterator[dict[str, torch.Tensor]]:
    """The weights of a language model, file by file, under the names of UniCode² and with the rows that were added.

    A tied head is left out. Raises `ValueError` when the embedding has not as many rows as its configuration says.
    """
    for file in find_safetensors(llm):
        state = {name: value for name, value in load_file(file).items() if not name.endswith(COMPUTED)}
        check_finite(state, llm)
        if is_tied:
            state.pop(HEAD, None)
        for name in (name for name in (EMBEDDING, HEAD) if name in state):
            state[name] = add_rows(state[name], text, f"{name} of {llm}")
        yield {
            f"model.language_model.{name.removeprefix('model.')}" if name.startswith("model.") else name: value
            for name, value in state.items()
        }


def check_finite(state: dict[str, torch.Tensor], llm: str) -> None:
    """Raises `ValueError` when a weight has numbers that are not finite."""
    for name, weight in state.items():
        bad = (~weight.isfinite().reshape(len(weight), -1).all(-1)).nonzero()[:, 0].tolist() if weight.ndim else []
        if bad:
            raise ValueError(
                f"{len(bad)} of {len(weight)} rows of {name} of {llm} are not finite, the first is number {bad[0]}; "
                "copy the model again."
            )


def add_rows(weight: torch.Tensor, text: TextSide, what: str) -> torch.Tensor:
    """A weight `(vocab_size, hidden_size)` with `num_rows` rows; those of new tokens are the mean of the known ones."""
    if len(weight) != text.vocab_size:
        raise ValueError(f"{what} has {len(weight)} rows, and `vocab_size` in config.json is {text.vocab_size}.")
    if not text.fresh_ids:
        return weight
    grown = weight.new_empty(text.num_rows, weight.shape[1])
    grown[: len(weight)] = weight
    grown[text.fresh_ids] = weight[: text.num_known].mean(0, dtype=torch.float32).to(weight.dtype)
    return grown


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


__all__ = ["CHAT_TEMPLATES", "TextSide", "load_text_config", "prepare_text", "read_language_model", "settle_config"]
