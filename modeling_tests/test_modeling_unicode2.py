import warnings
from inspect import signature

import pytest
import torch
from transformers import DynamicCache, modeling_utils

from transformers_unicode2 import UniCode2Config, UniCode2ForConditionalGeneration
from transformers_unicode2.modeling_unicode2 import CACHE_NAME
from transformers_unicode2.visual_head_unicode2 import keep_positions


def test_pixels_and_their_visual_token_ids_give_the_same_logits(model, prompt, pixel_values, config):
    ids = prompt["input_ids"].clone()
    ids[ids == config.image_token_id] = model.get_image_tokens(pixel_values).flatten()
    with torch.no_grad():
        from_pixels = model(**prompt, pixel_values=pixel_values).logits
        from_ids = model(input_ids=ids, attention_mask=prompt["attention_mask"]).logits
    assert torch.equal(from_pixels, from_ids)


def test_image_tokens_are_the_nearest_codes_behind_the_offset(model, pixel_values, config):
    features = model.get_quantizer().get_image_features(pixel_values).last_hidden_state
    codes = torch.cdist(features.double(), model.get_quantizer().codebook.codes.double()).argmin(-1)
    assert torch.equal(model.get_image_tokens(pixel_values), codes + config.visual_token_offset)


def test_output_modalities_are_parts_of_the_unified_logits(model, prompt, pixel_values, config):
    inputs = {**prompt, "pixel_values": pixel_values, "logits_to_keep": 1}
    with torch.no_grad():
        both, text, image = (model(**inputs, output_modality=m).logits for m in (None, "text", "image"))
    offset = config.visual_token_offset
    assert both.shape[-1] == offset + config.codebook_config.codebook_size
    frame = torch.tensor([config.boi_token_id, config.eoi_token_id, config.image_token_id])
    assert torch.equal(both[..., :offset].index_fill(-1, frame, -torch.inf), text)
    assert torch.equal(both[..., offset:], image[..., offset:])
    assert image[..., :offset].isneginf().all()


def test_loss_agrees_with_cross_entropy_over_each_head(model, prompt, pixel_values, config):
    offset = config.visual_token_offset
    labels = prompt["input_ids"].clone()
    labels[0, :3] = -100
    output = model(**prompt, pixel_values=pixel_values, labels=labels)
    logits = model(**prompt, pixel_values=pixel_values).logits[:, :-1]
    target = prompt["input_ids"].clone()
    target[target == config.image_token_id] = model.get_image_tokens(pixel_values).flatten()
    target[labels == -100] = -100
    target = target[:, 1:]
    text, visual = (target >= 0) & (target < offset), target >= offset
    cross_entropy = torch.nn.functional.cross_entropy
    text_loss = cross_entropy(logits[text][:, :offset], target[text])
    visual_loss = cross_entropy(logits[visual][:, offset:], target[visual] - offset)
    torch.testing.assert_close(output.text_loss, text_loss)
    torch.testing.assert_close(output.visual_loss, visual_loss)
    total = (text_loss * text.sum() + visual_loss * visual.sum()) / (text.sum() + visual.sum())
    torch.testing.assert_close(output.loss, total)


def test_gradients_reach_c2_and_never_the_quantizer(model, prompt, pixel_values):
    model.train()
    model(**prompt, pixel_values=pixel_values, labels=prompt["input_ids"]).loss.backward()
    assert model.model.visual_embeddings.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.get_quantizer().parameters())
    assert not model.get_quantizer().training


def test_load_after_save_gives_the_same_bits_and_a_frozen_quantizer(model, prompt, pixel_values, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = UniCode2ForConditionalGeneration.from_pretrained(tmp_path)
    assert not any(parameter.requires_grad for parameter in loaded.get_quantizer().parameters())
    with torch.no_grad():
        assert torch.equal(
            loaded(**prompt, pixel_values=pixel_values).logits, model(**prompt, pixel_values=pixel_values).logits
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_codes_do_not_change_with_the_dtype_of_the_model(model, pixel_values, tmp_path, dtype):
    model.save_pretrained(tmp_path)
    loaded = UniCode2ForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.lm_head.weight.dtype == dtype
    assert torch.equal(loaded.get_image_tokens(pixel_values), model.get_image_tokens(pixel_values))
    codebook = loaded.get_quantizer().codebook
    assert codebook.codes.dtype == torch.float32 and codebook.cell_offsets.dtype == torch.int64


def test_checkpoint_without_codebook_is_refused(model, tmp_path):
    from safetensors.torch import load_file, save_file

    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if ".codebook." not in k},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(ValueError, match="no codebook: model.quantizer.codebook.cell_centroids"):
        UniCode2ForConditionalGeneration.from_pretrained(tmp_path)


def test_ids_outside_the_vocabulary_are_refused_with_the_range(model):
    with pytest.raises(ValueError, match="runs from 5 to 864; the vocabulary has ids 0 to 863"):
        model(input_ids=torch.tensor([[5, 864]]))


def test_wrong_number_of_placeholders_is_refused_with_both_numbers(model, prompt, pixel_values):
    with pytest.raises(ValueError, match="holds 32 image placeholders and the images need 16"):
        model(**prompt, pixel_values=pixel_values[:1])


def test_sizes_that_disagree_are_refused():
    with pytest.raises(ValueError, match="`hidden_size` is 16 and the codebook's `codebook_dim` is 24"):
        UniCode2Config(vision_config={"hidden_size": 16}, codebook_config={"codebook_dim": 24})


def test_preview_mosaic_holds_the_thumbnails_in_raster_order(model, config):
    ids = torch.arange(16)[None] + config.visual_token_offset
    image = model.decode_image_tokens(ids)
    previews = model.get_quantizer().codebook.previews
    assert image.shape == (1, 3, 16, 16)
    assert torch.equal(image[0, :, 4:8, 8:12], previews[6].permute(2, 0, 1) / 255)  # row 1, column 2


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_cache_is_taken_under_its_old_and_its_new_name(model, prompt, name):
    ids = prompt["input_ids"].masked_fill(prompt["input_ids"] == 10, 768 + 7)[:1]
    with torch.no_grad(), warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always", FutureWarning)
        whole = model(ids).logits
        cache = DynamicCache(config=model.config.text_config)
        model(ids[:, :-1], **{name: cache})
        last = model(ids[:, -1:], **{name: cache})
    assert any("`past_key_values` is deprecated" in str(w.message) for w in heard) == (name != CACHE_NAME == "cache")
    assert cache.get_seq_length() == ids.shape[1] and last[CACHE_NAME] is cache
    torch.testing.assert_close(last.logits[:, -1], whole[:, -1])


def test_a_cache_under_both_names_is_refused(model):
    cache = DynamicCache(config=model.config.text_config)
    with pytest.raises(ValueError, match="Give at most one of `past_key_values` and `cache`"):
        model(torch.tensor([[20]]), past_key_values=cache, cache=cache)


@pytest.mark.parametrize("name", sorted({"past_key_values", CACHE_NAME}))
def test_generate_goes_on_from_a_cache_under_either_name(model, name):
    ids, options = torch.arange(20, 40)[None], {"max_new_tokens": 4, "do_sample": False, "eos_token_id": -1}
    cache = DynamicCache(config=model.config.text_config)
    model(ids[:, :12], **{name: cache})
    assert torch.equal(model.generate(ids, **{name: cache}, **options), model.generate(ids, **options))
    assert cache.get_seq_length() == 23


def test_positions_are_kept_as_stock_models_keep_them():
    hidden = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    if not hasattr(modeling_utils, "slice_logits_to_keep"):
        pytest.skip("Transformers has it from 5.21 on")
    stock = modeling_utils.slice_logits_to_keep
    for kept in (0, 1, 3, torch.tensor([4, 0]), torch.tensor([[1, 2], [4, 3]]), torch.rand(2, 5) > 0.5):
        assert torch.equal(keep_positions(hidden, kept), stock(hidden, kept))


def test_tasks_run_by_way_of_the_forward(model, pixel_values):
    codes = torch.tensor([[3, 95]])
    assert torch.equal(model(codes, task="embed_codes"), model.model.visual_embeddings.weight[codes])
    tokens = model(pixel_values=pixel_values, task="get_image_tokens")
    assert torch.equal(tokens, model.get_image_tokens(pixel_values))
    # The Trainer would hand over a column of this name.
    assert "task" not in signature(model.forward).parameters
