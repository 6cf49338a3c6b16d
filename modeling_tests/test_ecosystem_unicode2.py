"""PEFT, gradient checkpointing, offloading, dtypes, compilation and resizing, and what stays frozen through them."""

import copy

import pytest
import torch

from transformers_unicode2 import UniCode2Config, UniCode2ForConditionalGeneration


@pytest.fixture(params=["flat", "two_level"])
def either(request, model):
    """The small random model with either visual head."""
    if request.param == "flat":
        return model
    config = UniCode2Config(**{**model.config.to_dict(), "visual_head": "two_level"})
    other = UniCode2ForConditionalGeneration(config).eval()
    state = {name: value for name, value in model.state_dict().items() if "visual_head" not in name}
    other.load_state_dict(state, strict=False)
    other.visual_head.cell_offsets.copy_(model.get_quantizer().codebook.cell_offsets)
    return other


@pytest.fixture
def batch(prompt, pixel_values, config):
    """Image to text and text to image in one batch, with labels."""
    labels = prompt["input_ids"].masked_fill(prompt["input_ids"] == 0, -100)
    return {**prompt, "pixel_values": pixel_values, "labels": labels}


def frozen_state(model):
    return {name: value.clone() for name, value in model.state_dict().items() if "quantizer" in name}


def train_a_step(model, batch):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    return loss


def test_lora_with_visual_modules_is_saved_and_restored(either, batch, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    before = copy.deepcopy(either)
    config = LoraConfig(
        target_modules=r".*language_model.*\.(q_proj|v_proj)",
        modules_to_save=["visual_embeddings", "projector", "visual_head"],
        init_lora_weights=False,
    )
    peft_model = get_peft_model(either, config)
    frozen = frozen_state(peft_model)
    train_a_step(peft_model.train(), batch)
    assert all(torch.equal(value, peft_model.state_dict()[name]) for name, value in frozen.items())
    peft_model.eval().save_pretrained(tmp_path)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        expected, untouched = peft_model(**inputs).logits, before(**inputs).logits
        restored = PeftModel.from_pretrained(before, tmp_path).eval()
        assert torch.equal(restored(**inputs).logits, expected)
        assert not torch.allclose(untouched, expected)
        merged = restored.merge_and_unload()
        assert torch.allclose(merged(**inputs).logits, expected, atol=1e-5)


def test_recipe_never_trains_what_peft_would_not_save(model):
    from peft import get_peft_model

    from transformers_unicode2.training.parameters import make_lora_config

    names = ["visual_embeddings", "projector", "language_model", "visual_head", "lm_head"]
    peft_model = get_peft_model(model, make_lora_config(model, {"r": 4}, names))
    learns = [name for name, parameter in peft_model.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name or ".modules_to_save." in name for name in learns)
    for part in names[:-1]:
        assert any(part in name for name in learns), part
    # TRL refuses an adapter there
    assert not any("lm_head" in name for name in learns)
    with pytest.raises(ValueError, match="`lora` adapts the language model"):
        make_lora_config(model, {"r": 4}, ["projector"])


def test_gradient_checkpointing_gives_the_same_gradients(either, batch):
    gradients = {}
    for checkpointing in (False, True):
        either.zero_grad()
        either.train()
        if checkpointing:
            either.gradient_checkpointing_enable()
        either(**batch).loss.backward()
        gradients[checkpointing] = {n: p.grad.clone() for n, p in either.named_parameters() if p.grad is not None}
    assert gradients[False].keys() == gradients[True].keys()
    for name, gradient in gradients[False].items():
        assert torch.allclose(gradient, gradients[True][name], atol=1e-6), name


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offloading(either, batch, tmp_path, place):
    either.save_pretrained(tmp_path / "model")
    device_map = {
        "model.language_model": "cpu",
        "model.visual_embeddings": place,
        "model.projector": place,
        "model.quantizer": place,
        "visual_head": place,
        "lm_head": "cpu",
    }
    loaded = UniCode2ForConditionalGeneration.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    ).eval()
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, either(**inputs).logits)
        assert torch.equal(loaded(**batch).loss, either(**batch).loss)
    prompt = batch["input_ids"][:1, -2:]
    assert torch.equal(
        loaded.generate(prompt, generation_mode="image", do_sample=False),
        either.generate(prompt, generation_mode="image", do_sample=False),
    )


def test_automatic_device_map_offloads_what_does_not_fit(either, batch, tmp_path):
    either.save_pretrained(tmp_path)
    loaded = UniCode2ForConditionalGeneration.from_pretrained(
        tmp_path, device_map="auto", max_memory={"cpu": 300_000}, offload_folder=tmp_path / "offload"
    ).eval()
    assert {"cpu", "disk"} <= {str(device) for device in loaded.hf_device_map.values()}
    with torch.no_grad():
        assert torch.allclose(loaded(**batch).loss.cpu(), either(**batch).loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_codes_do_not_change_with_the_dtype(either, batch, tmp_path, dtype):
    either.save_pretrained(tmp_path)
    loaded = UniCode2ForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype).eval()
    assert loaded.model.language_model.dtype == loaded.visual_head.linear.weight.dtype == dtype
    assert torch.equal(loaded.get_quantizer().codebook.codes, either.get_quantizer().codebook.codes)
    assert torch.equal(loaded.get_image_tokens(batch["pixel_values"]), either.get_image_tokens(batch["pixel_values"]))
    with torch.no_grad():
        assert torch.allclose(loaded(**batch).loss.float(), either(**batch).loss, rtol=0.02)
    loaded.generate(batch["input_ids"][:1, -2:], max_new_tokens=4)
    loaded.generate(batch["input_ids"][:1, -2:], generation_mode="image")


def test_int8_language_model(either, batch, tmp_path):
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    either.save_pretrained(tmp_path)
    keep = ["lm_head", "visual_head", "projector", "quantizer"]
    loaded = UniCode2ForConditionalGeneration.from_pretrained(
        tmp_path, quantization_config=TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=keep)
    ).eval()
    weight = loaded.model.language_model.layers[0].mlp.up_proj.weight
    assert type(weight) is not torch.nn.Parameter
    assert torch.equal(loaded.get_image_tokens(batch["pixel_values"]), either.get_image_tokens(batch["pixel_values"]))
    with torch.no_grad():
        assert torch.allclose(loaded(**batch).loss, either(**batch).loss, rtol=0.05)
    loaded.generate(batch["input_ids"][:1, -2:], generation_mode="image")


@pytest.mark.parametrize("mode", ["text", "image"])
def test_decode_step_compiles_without_graph_breaks(either, mode):
    from transformers import StaticCache

    cache = StaticCache(config=either.config.text_config, max_cache_len=32)
    arguments = {"output_modality": mode, "use_cache": True, "logits_to_keep": 1}
    if mode == "image":
        arguments["visual_temperature"] = 1.0
        either.eval()
        if either.config.visual_head == "two_level":
            either.visual_head.measure_cells()
    with torch.no_grad():
        either(torch.tensor([[20, 21]]), past_key_values=cache, **arguments)
        step = torch.compile(either.forward, fullgraph=True, backend="eager")
        logits = step(
            input_ids=torch.tensor([[22]]), position_ids=torch.tensor([[2]]), past_key_values=cache, **arguments
        ).logits
    assert logits.shape[:2] == (1, 1)


def test_flex_attention_gives_the_same(either, batch, tmp_path):
    either.save_pretrained(tmp_path)
    flex = UniCode2ForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="flex_attention").eval()
    assert flex.get_quantizer().vision_model.config._attn_implementation == "flex_attention"
    options = {"generation_mode": "image", "do_sample": False, "guidance_scale": 2.0}
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # padding does not compile on a CPU
        assert torch.equal(*(model.get_image_tokens(batch["pixel_values"]) for model in (flex, either)))
        assert torch.allclose(flex(**batch).loss, either(**batch).loss)
        assert torch.equal(*(model.generate(batch["input_ids"][:, -2:], **options) for model in (flex, either)))


def test_resized_text_embeddings_move_the_visual_ids(either, batch, tmp_path):
    codes = either.get_image_tokens(batch["pixel_values"]) - either.config.visual_token_offset
    with torch.no_grad():
        before = either(batch["input_ids"], batch["pixel_values"]).logits
    either.resize_token_embeddings(800)
    assert either.config.visual_token_offset == 800
    tokens = either.get_image_tokens(batch["pixel_values"])
    assert torch.equal(tokens, codes + 800)
    with torch.no_grad():
        after = either(batch["input_ids"], batch["pixel_values"]).logits
    assert after.shape[-1] == 800 + 96
    assert torch.allclose(after[..., 800:], before[..., 768:], atol=1e-6)
    either.save_pretrained(tmp_path)
    assert UniCode2ForConditionalGeneration.from_pretrained(tmp_path).config.visual_token_offset == 800


def test_quantizer_stays_frozen(either, batch, tmp_path):
    either.save_pretrained(tmp_path)
    loaded = UniCode2ForConditionalGeneration.from_pretrained(tmp_path)
    for model in (either, loaded):
        frozen = frozen_state(model)
        model.train()
        assert not any(module.training for module in model.get_quantizer().modules())
        assert not any(parameter.requires_grad for parameter in model.get_quantizer().parameters())
        train_a_step(model, batch)
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in frozen.items())


def run_ddp(rank, path, failures):
    """One of two processes: two steps of a small model, with other images on each, and DDP as the Trainer has it."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2)
    model = UniCode2ForConditionalGeneration.from_pretrained(path).train()
    if rank == 1:  # would be overwritten by rank 0's if the buffers were sent around
        model.get_quantizer().codebook.cell_centroids.add_(1)
    frozen = frozen_state(model)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    ids = torch.arange(20, 40)[None] + rank
    ids[:, 5:] += 748  # visual ids
    for _ in range(2):
        train_a_step(wrapped, {"input_ids": ids, "labels": ids})
        model.zero_grad()
    gathered = [None, None]
    dist.all_gather_object(gathered, model.model.visual_embeddings.weight.detach())
    same = all(torch.equal(value, model.state_dict()[name]) for name, value in frozen.items())
    if not same or not torch.equal(*gathered):
        failures.put(rank)
    dist.destroy_process_group()


def test_ddp_leaves_the_quantizer_alone_and_keeps_the_ranks_equal(either, tmp_path):
    either.save_pretrained(tmp_path)
    context = torch.multiprocessing.get_context("spawn")
    failures = context.SimpleQueue()
    torch.multiprocessing.spawn(run_ddp, (str(tmp_path), failures), nprocs=2)
    assert failures.empty()


def test_resizing_below_the_ids_that_images_need_is_refused(either):
    with pytest.raises(ValueError, match="12 text ids are too few: 12 is an id that images need"):
        either.resize_token_embeddings(12)


def test_trainer_finds_the_labels():
    from transformers.utils import find_labels

    assert find_labels(UniCode2ForConditionalGeneration) == ["labels"]
