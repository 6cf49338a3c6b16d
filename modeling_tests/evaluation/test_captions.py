"""Likelihoods with a shared cache are those of whole sequences, and a model that reads its images is told apart."""

import pytest
import torch
from datasets import Dataset

from transformers_unicode2 import UniCode2ForConditionalGeneration
from transformers_unicode2.evaluation import captions
from transformers_unicode2.evaluation.card_files import read_card
from transformers_unicode2.scenes.sample import sample_scene
from transformers_unicode2.scenes.scene import draw_scene
from transformers_unicode2.scenes.texts import dense_caption


def make_row(codes, caption, question="describe the image in detail."):
    parts = [{"type": "image", "text": None}, {"type": "text", "text": question}]
    answer = [{"type": "text", "text": caption}]
    return {
        "messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}],
        "codes": [codes],
    }


@pytest.fixture(scope="module")
def scene_rows(tiny_model, processor):
    """Two dozen drawn scenes with captions, tokenized by the embedded model, which knows such."""
    import numpy as np

    rng = np.random.default_rng(5)
    scenes = [sample_scene(rng, "test") for _ in range(24)]
    pixels = processor.image_processor([draw_scene(scene, 64) for scene in scenes], return_tensors="pt")["pixel_values"]
    codes = tiny_model.get_image_tokens(pixels) - tiny_model.config.visual_token_offset
    return [make_row(row, dense_caption(scene)) for row, scene in zip(codes.tolist(), scenes)]


@pytest.fixture
def folder(scene_rows, tmp_path):
    (tmp_path / "tokens").mkdir()
    Dataset.from_list(scene_rows).to_parquet(str(tmp_path / "tokens" / "train-00000.parquet"))
    return tmp_path / "tokens"


def run(*words):
    return captions.main(captions.make_parser().parse_args([*map(str, words)]))


def test_answers_are_as_likely_as_in_whole_sequences(model):
    generator = torch.Generator().manual_seed(0)
    offset = model.config.visual_token_offset
    prompts = torch.randint(20, offset + 96, (3, 9), generator=generator).tolist()
    answers = [torch.randint(20, offset, (length,), generator=generator).tolist() for length in (1, 4, 2, 7, 3, 1)]
    losses, _ = captions.score_answers(model, prompts, answers)
    for number, answer in enumerate(answers):
        prompt = prompts[number // 2]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer]), output_modality="text").logits[0]
        wanted = -logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(answer)[:, None]).sum()
        assert losses[number].item() == pytest.approx(wanted.item(), rel=1e-5)


def test_greedy_answers_are_those_of_generate(model):
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(20, 700, (4, 6), generator=generator)
    written = model.generate(prompts, do_sample=False, max_new_tokens=5, min_new_tokens=5)[:, 6:]
    changed = written.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 700
    answers = [ids for pair in zip(written.tolist(), changed.tolist()) for ids in pair]
    _, greedy = captions.score_answers(model, prompts.tolist(), answers)
    assert greedy.tolist() == [True, False] * 4


def test_losses_are_those_of_each_caption_with_both_images(tiny_model, processor, scene_rows):
    rows = Dataset.from_list(scene_rows[:4])
    pairs = captions.choose_pairs(rows, tiny_model.config, processor, 4, seed=0)
    report = captions.measure_reading(tiny_model, pairs, 2, batch_size=3)

    def loss(pair, codes):
        offset = tiny_model.config.visual_token_offset
        ids, mask = processor.encode_chat(make_row(codes, pair.caption)["messages"], [[offset + c for c in codes]])
        labels = [id_ if flag else -100 for id_, flag in zip(ids, mask)]
        with torch.no_grad():
            return tiny_model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).text_loss.item()

    own = [loss(pair, pair.codes) for pair in pairs]
    other = [loss(pair, pairs[i - 1].codes) for i, pair in enumerate(pairs)]
    gaps = torch.tensor(other) - torch.tensor(own)
    # Bfloat16 weights
    assert report["own_loss"] == pytest.approx(sum(own) / 4, abs=0.05)
    assert report["image_gap"] == pytest.approx(gaps.mean().item(), abs=0.1)
    assert report["image_gap_standard_error"] == pytest.approx((gaps.std() / 2).item(), abs=0.1)


def test_a_model_that_reads_is_told_from_one_whose_images_are_mixed_up(tiny_model, processor, scene_rows):
    mixed = [{**row, "codes": other["codes"]} for row, other in zip(scene_rows, scene_rows[1:] + scene_rows[:1])]
    reports = []
    for rows in (scene_rows, mixed):
        pairs = captions.choose_pairs(Dataset.from_list(rows), tiny_model.config, processor, 24, seed=0)
        reports.append(captions.measure_reading(tiny_model, pairs, 4, batch_size=8))
    right, wrong = reports
    assert right["image_gap"] > 5 * right["image_gap_standard_error"] > 0
    assert right["chosen"]["percent"] > 80 and right["named_exactly"]["right"] > 0
    assert wrong["image_gap"] < right["image_gap"] / 2 and wrong["chosen"]["percent"] < 60
    assert wrong["named_exactly"]["right"] < right["named_exactly"]["right"]


def test_rows_are_chosen_by_the_seed_and_differ(tiny_model, processor, scene_rows):
    config = tiny_model.config
    twins = [scene_rows[0], {**scene_rows[1], "codes": scene_rows[0]["codes"]}, make_row([1] * 64, "a"), scene_rows[0]]
    text = {"messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}], "codes": []}
    drawn = {**scene_rows[2], "messages": scene_rows[2]["messages"][::-1]}
    pairs = captions.choose_pairs(Dataset.from_list([*twins, text, drawn]), config, processor, 9, seed=0)
    assert len(pairs) == 2
    rows = Dataset.from_list(scene_rows)
    by_seed = [[p.caption for p in captions.choose_pairs(rows, config, processor, 8, seed)] for seed in (0, 0, 1)]
    assert by_seed[0] == by_seed[1] != by_seed[2] and len(set(by_seed[0])) == 8


def test_bags_of_codes_do_not_know_places():
    torch.manual_seed(0)
    images, codes = torch.randint(0, 500, (30, 64)), torch.randn(500, 16)
    moved = images[:, torch.randperm(64)]
    found = captions.compare_bags(moved, images.tolist(), codes)
    assert found["counts"]["right"] == found["vectors"]["right"] == 30
    by_chance = captions.compare_bags(torch.randint(0, 500, (30, 64)), images.tolist(), codes)
    assert by_chance["counts"]["right"] < 8 and by_chance["vectors"]["right"] < 8


def test_drawings_follow_the_seed_and_the_batch(model, processor):
    options = {"do_sample": True, "guidance_scale": 1.0}
    prompts = ["a red circle", "two blue squares", "a star"]
    first, again, other = (captions.draw(model, processor, prompts, seed, 2, options) for seed in (0, 0, 1))
    assert first.shape == (3, model.config.num_image_tokens) and first.min() >= 0 and first.max() < 96
    assert torch.equal(first, again) and not torch.equal(first, other)
    greedy = captions.draw(model, processor, prompts, 0, 2, {"do_sample": False})
    assert torch.equal(greedy, captions.draw(model, processor, prompts, 1, 3, {"do_sample": False}))


def test_command_writes_what_it_prints(tiny_checkpoint, folder, capsys):
    words = ("--model", tiny_checkpoint, "--data", folder, "--num-rows", 3, "--num-choices", 3, "--draw")
    report = run(*words, "--guidance", 1, "--temperature", 0, "--json", folder.parent / "card.json")
    card = read_card(folder.parent / "card.json")
    figures = {figure.name: figure for figure in card.figures}
    assert figures["image_gap"].value == pytest.approx(report["image_gap"]) and figures["image_gap"].count == 3
    assert figures["chosen"].value == pytest.approx(report["chosen"]["percent"])
    assert len(card.items["drawn, by counts"]) == 3 and card.protocol["drawing"]["guidance_scale"] == 1
    assert card.protocol["num_rows"] == 3 and card.run["batch_size"] == 8
    assert report["drawn"]["counts"]["of"] == len(report["examples"]) == 3
    printed = capsys.readouterr().out
    assert f"{report['image_gap']:.3f}, standard error" in printed and "drawn, by vectors | " in printed
    assert "of 3, chance 33.3 %)" in printed


def test_adapter_that_changes_nothing_measures_as_its_checkpoint(tiny_checkpoint, folder, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = UniCode2ForConditionalGeneration.from_pretrained(tiny_checkpoint)
    get_peft_model(base, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    words = ("--data", folder, "--num-rows", 3, "--num-choices", 3)
    adapter, whole = (run("--model", model, *words) for model in (tmp_path / "adapter", tiny_checkpoint))
    assert {**adapter, "model": whole["model"]} == whole


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--data", "{}", "--split", "test"], "has no test-*.parquet"),
        (["--data", "{}", "--num-rows", "5"], "--num-rows is 5; 10 choices need at least as many."),
        (["--data", "{}", "--num-rows", "90", "--num-choices", "30"], "has 24 rows with one image"),
        (["--data", "{}", "--draw-prompt", "x"], "has no {caption} in it"),
        (["--data", "{}", "--json", "{}"], "is a folder; give a file."),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(tiny_checkpoint, folder, words, sentence):
    with pytest.raises(ValueError, match=".") as error:
        run("--model", tiny_checkpoint, *(word.replace("{}", str(folder)) for word in words))
    assert sentence in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("codes", [[9000] * 64, [1] * 63])
def test_codes_that_the_model_does_not_have_are_refused(tiny_checkpoint, tmp_path, codes):
    Dataset.from_list([make_row(codes, "a")] * 3).to_parquet(str(tmp_path / "train-00000.parquet"))
    with pytest.raises(ValueError, match="train-00000.parquet .*codes"):
        run("--model", tiny_checkpoint, "--data", tmp_path, "--num-rows", 3, "--num-choices", 3)


def test_codes_of_another_quantizer_are_refused(tiny_checkpoint, scene_rows, tmp_path):
    from transformers_unicode2.tokens import hash_image_processor
    from transformers_unicode2.training.shards import write_shard

    note = {"quantizer": "0" * 64, "image processor": hash_image_processor(str(tiny_checkpoint))}
    rows = [{**row, "source": 1, "row": number} for number, row in enumerate(scene_rows)]
    write_shard(tmp_path / "train-00000.parquet", rows, 8192, [], note)
    with pytest.raises(ValueError, match="has codes of another quantizer"):
        run("--model", tiny_checkpoint, "--data", tmp_path, "--num-rows", 3, "--num-choices", 3)


def test_the_name_of_a_folder_is_no_pattern(tmp_path):
    (tmp_path / "t[1]").mkdir()
    file = tmp_path / "t[1]/train-0.parquet"
    Dataset.from_list([{"messages": [{"role": "user"}], "codes": [[1]]}]).to_parquet(str(file))
    assert len(captions.open_rows([file])) == 1


def test_the_same_rows_have_the_same_protocol(tiny_checkpoint, folder, tmp_path):
    """Whether their number was asked for or not."""
    words = ("--model", tiny_checkpoint, "--data", folder, "--num-choices", 3)
    for name, more in (("all", ()), ("number", ("--num-rows", 24))):
        run(*words, *more, "--json", tmp_path / f"{name}.json")
    one, other = (read_card(tmp_path / f"{name}.json") for name in ("all", "number"))
    assert one.protocol_hash == other.protocol_hash and one.items == other.items
