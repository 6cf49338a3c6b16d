import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor


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


# ------------------------------------------------------------------------------------ everything that `generate` offers


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


def begin_images_often(model, config, strength=2.5):
    """Lets text be followed by an image after a few ids."""
    with torch.no_grad():
        head = model.lm_head.weight
        head[config.boi_token_id] = head.mean(0) + strength * head.std() * torch.randn(
            head.shape[1], generator=torch.Generator().manual_seed(1)
        )


def test_plan_and_image_equal_what_interleaved_mode_writes(model, config):
    begin_images_often(model, config)
    model.generation_config.eos_token_id = None
    lengths = set()
    for prompt in torch.arange(20, 44).reshape(8, 1, 3):
        row = model.generate(prompt, generation_mode="interleaved", max_new_tokens=60, do_sample=False)[0, 3:].tolist()
        assert config.boi_token_id in row[:-17]
        begin = row.index(config.boi_token_id)
        lengths.add(begin)
        image = model.generate(prompt, generation_mode="image", max_plan_tokens=60, do_sample=False)
        assert image[0].tolist() == row[begin + 1 : begin + 17]
        cut = model.generate(prompt, generation_mode="image", max_plan_tokens=begin, do_sample=False)
        assert torch.equal(cut, image)
    assert len(lengths) > 2, lengths


def plan_lengths(model, rows, **options):
    """What the model sees when it begins the image, for each prompt alone."""
    lengths = []

    def count(module, args, kwargs):
        if kwargs["output_modality"] == "image" and kwargs["input_ids"].shape[1] > 1:
            lengths.append(kwargs["input_ids"].shape[1])

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    images = [model.generate(torch.tensor([row]), **options)[0] for row in rows]
    handle.remove()
    return torch.stack(images), [length - len(row) - 1 for length, row in zip(lengths, rows)]


@pytest.mark.parametrize("arguments", [{"guidance_scale": 1.0}, {"guidance_scale": 2.0}, {"num_return_sequences": 2}])
def test_plans_of_a_batch_equal_those_of_single_prompts(model, config, arguments):
    begin_images_often(model, config)
    options = {"generation_mode": "image", "max_plan_tokens": 20, "do_sample": False}
    rows = [[20, 21, 22], [23, 24], [26, 27, 28], [25]]
    alone, lengths = plan_lengths(model, rows, **options, guidance_scale=arguments.get("guidance_scale"))
    assert len(set(lengths)) > 2 and max(lengths) <= 20, lengths
    batch = torch.tensor([[0] * (3 - len(row)) + row for row in rows])
    if "num_return_sequences" in arguments:
        arguments, alone = {**arguments, "num_beams": 1, "do_sample": True, "top_k": 1}, alone.repeat_interleave(2, 0)
    options |= arguments
    together = model.generate(batch, attention_mask=(batch != 0).long(), **options)
    assert torch.equal(together, alone)
    model.generation_config.pad_token_id = 0
    assert torch.equal(model.generate(batch, **options), alone)  # the mask follows from the padding, as without a plan


def test_plan_ends_as_the_model_ends_text_whatever_config_is_given(model, config):
    from transformers import GenerationConfig

    prompt = torch.tensor([[23, 24]])
    options = {"generation_mode": "image", "max_plan_tokens": 8, "do_sample": False}
    model.generation_config.eos_token_id = None
    written = model.generate(prompt, max_new_tokens=8, do_sample=False)[0, 2:].tolist()
    end = next(id_ for i, id_ in enumerate(written) if i and id_ not in written[:i])
    cut = written[: written.index(end)]
    model.generation_config.eos_token_id = end
    expected = model.generate(
        torch.tensor([[23, 24, *cut, config.boi_token_id]]), generation_mode="image", do_sample=False
    )
    assert torch.equal(model.generate(prompt, **options), expected)
    given = GenerationConfig(do_sample=False, min_new_tokens=4, max_length=50, max_plan_tokens=8)
    assert torch.equal(model.generate(prompt, given, generation_mode="image"), expected)


def test_no_plan_behind_a_begun_image_nor_without_asking(model, config):
    begin_images_often(model, config)
    model.generation_config.image_generation = {"do_sample": False, "max_plan_tokens": 9}
    begun = torch.tensor([[20, 21, config.boi_token_id]])
    expected = model.generate(begun, generation_mode="image")
    assert torch.equal(expected, model.generate(begun[:, :2], generation_mode="image", max_plan_tokens=0))
    modalities = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: modalities.append(kwargs["output_modality"]), with_kwargs=True
    )
    model.generate(begun, generation_mode="image")
    assert set(modalities) == {"image"}
    model.generate(begun[:, :2], generation_mode="image")
    handle.remove()
    assert set(modalities) == {"plan", "image"}


@pytest.mark.parametrize("num_beams", [1, 2])
def test_plan_of_a_prompt_with_an_image(model, prompt, pixel_values, config, num_beams):
    begin_images_often(model, config)
    options = {"generation_mode": "image", "max_plan_tokens": 12, "guidance_scale": 2.0, "do_sample": False}
    model.generation_config.num_beams = num_beams
    from_pixels = model.generate(**prompt, pixel_values=pixel_values, **options)
    features = model.get_image_features(pixel_values, return_dict=True)
    from_features = model.generate(**prompt, mm_encoder_outputs={"image": features}, **options)
    assert torch.equal(from_pixels, from_features)
    ids = prompt["input_ids"].masked_scatter(
        prompt["input_ids"] == config.image_token_id, model.get_image_tokens(pixel_values).flatten()
    )
    assert torch.equal(model.generate(**{**prompt, "input_ids": ids}, **options), from_pixels)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"generation_mode": "image", "guidance_scale": "3"}, "`guidance_scale` is '3'"),
        ({"generation_mode": "image", "guidance_scale": -1.0}, "`guidance_scale` is -1.0"),
        ({"generation_mode": "image", "guidance_scale": float("nan")}, "`guidance_scale` is nan"),
        ({"generation_mode": "image", "max_plan_tokens": -1}, "`max_plan_tokens` is -1; it must be a whole number"),
        (
            {"generation_mode": "image", "max_plan_tokens": 4, "inputs": None, "inputs_embeds": torch.zeros(1, 2, 32)},
            "`inputs_embeds` does not go with a plan",
        ),
        ({"max_plan_tokens": 4}, "`max_plan_tokens` is 4 in text mode; it works in image mode only"),
        ({"generation_mode": "image", "max_time": 1e-9}, "ended the image after 1 of its 16 tokens"),
        ({"generation_mode": "image", "inputs": torch.zeros(1, 0, dtype=torch.long)}, r"has the shape \(1, 0\)"),
        ({"generation_mode": "image", "inputs": torch.tensor([20, 21])}, r"has the shape \(2,\)"),
        ({"generation_mode": "image", "inputs": torch.tensor([[20, 11], [20, 21]])}, "1 of 2 prompts end with"),
        (
            {"generation_mode": "image", "guidance_scale": 2.0, "prefill_chunk_size": 2},
            "`prefill_chunk_size` does not go",
        ),
        (
            {"generation_mode": "interleaved", "inputs": torch.tensor([[20, 11]]), "max_new_tokens": 5},
            "needs 17 more tokens",
        ),
        ({"inputs": torch.tensor([[20, 10, 10]])}, "2 image placeholders and no images"),
        ({"encoder_repetition_penalty": 1.2}, "`encoder_repetition_penalty` works on one vocabulary"),
        ({"negative_prompt_ids": torch.tensor([[20]])}, "`negative_prompt_ids` is not read by any mode: guidance"),
        (
            {"generation_mode": "image", "guidance_scale": 2.0, "negative_prompt_ids": torch.tensor([[20]])},
            "`negative_prompt_ids` is not read by any mode: guidance compares with",
        ),
        (
            {"generation_mode": "image", "negative_prompt_attention_mask": torch.tensor([[1]])},
            "`negative_prompt_attention_mask` is not read",
        ),
        ({"generation_mode": "image", "output_modality": "text"}, "`output_modality` is not read"),
        ({"generation_mode": "interleaved", "visual_guidance_scale": 2.0}, "`visual_guidance_scale` is not read"),
        ({"generation_mode": "image", "max_new_tokens": 3}, "`max_new_tokens` is 3, and an image has 16 tokens, no"),
        ({"generation_mode": "image", "max_new_tokens": "3"}, "`max_new_tokens` is '3', and an image has"),
        ({"generation_mode": "image", "max_length": 18}, "`max_length` is 18, .* 16 tokens behind 3 of the prompt"),
        ({"generation_mode": "image", "min_new_tokens": 17}, "`min_new_tokens` is 17, and an image has 16"),
        ({"generation_mode": "image", "min_length": 20}, "`min_length` is 20, and an image has 16 tokens behind 3"),
        (
            {"generation_mode": "image", "generation_config": GenerationConfig(max_new_tokens=3)},
            "`max_new_tokens` is 3, and an image has 16 tokens",
        ),
        ({"forced_eos_token_id": 775}, "`forced_eos_token_id` is 775; text ends with one of the 768 text ids"),
        ({"generation_mode": "interleaved", "forced_eos_token_id": [1, 775]}, r"is \[1, 775\]; text ends with one"),
    ],
)
def test_what_cannot_be_generated_is_refused_in_one_sentence(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**{"inputs": torch.tensor([[20, 21]]), **arguments})


ONLY_TEXT, ONLY_VISUAL = [5, 6], [771, 775]


@pytest.mark.parametrize("settings", [{"do_sample": False}, {"do_sample": True}, {"num_beams": 2}], ids=str)
@pytest.mark.parametrize(
    "mode, ids, message",
    [
        ("text", ONLY_VISUAL, "names an id beyond the 768 that this mode writes"),
        ("image", ONLY_TEXT, "leaves no id that this mode writes"),
        ("image", [5000], "names an id beyond the 864 that this mode writes"),
    ],
)
def test_functions_that_leave_no_id_of_a_mode_are_refused(model, settings, mode, ids, message):
    class Only(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor(ids), 0.0)

    prompt, options = torch.tensor([[20, 21]]), {"generation_mode": mode, **settings}
    options |= {"max_new_tokens": 4} if mode == "text" else {}
    with pytest.raises(ValueError, match=message):
        model.generate(prompt, prefix_allowed_tokens_fn=lambda row, written: ids, **options)
    with pytest.raises(ValueError, match="names an id beyond|leaves no id that this mode writes there, or brings back"):
        model.generate(prompt, logits_processor=[Only()], **options)


def test_functions_that_leave_some_ids_of_a_mode_are_followed(model):
    prompt = torch.tensor([[20, 21]])
    allowed = {"prefix_allowed_tokens_fn": lambda row, written: [*ONLY_TEXT, *ONLY_VISUAL], "do_sample": True}
    image = model.generate(prompt, generation_mode="image", **allowed)
    assert set(image.flatten().tolist()) <= set(ONLY_VISUAL)
    text = {"prefix_allowed_tokens_fn": lambda row, written: ONLY_TEXT, "do_sample": True, "max_new_tokens": 8}
    for options in ({}, {"remove_invalid_values": True}):
        assert set(model.generate(prompt, **text, **options)[0, 2:].tolist()) <= set(ONLY_TEXT)


def test_limits_that_an_image_keeps_are_taken(model):
    options = {"generation_mode": "image", "do_sample": False}
    right = model.generate(torch.tensor([[20, 21]]), **options)
    for limits in ({"max_new_tokens": 16}, {"max_length": 19}, {"min_new_tokens": 16}, {"max_new_tokens": 500}):
        assert torch.equal(model.generate(torch.tensor([[20, 21]]), **options, **limits), right)
    model.generation_config.max_new_tokens = 3
    assert torch.equal(model.generate(torch.tensor([[20, 21]]), **options), right)


def test_interleaved_from_embeddings_equals_that_from_ids(model, config):
    prompt = torch.tensor([[20, 21, 22]])
    options = {"generation_mode": "interleaved", "max_new_tokens": 30, "do_sample": False}
    ids = model.generate(prompt, **options)
    embeds = model.generate(inputs_embeds=model.get_input_embeddings()(prompt), **options)
    assert torch.equal(ids[:, 3:], embeds)


def test_batches_of_other_modes_are_refused(model):
    with pytest.raises(ValueError, match="`generate_batch` writes text only"):
        model.generate_batch([[20, 21]], generation_mode="image")


def test_pad_ids_without_a_mask_are_masked_as_in_text_mode(model, config):
    padded = torch.tensor([[0, 0, 20, 21]])
    options = {"generation_mode": "image", "do_sample": False, "guidance_scale": 2.0}
    single = model.generate(torch.tensor([[20, 21]]), **options)
    assert torch.equal(single, model.generate(padded, attention_mask=torch.tensor([[0, 0, 1, 1]]), **options))
    assert torch.equal(single, model.generate(padded, **options))
