"""Language models of many families become checkpoints that score texts as before, and write and draw."""

import json

import pytest
import torch
from language_models import FAMILIES, SIZES, make_language_model, make_tokenizer
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from transformers_unicode2 import UniCode2ForConditionalGeneration, UniCode2Processor
from transformers_unicode2.cli import main
from transformers_unicode2.codebook.storage import load_codebook, save_codebook
from transformers_unicode2.hub.fresh import draw_codebook
from transformers_unicode2.hub.language_models import prepare_text

CHAT = [
    {"role": "user", "content": "what is it?"},
    {"role": "assistant", "content": "a red circle"},
    {"role": "user", "content": "and where?"},
]


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vision")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=32, patch_size=8)).save_pretrained(folder)
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture
def init(vision, tmp_path, monkeypatch):
    """Runs the command on a language model; returns the folder of the checkpoint."""

    def run(*extra, codebook=("--random-codebook", "64"), llm=tmp_path / "llm", output=tmp_path / "output"):
        words = ["--llm", str(llm), "--vision", str(vision), *codebook, "--output", str(output), *extra]
        monkeypatch.setattr("sys.argv", ["unicode2", "init", *words])
        main()
        return output

    return run


@pytest.fixture
def make_llm(tmp_path):
    """Writes the language model of a family with its tokenizer to `tmp_path / "llm"`."""

    def make(family, dtype=torch.float32, style=None, **changes):
        llm = make_language_model(family, dtype, **changes)
        llm.save_pretrained(tmp_path / "llm")
        _, own, kind = FAMILIES[family]
        make_tokenizer(style or own, kind).save_pretrained(tmp_path / "llm")
        return llm

    return make


def refuse(capsys, run, *args, **kwargs) -> str:
    with pytest.raises(SystemExit, match="2"):
        run(*args, **kwargs)
    error = capsys.readouterr().err.strip().splitlines()
    return next(line for line in error if line.startswith("unicode2 init: "))


@pytest.mark.parametrize("family", FAMILIES)
def test_family_composes_scores_writes_and_draws(family, make_llm, init, tmp_path):
    llm = make_llm(family)
    own = AutoTokenizer.from_pretrained(tmp_path / "llm")
    model = UniCode2ForConditionalGeneration.from_pretrained(init()).eval()
    processor = UniCode2Processor.from_pretrained(tmp_path / "output")
    assert model.config.tie_word_embeddings == llm.config.tie_word_embeddings
    # Longer than the sliding windows.
    ids = torch.randint(3, 100, (2, 40), generator=torch.Generator().manual_seed(1))
    fresh = [model.config.image_token_id, model.config.boi_token_id, model.config.eoi_token_id]
    # The embedding was padded.
    known = [id_ for id_ in range(llm.config.vocab_size) if id_ not in fresh]
    with torch.no_grad():
        assert torch.equal(model(ids).logits[..., known], llm(ids).logits[..., known])
        loss = llm(ids, labels=ids).loss
        assert torch.allclose(model(ids, labels=ids).loss, loss, atol=0.01)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "suppress_tokens": fresh}
    assert torch.equal(model.generate(ids, **options), llm.generate(ids, **options))
    drawn = model.generate(ids, generation_mode="image", guidance_scale=2.0)
    assert drawn.shape == (2, 16) and drawn.min() >= model.config.visual_token_offset
    chat = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    assert (
        processor.apply_chat_template(CHAT, **chat)["input_ids"][0]
        == own.apply_chat_template(CHAT, **chat)["input_ids"]
    )
    written = processor.encode_chat([*CHAT, {"role": "assistant", "content": [{"type": "image"}]}], [drawn[0].tolist()])
    assert [id_ for id_, flag in zip(*written) if flag and id_ >= model.config.visual_token_offset] == drawn[0].tolist()
    with torch.no_grad():
        assert model(torch.tensor(written[:1])).logits[..., : model.config.visual_token_offset].isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_equal_in_bfloat16(family, make_llm, init):
    llm = make_llm(family, torch.bfloat16)
    model = UniCode2ForConditionalGeneration.from_pretrained(init()).eval()
    ids = torch.arange(3, 43)[None]
    known = [id_ for id_ in range(llm.config.vocab_size) if id_ != model.config.image_token_id]
    known = [id_ for id_ in known if id_ not in (model.config.boi_token_id, model.config.eoi_token_id)]
    with torch.no_grad():
        scores = model(ids).logits
        assert scores.dtype == torch.bfloat16 and torch.equal(scores[..., known], llm(ids).logits[..., known])


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "phi3"])
def test_family_learns(family, make_llm, init):
    """Text and images have gradients in all parts, with checkpointed layers, too."""
    make_llm(family)
    model = UniCode2ForConditionalGeneration.from_pretrained(init()).train()
    offset = model.config.visual_token_offset
    ids = torch.cat([torch.arange(20, 30), torch.arange(offset, offset + 16), torch.arange(40, 50)])[None]
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert all(torch.allclose(gradients[0][name], gradient, atol=1e-6) for name, gradient in gradients[1].items())
    assert all(gradients[0][name].abs().sum() > 0 for name in gradients[0] if "layers.0" in name or "projector" in name)


def test_rows_of_new_tokens_are_the_mean_of_the_known_ones(make_llm, init, tmp_path):
    llm = make_llm("llama")
    model = UniCode2ForConditionalGeneration.from_pretrained(init())
    num_known = len(AutoTokenizer.from_pretrained(tmp_path / "llm"))
    ids = [model.config.image_token_id, model.config.boi_token_id, model.config.eoi_token_id]
    # The embedding was padded to 512 rows.
    assert ids == [num_known, num_known + 1, num_known + 2] and model.config.visual_token_offset == 512
    for new, old in (
        (model.get_input_embeddings(), llm.get_input_embeddings()),
        (model.get_output_embeddings(), llm.get_output_embeddings()),
    ):
        assert torch.allclose(new.weight[ids], old.weight[:num_known].mean(0).expand(3, -1), atol=1e-7)
        rest = [id_ for id_ in range(512) if id_ not in ids]
        assert torch.equal(new.weight[rest], old.weight[rest])


@pytest.mark.parametrize("tied", [True, False])
def test_embedding_without_room_grows(make_llm, init, capsys, tied):
    num_known = len(make_tokenizer("llama3", "bytes"))
    llm = make_llm("llama", vocab_size=num_known, tie_word_embeddings=tied)
    model = UniCode2ForConditionalGeneration.from_pretrained(init()).eval()
    assert model.config.visual_token_offset == num_known + 3 == len(model.get_input_embeddings().weight)
    assert f"the embedding grows from {num_known} to {num_known + 3} rows" in capsys.readouterr().out
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits[..., :num_known], llm(ids).logits)
        mean = llm(ids).logits.mean(-1)
        assert torch.allclose(model(ids).logits[..., num_known], mean, atol=1e-5)


def test_ends_of_a_text_are_kept_and_the_end_of_a_turn_is_one(make_llm, init, tmp_path):
    llm = make_llm("llama")
    llm.generation_config.eos_token_id = [7, 9]
    llm.generation_config.save_pretrained(tmp_path / "llm")
    model = UniCode2ForConditionalGeneration.from_pretrained(init())
    end = make_tokenizer("llama3", "bytes").convert_tokens_to_ids("<|eot_id|>")
    assert model.generation_config.eos_token_id == [7, 9, 2, end]
    assert model.generation_config.pad_token_id == 2


def test_codes_start_on_the_scale_of_token_embeddings(make_llm, init, tmp_path):
    make_llm("gemma")
    model = UniCode2ForConditionalGeneration.from_pretrained(init())
    offset = model.config.visual_token_offset
    with torch.no_grad():
        tokens = model.get_input_embeddings()(torch.arange(offset))
        codes = model.model.embed_image_tokens(torch.arange(offset, offset + 64))
        assert codes.var(0, correction=0).mean() == pytest.approx(tokens.var(0).mean().item(), rel=0.02)
        assert torch.allclose(codes.mean(0), tokens.mean(0), atol=0.01 * tokens.std().item())
    plain = init("--projector-init", "default", output=tmp_path / "plain")
    codes = UniCode2ForConditionalGeneration.from_pretrained(plain).model.embed_image_tokens(
        torch.arange(offset, offset + 64)
    )
    assert codes.std() < 0.1 * tokens.std()


def test_image_tokens_of_a_tokenizer_are_used(tmp_path):
    """Those of Gemma 3, one of which lies behind the rows of the embedding, as in its smallest model."""
    tokenizer = make_tokenizer("gemma", "words")
    tokenizer.add_tokens(["<start_of_image>", "<end_of_image>", "<image_soft_token>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path)
    text = prepare_text(str(tmp_path), PreTrainedConfig(vocab_size=len(tokenizer) - 1), "own")
    assert text.image_tokens == ("<image_soft_token>", "<start_of_image>", "<end_of_image>")
    assert len(text.tokenizer) == len(tokenizer) == text.num_rows and text.fresh_ids == [len(tokenizer) - 1]


def test_weights_without_an_embedding_are_refused(make_llm, init, tmp_path, capsys):
    make_llm("llama")
    file = tmp_path / "llm" / "model.safetensors"
    state = load_file(file)
    state.pop("model.embed_tokens.weight")
    save_file(state, file, metadata={"format": "pt"})
    assert "lack model.embed_tokens.weight" in refuse(capsys, init)


def test_base_model_gets_chatml(make_llm, init, tmp_path, capsys):
    make_llm("llama", style="olmo2")
    file = tmp_path / "llm" / "chat_template.jinja"
    file.unlink()
    processor = UniCode2Processor.from_pretrained(init())
    assert "chats are written in ChatML, as the tokenizer has no chat template; answers end with `</s>`" in (
        capsys.readouterr().out
    )
    text = processor.apply_chat_template(CHAT[:2])
    assert text == "<|im_start|>user\nwhat is it?</s>\n<|im_start|>assistant\na red circle</s>\n"
    ids, mask = processor.encode_chat(CHAT[:2])
    assert processor.decode([id_ for id_, flag in zip(ids, mask) if flag]) == "a red circle</s>"


def test_chatml_takes_the_place_of_a_template_on_request(make_llm, init, tmp_path, capsys):
    make_llm("mistral", style="chatml")
    tokenizer = make_tokenizer("chatml", "words")
    tokenizer.chat_template = "{{ messages[-1].content }}"
    tokenizer.save_pretrained(tmp_path / "llm")
    message = refuse(capsys, init)
    assert "cannot be taught to carry images" in message and "Use `--chat-template chatml`." in message
    processor = UniCode2Processor.from_pretrained(init("--chat-template", "chatml"))
    text = processor.apply_chat_template(CHAT[:1], add_generation_prompt=True)
    # The tokenizer begins texts with `<s>` by itself.
    assert text == "<s><|im_start|>user\nwhat is it?<|im_end|>\n<|im_start|>assistant\n"
    ids = processor.apply_chat_template(CHAT[:1], tokenize=True, return_dict=True)["input_ids"][0]
    assert ids.count(1) == 1 and ids == processor(text=processor.apply_chat_template(CHAT[:1]))["input_ids"][0]


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("gpt2", {}, "is a gpt2 model, whose weights begin with 'transformer'"),
        ("t5", {}, "is a t5 model; --llm must be a causal language model"),
        ("bart", {}, "is a bart model, which has more than one part"),
        ("mixtral", {"num_local_experts": 2}, "is a mixtral model, a mixture of 2 experts"),
        ("qwen3_moe", {"num_experts": 4}, "is a qwen3_moe model, a mixture of 4 experts"),
        ("granite", {"logits_scaling": 8.0}, "is a granite model, whose head changes its scores by `logits_scaling`"),
        ("phi", {}, "is a phi model; it must have `embed_tokens`, and a head without a bias"),
        ("gemma3", {}, "is a gemma3 model, which has more than one part"),
        ("siglip", {}, "is a siglip model; --llm must be a causal language model"),
    ],
)
def test_other_models_are_refused_by_name(model_type, changes, message, init, tmp_path, capsys):
    AutoConfig.for_model(model_type, **changes).save_pretrained(tmp_path / "llm")
    assert message in refuse(capsys, init)
    assert message in refuse(capsys, init, "--dry-run")
    assert not (tmp_path / "output").exists()


def test_parts_that_are_not_there_are_named(make_llm, init, tmp_path, capsys):
    assert "--llm is nope; there is no such folder, and the Hub cannot be reached" in refuse(capsys, init, llm="nope")
    assert "--llm is a/b/c; there is no such folder, and no repository" in refuse(capsys, init, llm="a/b/c")
    make_llm("qwen2")
    message = refuse(capsys, init, codebook=("--codebook", "nope/nope"))
    assert "--codebook is nope/nope; there is no such folder" in message
    for file in (tmp_path / "llm").glob("tokenizer*"):
        file.unlink()
    assert "has no tokenizer" in refuse(capsys, init)


def test_unknown_sampling_options_are_refused(make_llm, init, capsys):
    make_llm("qwen2")
    message = refuse(capsys, init, "--image-generation", json.dumps({"temprature": 1.0}))
    assert "--image-generation has 'temprature', which `generate` does not know; did you mean 'temperature'?" in message


def test_embedding_of_another_size_than_its_configuration_is_refused(make_llm, init, tmp_path, capsys):
    make_llm("qwen2")
    file = tmp_path / "llm" / "config.json"
    file.write_text(file.read_text().replace('"vocab_size": 512', '"vocab_size": 520'))
    assert "has 512 rows, and `vocab_size` in config.json is 520" in refuse(capsys, init)


def test_dry_run_reports_what_is_written_later(make_llm, init, vision, tmp_path, capsys):
    make_llm("gemma3_text", torch.bfloat16, vocab_size=len(make_tokenizer("gemma", "words")))
    save_codebook(draw_codebook(str(vision), 40), tmp_path / "codebook", {})
    for codebook in (("--codebook", str(tmp_path / "codebook")), ("--random-codebook", "64")):
        for head in ("flat", "two_level"):
            options = {"codebook": codebook, "output": tmp_path / f"{codebook[0]}-{head}"}
            init("--visual-head", head, "--dry-run", **options)
            planned = capsys.readouterr().out.splitlines()
            assert not options["output"].exists() and "nothing was written" in planned[-1]
            init("--visual-head", head, **options)
            assert capsys.readouterr().out.splitlines()[:-1] == planned[:-1]
    assert "the codebook is random: 64 codes that no picture has formed" in planned


def test_dry_run_needs_configurations_alone(init, tmp_path, capsys):
    AutoConfig.for_model("qwen2", hidden_size=3584, num_hidden_layers=28, vocab_size=152064).save_pretrained(
        tmp_path / "llm"
    )
    init("--dry-run")
    printed = capsys.readouterr().out
    assert "llm has no tokenizer: rows for image tokens are not counted" in printed
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "llm"))
    assert f"{sum(p.numel() for p in llm.parameters()):,} parameters" in printed


def test_random_codebook_is_like_features_and_is_drawn_again(vision, tmp_path):
    codebook = draw_codebook(str(vision), 400)
    assert torch.equal(codebook.codes, draw_codebook(str(vision), 400).codes)
    assert torch.equal(codebook.codes, codebook.codes.bfloat16().float()) and len(codebook.codes.unique(dim=0)) == 400
    model = SiglipVisionModel.from_pretrained(vision).eval()
    pixels = torch.nn.functional.interpolate(torch.randn(8, 3, 8, 8), size=(32, 32), mode="bilinear")
    with torch.no_grad():
        features = model(pixels).last_hidden_state.flatten(0, 1)
    assert torch.allclose(codebook.codes.std(0), features.std(0), rtol=0.5, atol=0.05)
    # A whole codebook, with its cells, that can be saved and loaded.
    save_codebook(codebook, tmp_path / "codebook", {})
    loaded = load_codebook(tmp_path / "codebook")
    assert loaded.encoder_sha256 == codebook.encoder_sha256 is not None
    assert torch.equal(loaded.encode(codebook.codes), torch.arange(400))


def test_card_says_what_it_is_made_of(make_llm, init):
    make_llm("qwen2")
    card = (init() / "README.md").read_text()
    assert "composed by `unicode2 init` and not trained" in card and "codebook: 64 random codes" in card
    # The place on this machine is left out.
    assert "language model: `llm`" in card and "| language model |" in card


def change_weights(folder, change) -> None:
    """Applies `change` to the weights of a language model in one file."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def change_settings(file, **changes) -> None:
    settings = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in settings.items() if value is not None}))


def score(folder, kind=UniCode2ForConditionalGeneration):
    with torch.no_grad():
        return kind.from_pretrained(folder).eval()(torch.arange(20, 40)[None]).logits[..., :100]


@pytest.mark.parametrize("is_copy", [True, False])
def test_head_in_the_files_of_a_tied_model_is_kept(make_llm, init, tmp_path, is_copy):
    make_llm("llama", tie_word_embeddings=True)

    def add_head(state):
        head = torch.randn(512, 32, generator=torch.Generator().manual_seed(3))
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone() if is_copy else head

    change_weights(tmp_path / "llm", add_head)
    assert torch.equal(score(init()), score(tmp_path / "llm", AutoModelForCausalLM))
    config = UniCode2ForConditionalGeneration.from_pretrained(tmp_path / "output").config
    assert config.tie_word_embeddings == config.text_config.tie_word_embeddings == is_copy


def test_dtype_is_that_of_the_file_where_config_json_has_none(make_llm, init, tmp_path, capsys):
    make_llm("llama", torch.float16)
    change_settings(tmp_path / "llm" / "config.json", dtype=None)
    init("--dry-run")
    planned = capsys.readouterr().out.splitlines()[:7]
    assert UniCode2ForConditionalGeneration.from_pretrained(init()).dtype == torch.float16
    assert capsys.readouterr().out.splitlines()[:7] == planned
    assert torch.equal(score(tmp_path / "output"), score(tmp_path / "llm", AutoModelForCausalLM))


def test_an_old_index_beside_a_single_file_does_not_count(make_llm, init, tmp_path):
    llm = make_llm("llama")
    (tmp_path / "llm" / "model.safetensors").unlink()
    llm.save_pretrained(tmp_path / "llm", max_shard_size="30KB")
    assert len(list((tmp_path / "llm").glob("*.safetensors"))) > 1
    save_file({n: 2 * v.clone() for n, v in llm.state_dict().items()}, tmp_path / "llm" / "model.safetensors")
    change_weights(tmp_path / "llm", lambda state: None)
    assert torch.equal(score(init()), score(tmp_path / "llm", AutoModelForCausalLM))


def test_numbers_that_are_computed_are_left_out(make_llm, init, tmp_path):
    make_llm("llama")
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(2)}
    change_weights(tmp_path / "llm", lambda state: state.update(extra))
    assert torch.equal(score(init()), score(tmp_path / "llm", AutoModelForCausalLM))


def test_lengths_in_a_tokenizer_do_not_cut_texts(make_llm, init, tmp_path):
    make_llm("qwen2")
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    expected = UniCode2Processor.from_pretrained(init(output=tmp_path / "usual")).apply_chat_template(CHAT, **options)
    tokenizer = make_tokenizer("chatml", "bytes")
    tokenizer.backend_tokenizer.enable_truncation(8)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    tokenizer.save_pretrained(tmp_path / "llm")
    processor = UniCode2Processor.from_pretrained(init())
    assert processor.apply_chat_template(CHAT, **options)["input_ids"] == expected["input_ids"]
    backend = processor.tokenizer.backend_tokenizer
    assert backend.truncation is None and backend.padding is None


def test_plain_pieces_become_image_tokens(tmp_path):
    tokenizer = make_tokenizer("chatml", "bytes")
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    size = len(tokenizer)
    names = ("<|image_pad|>", "<|vision_start|>", "<|vision_end|>")
    for token in content["added_tokens"]:
        content["model"]["vocab"].setdefault(token["content"], token["id"])
    content["model"]["vocab"] |= {name: size + i for i, name in enumerate(names)}
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    text = prepare_text(str(tmp_path), PreTrainedConfig(vocab_size=size + 3), "own")
    assert text.fresh_ids == []
    for i, name in enumerate(names):
        assert text.tokenizer.encode(name, add_special_tokens=False) == [size + i]


def test_the_default_of_several_templates_is_taught(make_llm, init, tmp_path, capsys):
    make_llm("qwen2")
    tokenizer = make_tokenizer("chatml", "bytes")
    own = tokenizer.chat_template
    tokenizer.chat_template = {"default": own, "tool_use": own + "{{ tools | tojson }}"}
    tokenizer.save_pretrained(tmp_path / "llm")
    init()
    assert "own, `default` of default, tool_use; its answers end with `<|im_end|>`" in capsys.readouterr().out
    tokenizer.chat_template = {"rag": own, "tool_use": own}
    tokenizer.save_pretrained(tmp_path / "llm")
    (tmp_path / "llm" / "chat_template.jinja").unlink(missing_ok=True)
    message = refuse(capsys, init, "--dry-run")
    assert "it has those named rag, tool_use, and none is named default" in message


@pytest.mark.parametrize("template", ["{{ 1 // 0 }}", "{% for", "{% import 'x' as y %}", "{{ messages.a.b.c }}"])
def test_templates_that_fail_in_any_way_are_refused(make_llm, init, tmp_path, capsys, template):
    make_llm("qwen2")
    tokenizer = make_tokenizer("chatml", "bytes")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path / "llm")
    assert "cannot be taught to carry images" in refuse(capsys, init, "--dry-run")


def test_thoughts_of_a_template_are_mentioned(make_llm, init, capsys):
    make_llm("qwen3")
    init("--dry-run")
    assert "it may write thoughts before answers" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["fp8", "bitsandbytes", "gptq"])
def test_quantized_weights_are_refused(make_llm, init, tmp_path, capsys, method):
    make_llm("llama")
    change_settings(tmp_path / "llm" / "config.json", quantization_config={"quant_method": method, "bits": 4})
    for words in ([], ["--dry-run"]):
        assert "is a llama model whose weights are quantized" in refuse(capsys, init, *words)


def test_numbers_that_would_be_lost_are_refused(tmp_path, init, capsys):
    AutoConfig.for_model("falcon_h1", num_hidden_layers=1).save_pretrained(tmp_path / "llm")
    message = refuse(capsys, init, "--dry-run")
    assert "is a falcon_h1 model with model.layers.0.mamba.mup_vector, which no file of weights holds" in message


def test_weights_that_do_not_fit_are_told_before_anything_is_written(make_llm, init, tmp_path, capsys):
    llm = make_llm("llama")
    change_weights(tmp_path / "llm", lambda state: state.pop("lm_head.weight"))
    for words in ([], ["--dry-run"]):
        assert "lack lm_head.weight, and `tie_word_embeddings` in config.json is false" in refuse(capsys, init, *words)
    (tmp_path / "llm" / "model.safetensors").unlink()
    torch.save(llm.state_dict(), tmp_path / "llm" / "pytorch_model.bin")
    for words in ([], ["--dry-run"]):
        assert "must be in safetensors" in refuse(capsys, init, *words)
    message = refuse(capsys, init, output=tmp_path / "llm" / "new")
    assert "which holds a part of the model; choose another folder" in message


def test_an_adapter_is_no_language_model(make_llm, init, tmp_path, capsys):
    make_llm("llama")
    (tmp_path / "llm" / "adapter_config.json").write_text("{}")
    assert "is an adapter; merge it into its language model" in refuse(capsys, init)


def test_a_codebook_of_another_encoder_is_refused_by_its_own_digest(make_llm, init, vision, tmp_path, capsys):
    make_llm("llama")
    codebook = draw_codebook(str(vision), 40)
    save_codebook(codebook, tmp_path / "right", {})
    init(codebook=("--codebook", str(tmp_path / "right")))
    codebook.encoder_sha256 = "0" * 64
    save_codebook(codebook, tmp_path / "wrong", {})
    message = refuse(capsys, init, codebook=("--codebook", str(tmp_path / "wrong")), output=tmp_path / "other")
    assert "was built with another encoder (SHA-256 000000000000)" in message


def test_a_codebook_of_another_dtype_is_refused_by_the_dry_run(make_llm, init, vision, tmp_path, capsys):
    make_llm("llama")
    save_codebook(draw_codebook(str(vision), 40), tmp_path / "codebook", {})
    file = tmp_path / "codebook" / "codebook.safetensors"
    save_file({n: v.double() if v.is_floating_point() else v for n, v in load_file(file).items()}, file)
    assert "codebook.safetensors" in refuse(capsys, init, "--dry-run", codebook=("--codebook", str(file.parent)))


def test_a_random_codebook_has_a_most(make_llm, init, capsys):
    make_llm("llama")
    with pytest.raises(SystemExit, match="2"):
        init(codebook=("--random-codebook", "3000000000"))
    assert "it must be from 4 to 2147483647" in capsys.readouterr().err


def test_numbers_that_are_not_finite_are_refused(make_llm, init, vision, tmp_path, capsys):
    make_llm("llama")
    change_weights(tmp_path / "llm", lambda state: state["model.embed_tokens.weight"][5].fill_(torch.nan))
    for words in ([], ["--projector-init", "default"], ["--dry-run"]):
        assert "1 of 512 rows of model.embed_tokens.weight" in refuse(capsys, init, *words)
    make_llm("llama")
    change_weights(tmp_path / "llm", lambda state: state["model.layers.1.mlp.up_proj.weight"][3].fill_(torch.inf))
    assert "1 of 48 rows of model.layers.1.mlp.up_proj.weight" in refuse(capsys, init)
    encoder = SiglipVisionModel.from_pretrained(vision)
    with torch.no_grad():
        encoder.post_layernorm.weight.fill_(torch.nan)
    encoder.save_pretrained(tmp_path / "vision")
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vision")
    with pytest.raises(ValueError, match="gives features that are not finite"):
        draw_codebook(str(tmp_path / "vision"), 40)


def test_phi_forgets_what_it_has_cached_for_short_texts(make_llm, init):
    """Where longer texts get other rotations, as its own class does; with images and with guidance as well."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    rope["original_max_position_embeddings"] = 64
    llm = make_llm("phi3", original_max_position_embeddings=64, rope_parameters=rope)
    model = UniCode2ForConditionalGeneration.from_pretrained(init()).eval()
    with torch.no_grad():
        for own, other in zip(llm.parameters(), model.model.language_model.parameters()):
            own += 0.1 * torch.randn_like(own)
            other[: len(own)] = own
    ids = torch.randint(3, 100, (1, 60), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "suppress_tokens": [*range(100, 520)]}
    expected = llm.generate(ids, **options)
    assert torch.equal(model.generate(ids, **options), expected)
    ids[0, 10:28] = model.config.image_token_id
    ids[0, 10], ids[0, 27] = model.config.boi_token_id, model.config.eoi_token_id
    seen = {"pixel_values": torch.rand(1, 3, 32, 32)}
    for image in ({}, {"generation_mode": "image"}, {"generation_mode": "image", "guidance_scale": 2.0}):
        settings = {**seen, **image} if image else {**seen, **options}
        cached, anew = (model.generate(ids, **settings, use_cache=cached) for cached in (True, False))
        assert torch.equal(cached, anew)


def test_limits_of_its_texts_are_kept_and_its_sampling_is_named(make_llm, init, tmp_path, capsys):
    llm = make_llm("llama")
    llm.generation_config.update(suppress_tokens=[*range(300, 510)], do_sample=True, temperature=0.6)
    llm.generation_config.save_pretrained(tmp_path / "llm")
    output = init()
    said = "its generation settings are for calls of `generate`, and not defaults: do_sample True, temperature 0.6"
    assert said in capsys.readouterr().out and said in (output / "README.md").read_text()
    model = UniCode2ForConditionalGeneration.from_pretrained(output).eval()
    ids = torch.randint(3, 100, (1, 9), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 8, "min_new_tokens": 8}
    assert torch.equal(model.generate(ids, **options), llm.generate(ids, **options, do_sample=False))
    assert model.generate(ids, generation_mode="image").shape == (1, 16)


@pytest.mark.parametrize("family", ["lfm2", "persimmon"])
def test_families_that_call_their_last_norm_otherwise(family, init, tmp_path):
    more = {"full_attn_idxs": [1]} if family == "lfm2" else {}
    config = AutoConfig.for_model(family, **SIZES, **more)
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(config).eval()
    llm.save_pretrained(tmp_path / "llm")
    make_tokenizer("chatml", "bytes").save_pretrained(tmp_path / "llm")
    model = UniCode2ForConditionalGeneration.from_pretrained(init()).eval()
    ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(model(ids).logits[..., :250], llm(ids).logits[..., :250])
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "suppress_tokens": [*range(250, 512)]}
    assert torch.equal(model.generate(ids, **options), llm.generate(ids, **options))
    assert model.generate(ids, generation_mode="image").shape == (2, 16)


def test_layers_that_read_token_ids_are_refused(init, tmp_path, capsys):
    own = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 512, "head_dim": 16}
    AutoConfig.for_model("gemma4_text", **SIZES, **own).save_pretrained(tmp_path / "llm")
    assert "gemma4_text model, each of whose layers reads token ids" in refuse(capsys, init)


def test_damaged_files_of_a_language_model_are_refused(make_llm, init, tmp_path, capsys):
    make_llm("qwen2")
    (tmp_path / "llm" / "tokenizer.json").write_text("{}")
    assert "has no tokenizer that can be read: it lacks 'added_tokens'" in refuse(capsys, init)
    make_llm("qwen2")
    config = json.loads((tmp_path / "llm" / "config.json").read_text())
    for changes, reason in (({"num_hidden_layers": 1}, "layer_types"), ({"vocab_size": "512"}, "expected int")):
        (tmp_path / "llm" / "config.json").write_text(json.dumps({**config, **changes}))
        assert reason in refuse(capsys, init)
