import pytest
import torch


def test_text_mode_writes_no_visual_ids(model, prompt, pixel_values, config):
    model.generation_config.eos_token_id = None
    output = model.generate(**prompt, pixel_values=pixel_values, max_new_tokens=40, do_sample=True)
    written = output[:, prompt["input_ids"].shape[1] :]
    assert written.shape == (2, 40)
    assert (written < config.visual_token_offset).all()
    assert not torch.isin(
        written, torch.tensor([config.boi_token_id, config.eoi_token_id, config.image_token_id])
    ).any()


@pytest.mark.parametrize("guidance_scale", [None, 1.0, 3.0])
def test_image_mode_writes_one_image_of_visual_ids(model, config, guidance_scale):
    ids = torch.tensor([[20, 21]])
    output = model.generate(ids, generation_mode="image", guidance_scale=guidance_scale, do_sample=True)
    assert output.shape == (1, config.num_image_tokens)
    assert (output >= config.visual_token_offset).all()


def test_guidance_agrees_with_two_separate_passes(model, config):
    prompt, boi = torch.tensor([[20, 21, config.boi_token_id]]), torch.tensor([[config.boi_token_id]])
    tokens = model.generate(prompt, generation_mode="image", guidance_scale=2.5, do_sample=False)
    for step in range(config.num_image_tokens):
        with torch.no_grad():
            conditional = model(torch.cat([prompt, tokens[:, :step]], 1), output_modality="image").logits[:, -1]
            unconditional = model(torch.cat([boi, tokens[:, :step]], 1), output_modality="image").logits[:, -1]
        offset = config.visual_token_offset
        guided = unconditional[:, offset:] + 2.5 * (conditional[:, offset:] - unconditional[:, offset:])
        best, written = guided.max(), guided[0, tokens[0, step] - offset]
        assert best - written < 1e-5, step


def test_left_padded_batch_equals_single_runs(model, config):
    long, short = [20, 21, 22, 23], [24, 25]
    batch = torch.tensor([long, [0, 0, *short]])
    mask = (batch != 0).long()
    together = model.generate(batch, attention_mask=mask, generation_mode="image", guidance_scale=2.0, do_sample=False)
    for row, ids in zip(together, (long, short)):
        alone = model.generate(torch.tensor([ids]), generation_mode="image", guidance_scale=2.0, do_sample=False)
        assert torch.equal(row, alone[0])


def test_interleaved_image_blocks_are_whole(model, config):
    torch.manual_seed(0)
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        model.lm_head.weight[config.boi_token_id] = model.lm_head.weight.mean(0) + 3 * model.lm_head.weight.std()
    rows = model.generate(
        torch.tensor([[20, 21]] * 4), generation_mode="interleaved", max_new_tokens=120, do_sample=True
    )
    blocks = 0
    for row in rows.tolist():
        position = 2
        while position < len(row):
            if row[position] == config.boi_token_id:
                block = row[position + 1 : position + 1 + config.num_image_tokens]
                assert all(id_ >= config.visual_token_offset for id_ in block)
                after = position + 1 + config.num_image_tokens
                assert after >= len(row) or row[after] == config.eoi_token_id
                position, blocks = after, blocks + 1
            else:
                assert row[position] < config.visual_token_offset
            position += 1
    assert blocks


def test_same_seed_gives_the_same_image(model):
    runs = []
    for _ in range(2):
        torch.manual_seed(7)
        runs.append(model.generate(torch.tensor([[20]]), generation_mode="image", do_sample=True))
    assert torch.equal(*runs)


def test_unknown_mode_and_guidance_in_text_mode_are_refused(model):
    with pytest.raises(ValueError, match="`generation_mode` is 'video'; it must be one of text, image, interleaved"):
        model.generate(torch.tensor([[20]]), generation_mode="video")
    with pytest.raises(ValueError, match="`guidance_scale` is 3.0 in text mode"):
        model.generate(torch.tensor([[20]]), guidance_scale=3.0)
