"""The figures of an evaluation."""

import numpy as np
import pytest
import torch

from transformers_unicode2.evaluation.card_files import read_card
from transformers_unicode2.evaluation.scenes import find_others, main, make_parser, shares, shuffle
from transformers_unicode2.scenes.scene import SEEN_PAIRS
from transformers_unicode2.scenes.texts import CATEGORIES, sample_prompt


def test_shares_are_percentages_over_all_and_per_kind():
    assert shares(["a", "a", "b"], [True, False, True]) == {"all": pytest.approx(200 / 3), "a": 50.0, "b": 100.0}


def test_chance_is_of_other_prompts_of_the_category():
    """Whatever their number; one without another is left out."""
    rng = np.random.default_rng(0)
    for count in (6, 7, 20):
        prompts = [sample_prompt(CATEGORIES[i % 6], rng, SEEN_PAIRS) for i in range(count)]
        others = find_others(prompts)
        assert all(prompts[i].category == prompts[k].category for i, k in others.items())
        assert all(prompts[i].text != prompts[k].text for i, k in others.items())
        texts = [{two.text for two in prompts if two.category == one.category} for one in prompts]
        assert [*others] == [i for i, of_category in enumerate(texts) if len(of_category) > 1]
    assert len(others) > 15


@pytest.mark.parametrize("name", ["README.json", "notes.txt", "card.md"])
def test_files_of_others_stay(tiny_checkpoint, tmp_path, name):
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "notes.txt").write_text("mine")
    before = {file.name: file.read_text() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="--json|README.md is there"):
        main(make_parser().parse_args(["--model", str(tiny_checkpoint), "--json", str(tmp_path / name)]))
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == before


def test_shuffled_codes_are_the_same_codes_elsewhere():
    tokens = torch.arange(12).reshape(3, 4)
    mixed = shuffle(tokens, np.random.default_rng(0))
    assert mixed.shape == tokens.shape and not torch.equal(mixed, tokens)
    assert torch.equal(mixed.flatten().sort().values, tokens.flatten())


def test_a_card_has_the_figures_of_the_report_with_their_items(tiny_checkpoint, tmp_path):
    words = "--num-scenes 6 --steps 1 --num-candidates 1 --true-cfg-scale 1 --utilization-images 50"
    words = ["--model", str(tiny_checkpoint), *words.split(), "--json", str(tmp_path / "card.json")]
    report = main(make_parser().parse_args(words))
    card = read_card(tmp_path / "card.json")
    figures = {figure.name: figure for figure in card.figures}
    for task, part in (("understanding", "unseen pairs"), ("drawing", "new scenes"), ("redrawing", "new scenes")):
        figure = figures[f"{task}, {part}"]
        assert figure.value == pytest.approx(report[task][part]["all"]) and figure.count == 6
        assert len(card.items[figure.name]) == 6 and figure.low <= figure.value <= figure.high
    assert figures["drawing, new scenes, position"].count == 1 and figures["codes in use"].interval == "none"
    decoder = card.protocol["decoder"]
    assert decoder["num_inference_steps"] == 1 and decoder["pipeline"] == "UniCode2FluxPipeline"
    assert card.protocol["threads"] == torch.get_num_threads() and len(card.protocol["scenes"]) == 64
    assert card.protocol["language model"]["temperature"] == 0.6
    assert len(card.subject["quantizer"]) == 64 and card.run["versions"]["torch"]
