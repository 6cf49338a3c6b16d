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


def count_calls(module):
    """List that grows by the batch size at each call of a module."""
    calls = []
    module.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    return calls


def test_neither_mode_pays_for_the_other_head(model, prompt, pixel_values):
    text, visual = count_calls(model.lm_head), count_calls(model.visual_head)
    model.generate(**prompt, pixel_values=pixel_values, max_new_tokens=4)
    assert text and not visual
    text.clear()
    model.generate(**prompt, pixel_values=pixel_values, generation_mode="image")
    assert visual and not text


@pytest.mark.parametrize("guidance_scale, rows", [(None, 2), (1.0, 2), (3.0, 4)])
def test_guidance_is_one_forward_and_scale_one_costs_nothing(model, prompt, pixel_values, config, guidance_scale, rows):
    calls = count_calls(model.visual_head)
    model.generate(**prompt, pixel_values=pixel_values, generation_mode="image", guidance_scale=guidance_scale)
    assert calls == [rows] * config.num_image_tokens


@pytest.mark.parametrize("mode", ["text", "image"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 0.7, "top_k": 5},
        {"do_sample": True, "top_p": 0.8},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"cache_implementation": "static"},
        {"use_cache": False},
    ],
    ids=lambda a: ",".join(f"{k}={v}" for k, v in a.items()),
)
def test_generation_strategies(model, prompt, pixel_values, config, mode, arguments):
    model.generation_config.eos_token_id = None
    arguments = {**arguments, "generation_mode": mode}
    if mode == "text":
        arguments["max_new_tokens"] = 6
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        runs.append(model.generate(**prompt, pixel_values=pixel_values, **arguments))
    assert torch.equal(*runs)
    written = runs[0] if mode == "image" else runs[0][:, prompt["input_ids"].shape[1] :]
    assert written.shape == (
        2 * arguments.get("num_return_sequences", 1),
        config.num_image_tokens if mode == "image" else 6,
    )
    assert ((written >= config.visual_token_offset) == (mode == "image")).all()


@pytest.mark.parametrize("mode", ["text", "image"])
def test_cache_does_not_change_what_is_written(model, prompt, pixel_values, mode):
    arguments = {**prompt, "pixel_values": pixel_values, "generation_mode": mode, "do_sample": False}
    if mode == "text":
        arguments["max_new_tokens"] = 12
    dynamic = model.generate(**arguments)
    assert torch.equal(dynamic, model.generate(**arguments, use_cache=False))
    assert torch.equal(dynamic, model.generate(**arguments, cache_implementation="static"))


def test_top_k_and_top_p_act_on_the_visual_ids(model):
    prompt = torch.tensor([[20, 21]])
    greedy = model.generate(prompt, generation_mode="image", do_sample=False)
    for arguments in ({"top_k": 1}, {"top_p": 1e-6}):
        assert torch.equal(greedy, model.generate(prompt, generation_mode="image", do_sample=True, **arguments))


def test_image_as_visual_ids_equals_image_as_pixels(model, prompt, pixel_values, config):
    ids = prompt["input_ids"].masked_scatter(
        prompt["input_ids"] == config.image_token_id, model.get_image_tokens(pixel_values)
    )
    for mode in ("text", "image"):
        arguments = {"attention_mask": prompt["attention_mask"], "generation_mode": mode, "do_sample": False}
        if mode == "text":
            arguments["max_new_tokens"] = 8
        given = model.generate(ids, **arguments)
        read = model.generate(prompt["input_ids"], pixel_values=pixel_values, **arguments)
        assert torch.equal(given[:, -8:], read[:, -8:])


def test_prompt_with_several_images(model, prompt, pixel_values, config):
    block = prompt["input_ids"][:1, 1:19]
    two = torch.cat([torch.tensor([[20]]), block, torch.tensor([[21]]), block, torch.tensor([[22]])], 1)
    together = model.generate(two, pixel_values=pixel_values, max_new_tokens=6, do_sample=False)
    tokens = model.get_image_tokens(pixel_values)
    ids = two.masked_scatter(two == config.image_token_id, tokens)
    assert torch.equal(together[:, -6:], model.generate(ids, max_new_tokens=6, do_sample=False)[:, -6:])


def test_inputs_embeds(model, prompt, config):
    ids = prompt["input_ids"][:1, -2:]
    embeds = model.model.embed_input_ids(ids)
    written = model.generate(inputs_embeds=embeds, max_new_tokens=6, do_sample=False)
    assert torch.equal(written, model.generate(ids, max_new_tokens=6, do_sample=False)[:, 2:])
    for scale in (None, 2.0):
        arguments = {"generation_mode": "image", "do_sample": False, "guidance_scale": scale}
        assert torch.equal(model.generate(inputs_embeds=embeds, **arguments), model.generate(ids, **arguments))
    with pytest.raises(ValueError, match="Image mode needs a prompt: `input_ids` or `inputs_embeds`"):
        model.generate(generation_mode="image")


def test_streamer_and_stopping_criteria(model):
    from transformers import MaxTimeCriteria, StoppingCriteriaList
    from transformers.generation.streamers import BaseStreamer

    class Collect(BaseStreamer):
        def __init__(self):
            self.ids, self.ended = [], False

        def put(self, value):
            self.ids += value.flatten().tolist()

        def end(self):
            self.ended = True

    for mode in ("text", "image"):
        streamer = Collect()
        length = {"max_new_tokens": 5} if mode == "text" else {}
        output = model.generate(torch.tensor([[20, 21]]), generation_mode=mode, streamer=streamer, **length)
        assert streamer.ended and streamer.ids[-len(output[0]) :] == output[0].tolist()
    stopped = model.generate(
        torch.tensor([[20, 21]]), max_new_tokens=50, stopping_criteria=StoppingCriteriaList([MaxTimeCriteria(0.0)])
    )
    assert stopped.shape[1] == 3


def test_interleaved_never_begins_an_image_that_would_not_fit(model, config):
    model.generation_config.eos_token_id = None
    with torch.no_grad():  # the begin-of-image id is by far the likeliest text
        model.lm_head.weight[config.boi_token_id] = 50 * model.model.language_model.norm.weight
    for room in range(1, 2 * (config.num_image_tokens + 2) + 2):
        row = model.generate(torch.tensor([[20]]), generation_mode="interleaved", max_new_tokens=room, do_sample=True)
        row = row[0].tolist()
        assert row.count(config.boi_token_id) == row.count(config.eoi_token_id)
        assert sum(id_ >= config.visual_token_offset for id_ in row) == 16 * row.count(config.boi_token_id)


def test_details_of_a_generation(model):
    output = model.generate(
        torch.tensor([[20, 21]]),
        generation_mode="image",
        return_dict_in_generate=True,
        output_scores=True,
        do_sample=False,
    )
    assert output.sequences.shape == (1, 3 + 16) and len(output.scores) == 16


def test_continuous_batching_equals_generate(model, prompt, pixel_values, config):
    ids = prompt["input_ids"].masked_scatter(
        prompt["input_ids"] == config.image_token_id, model.get_image_tokens(pixel_values)
    )
    requests = [row[mask.bool()].tolist() for row, mask in zip(ids, prompt["attention_mask"])]
    from transformers import GenerationConfig

    settings = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    results = model.generate_batch(requests, generation_config=settings)
    for request, result in zip(requests, results.values()):
        alone = model.generate(torch.tensor([request]), max_new_tokens=6, do_sample=False, eos_token_id=-1)
        assert result.generated_tokens == alone[0, len(request) :].tolist()


@pytest.mark.parametrize("mode", ["text", "image", "interleaved"])
def test_candidate_generation_is_refused(model, mode):
    with pytest.raises(ValueError, match="`prompt_lookup_num_tokens` works on one vocabulary; this one is split"):
        model.generate(torch.tensor([[20, 21]]), generation_mode=mode, prompt_lookup_num_tokens=2)


@pytest.mark.parametrize("guidance_scale", [None, 3.0])
@pytest.mark.parametrize("arguments", [{}, {"cache_implementation": "static"}])
def test_beams_equal_beams_without_a_cache(model, guidance_scale, arguments):
    options = {"generation_mode": "image", "num_beams": 3, "do_sample": False, "guidance_scale": guidance_scale}
    prompt = torch.tensor([[20, 21, 22], [23, 24, 25]])
    expected = model.generate(prompt, use_cache=False, **options)
    assert torch.equal(expected, model.generate(prompt, **options, **arguments))


def test_generation_config_of_the_caller_is_followed(model):
    from transformers import GenerationConfig

    model.generation_config.image_generation = {"do_sample": True, "guidance_scale": 3.0, "top_k": 0}
    prompt = torch.tensor([[20, 21, 22]])
    rows = []
    handle = model.visual_head.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    greedy = GenerationConfig(do_sample=False)
    expected = model.generate(prompt, generation_mode="image", do_sample=False, guidance_scale=1.0)
    assert torch.equal(expected, model.generate(prompt, generation_mode="image", generation_config=greedy))
    assert set(rows) == {1}
    rows.clear()
    guided = GenerationConfig(do_sample=False, guidance_scale=2.0)
    output = model.generate(prompt, guided, generation_mode="image")
    handle.remove()
    assert set(rows) == {2} and guided.guidance_scale == 2.0
    expected = model.generate(prompt, generation_mode="image", do_sample=False, guidance_scale=2.0)
    assert torch.equal(output, expected)
    with pytest.raises(ValueError, match="works on one vocabulary"):
        model.generate(prompt, GenerationConfig(prompt_lookup_num_tokens=2))


def test_penalties_read_prompts_with_visual_ids(model, config):
    image = torch.arange(16) + config.visual_token_offset
    prompt = torch.cat([torch.tensor([20, 11]), image, torch.tensor([12, 21])])[None]
    output = model.generate(prompt, max_new_tokens=6, repetition_penalty=1.5, no_repeat_ngram_size=2, do_sample=False)
    assert (output[:, 20:] < config.visual_token_offset).all()


def test_interleaved_from_embeddings_equals_that_from_ids(model, config):
    prompt = torch.tensor([[20, 21, 22]])
    options = {"generation_mode": "interleaved", "max_new_tokens": 30, "do_sample": False}
    ids = model.generate(prompt, **options)
    embeds = model.generate(inputs_embeds=model.get_input_embeddings()(prompt), **options)
    assert torch.equal(ids[:, 3:], embeds)


def test_pad_ids_without_a_mask_are_masked_as_in_text_mode(model, config):
    padded = torch.tensor([[0, 0, 20, 21]])
    options = {"generation_mode": "image", "do_sample": False, "guidance_scale": 2.0}
    single = model.generate(torch.tensor([[20, 21]]), **options)
    assert torch.equal(single, model.generate(padded, attention_mask=torch.tensor([[0, 0, 1, 1]]), **options))
    assert torch.equal(single, model.generate(padded, **options))
