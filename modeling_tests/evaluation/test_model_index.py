"""Figures of score cards in the metadata of a model card."""

import shutil

import pytest
from huggingface_hub import ModelCard

from transformers_unicode2 import cli
from transformers_unicode2.evaluation.score_card import ScoreCard, describe_subject

TEXT = "# A model\n\nIts text stays.\n"


def make_card(folder, name: str, seed: int, right: int, model=None) -> str:
    subject = describe_subject(str(model), deep=True) if model else {"model": "org/pipe"}
    card = ScoreCard("evaluate scenes", {"benchmark": "scenes", "task_type": "text-to-image", "seed": seed}, subject)
    card.add_share("drawing", {str(number): number < right for number in range(10)})
    card.write(folder / name)
    return str(folder / name)


def put(monkeypatch, readme, *cards) -> None:
    monkeypatch.setattr("sys.argv", ["unicode2", "evaluate", "model-index", *cards, "--readme", str(readme)])
    cli.main()


def read(readme) -> list[tuple]:
    results = ModelCard.load(readme).data.eval_results
    return [(one.dataset_type, one.metric_type, one.metric_value, one.metric_args["protocol"]) for one in results]


def test_figures_of_a_protocol_are_replaced_and_the_rest_stays(tmp_path, monkeypatch, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"---\nlicense: mit\nlibrary_name: transformers\n---\n{TEXT}")
    first, second = (make_card(tmp_path, f"{seed}.json", seed, 5) for seed in (0, 1))
    put(monkeypatch, readme, first, second)
    assert "2 figures of 2 score cards" in capsys.readouterr().out
    before = read(readme)
    assert [one[:3] for one in before] == [("scenes", "drawing", 50.0)] * 2 and before[0][3] != before[1][3]
    put(monkeypatch, readme, make_card(tmp_path, "0.json", 0, 8))
    assert sorted(one[2] for one in read(readme)) == [50.0, 80.0] and len({one[3] for one in read(readme)}) == 2
    card = ModelCard.load(readme)
    assert (card.data.license, card.data.library_name, card.data.model_name) == ("mit", "transformers", "pipe")
    assert card.text.strip() == TEXT.strip()


def test_a_card_of_another_checkpoint_is_refused(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "pipe")
    own, other = (
        make_card(tmp_path, f"{name}.json", 0, 5, model) for name, model in (("own", folder), ("other", None))
    )
    before = (folder / "README.md").read_bytes()
    with pytest.raises(SystemExit):
        put(monkeypatch, folder / "README.md", own, other)
    assert "other.json is of the checkpoint None (org/pipe), and" in capsys.readouterr().err
    assert (folder / "README.md").read_bytes() == before
    put(monkeypatch, folder / "README.md", own)
    assert read(folder / "README.md")[0][:3] == ("scenes", "drawing", 50.0)


@pytest.mark.parametrize(("name", "sentence"), [("none.md", "There is no model card"), ("README.md", "has no figures")])
def test_what_cannot_be_put_is_refused(tmp_path, monkeypatch, capsys, name, sentence):
    (tmp_path / "README.md").write_text(TEXT)
    ScoreCard("evaluate generation", {"seed": 0}, {"model": "org/pipe"}).write(tmp_path / "drawn.json")
    with pytest.raises(SystemExit):
        put(monkeypatch, tmp_path / name, str(tmp_path / "drawn.json"))
    assert sentence in capsys.readouterr().err and (tmp_path / "README.md").read_text() == TEXT


@pytest.mark.parametrize(
    ("front", "sentence"),
    [
        ("license: [open", "The front matter of"),
        ("- a\n- b", "The front matter of"),
        ("model-index:\n- name: a\n  results: []\n- name: b\n  results: []", "a model-index of 2 models (a, b)"),
    ],
)
def test_front_matter_that_would_be_lost_is_refused(tmp_path, monkeypatch, capsys, front, sentence):
    readme = tmp_path / "README.md"
    readme.write_text(f"---\n{front}\n---\n{TEXT}")
    before = readme.read_bytes()
    with pytest.raises(SystemExit):
        put(monkeypatch, readme, make_card(tmp_path, "0.json", 0, 5))
    error = capsys.readouterr().err
    assert sentence in error and len(error.splitlines()) == 1 and readme.read_bytes() == before
