"""DPG-Bench's questions with their dependencies, for every picture of every grid."""

import numpy as np
import pytest
import torch
from PIL import Image

from transformers_unicode2.evaluation import dpg
from transformers_unicode2.evaluation.card_files import read_card

HEAD = (
    "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language"
)
ROWS = [
    "a,x,k,1,0,entity,whole,t,Is there a cat?",
    "a,x,k,2,1,attribute,color,t,Is the cat red?",
    'a,x,k,3,"1,2",relation,spatial,t,Is it on a mat?',
    "b,y,k,1,0,entity,whole,t,Is there a dog?",
]


@pytest.fixture
def place(tmp_path):
    (tmp_path / "dpg.csv").write_text("\n".join([HEAD, *ROWS]) + "\n")
    (tmp_path / "drawn").mkdir()
    for number, name in enumerate("ab"):
        # The four pictures of a grid have colors of their own
        tiles = np.zeros((32, 32, 3), np.uint8)
        tiles[:16, :16], tiles[:16, 16:], tiles[16:, :16], tiles[16:, 16:] = 10, 20, 30, 40
        Image.fromarray(tiles + number).save(tmp_path / "drawn" / f"{name}.png")
    return tmp_path


def run(place, *more):
    words = ["--images", place / "drawn", "--questions", place / "dpg.csv", "--json", place / "card.json", *more]
    return dpg.main(dpg.make_parser().parse_args(list(map(str, words))))


def test_the_first_question_counts_and_a_no_passes_on_to_what_depends_on_it():
    asked = dpg.Question(1, "cat?", "entity", ()), dpg.Question(2, "red?", "attribute", (1,))
    asked = [*asked, dpg.Question(3, "mat?", "relation", (2,))]

    def ask(*yes):
        answer = lambda image, text: "Yes." if text.split("?")[0] in yes else "no"  # noqa: E731
        answers = dpg.ask_all(None, asked, answer, "{question}")
        return dpg.apply_dependencies({name: dpg.read_answer(text) for name, text in answers.items()}, asked)

    assert ask("cat", "red", "mat") == {"1": True, "2": True, "3": True}
    assert ask("red", "mat") == {"1": False, "2": False, "3": False}
    assert ask("cat", "mat") == {"1": True, "2": False, "3": False}


def test_all_pictures_of_all_grids_count(place, monkeypatch, tiny_checkpoint):
    """Also in the categories. Here the cat is seen in the first two pictures, the rest everywhere."""
    seen = []

    class Judge:
        device = torch.device("cpu")

        def __init__(self, name):
            pass

        def __call__(self, image, text):
            seen.append((image.getpixel((0, 0))[0], text))
            return "yes" if "cat?" not in text or image.getpixel((0, 0))[0] <= 20 else "No, there is none"

    monkeypatch.setattr(dpg, "Judge", Judge)
    card = run(place, "--vqa", tiny_checkpoint, "--ask", "{question} yes or no?")
    assert (
        len(seen) == 4 * 4 and (40, "Is the cat red? yes or no?") in seen and (41, "Is there a dog? yes or no?") in seen
    )
    figures = {figure.name: (figure.value, figure.count) for figure in card.figures}
    assert figures == {
        "overall": (75.0, 8), "attribute": (100.0, 4), "entity": (75.0, 8), "relation": (100.0, 4),
        dpg.UNREADABLE: (0.0, 16),
    }  # fmt: skip
    assert read_card(place / "card.json").protocol["scorer"]["rules"] == dpg.RULES
    assert card.protocol["benchmark"] == "dpg_hf"
    # What was answered is kept
    assert run(place, "--vqa", tiny_checkpoint, "--ask", "{question} yes or no?").figures == card.figures
    assert len(seen) == 16
    # Files of one picture each are not cut; other braces are a text
    card = run(place, "--vqa", tiny_checkpoint, "--ask", "{question} {x}?", "--pictures", 1)
    assert len(seen) == 20 and card.figures[0].count == 2 and "Is the cat red? {x}?" in [text for _, text in seen]


def test_a_model_of_transformers_is_asked(place, tiny_checkpoint):
    """It knows its own words alone."""
    message = r"of 16 answers of --vqa .* are neither yes nor no, such as '\w+'; give another model, or ask"
    with pytest.raises(ValueError, match=message):
        run(place, "--vqa", tiny_checkpoint)
    assert not (place / "card.json").exists()
    table = place / "dpg.csv"
    table.write_text(
        table.read_text().replace("Is the cat red?", "is there a red circle?").replace("it on a", "there a")
    )
    card = run(place, "--vqa", tiny_checkpoint, "--ask", "{question}")
    assert card.figures[0].count == 8 and 0 <= card.figures[0].value <= 100


@pytest.mark.parametrize(
    ("text", "yes"), [("Yes, it is", True), ('"yes"', True), ("no.", False), ("yesterday", None), ("zero", None)]
)
def test_what_is_neither_yes_nor_no_is_known(text, yes):
    assert dpg.read_answer(text) is yes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "has no column item_id; give dpg_bench.csv of DPG-Bench"),
        (HEAD + "\n", "has no questions"),
        (HEAD + "\na,x,k,one,0,e,w,t,Is it?\n", "line 2: proposition_id and dependency must be numbers"),
        (HEAD + "\na,x,k,1,7,e,w,t,Is it?\n", "a question of a depends on question 7, which it does not have"),
        (HEAD + "\na,x,k,1,0,e,w,t,\n", "line 2: question_natural_language is empty"),
        (HEAD + "\na,x,k\n", "line 2 has another number of fields than the first line; give dpg_bench.csv whole"),
        (
            HEAD + "\na,x,k,1,0,e,w,t,Is it?\na,x,k,1,0,e,w,t,Is it so?\n",
            "line 3: this prompt has a question 1 already",
        ),
        (HEAD + "\na,x,k,1,0,e,w,t," + "x" * 140_000, "line 2 cannot be read .field larger than field limit .131072"),
        (HEAD + '\na,x,k,1,0,e,w,t,"Is it?\nb,x,k,1,0,e,w,t,Is it?\n', "line 3 cannot be read .unexpected end of data"),
        (HEAD + "\nc,x,k,1,0,e,w,t,Is it?\n", "1 of 1 pictures are missing in .*, the first is c.png; run `unicode2"),
    ],
)
def test_files_of_another_shape_are_refused(place, tiny_checkpoint, text, message):
    (place / "dpg.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        run(place, "--vqa", tiny_checkpoint)


def test_categories_are_one_with_spaces_around_them(place):
    (place / "dpg.csv").write_text("\n".join([HEAD, *ROWS, "b,y,k,2,0, entity ,whole,t,Is it big?"]) + "\n")
    assert [one.category for one in dpg.read_questions(place / "dpg.csv")["b"]] == ["entity", "entity"]


@pytest.mark.parametrize("answers", [None, [], [{}], [{"1": "yes"}, {"1": "yes"}], [["yes"]]])
def test_answers_of_another_shape_are_asked_anew(place, answers):
    import json

    questions = dpg.read_questions(place / "dpg.csv")["b"]
    file, picture = place / "b.json", place / "drawn/b.png"
    content = {"vqa": "v", "picture": dpg.hash_data(picture)}
    file.write_text(json.dumps({**content, "answers": answers}))
    assert dpg.read_result(file, {"vqa": "v"}, picture, questions, 1) is None
    file.write_text(json.dumps({**content, "answers": [{"1": "yes"}]}))
    assert dpg.read_result(file, {"vqa": "v"}, picture, questions, 1) == [{"1": "yes"}]
