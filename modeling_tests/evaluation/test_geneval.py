"""GenEval's rules on detections made by hand, and beside the exact checker of the drawn scenes."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from transformers_unicode2 import cli
from transformers_unicode2.evaluation import geneval
from transformers_unicode2.evaluation.card_files import read_card
from transformers_unicode2.evaluation.detectors import find_box
from transformers_unicode2.evaluation.geneval import Detection, main, make_parser, relate, score_picture
from transformers_unicode2.scenes.check import check_drawing
from transformers_unicode2.scenes.sample import sample_scene
from transformers_unicode2.scenes.scene import SEEN_PAIRS, SHAPES, draw_scene
from transformers_unicode2.scenes.texts import CATEGORIES, sample_prompt

TAGS = dict(zip(CATEGORIES, ("single_object", "two_object", "counting", "colors", "position", "color_attr")))


def make(label, score=0.95, box=(0, 0, 10, 10), color="red"):
    return Detection(label, score, tuple(map(float, box))), color


def score(metadata, *made):
    colors = {id(one): color for one, color in made}
    return score_picture(metadata, [one for one, _ in made], lambda one, label: colors[id(one)])


CAT, DOG = ({"class": name, "count": 1} for name in ("cat", "dog"))
TWO = {"tag": "counting", "include": [{"class": "cat", "count": 2}], "exclude": [{"class": "cat", "count": 3}]}
RED = {"tag": "colors", "include": [{**CAT, "color": "red"}]}
BOTH = {"tag": "color_attr", "include": [{**CAT, "color": "red"}, {"class": "dog", "count": 1, "color": "blue"}]}
LEFT = {"tag": "position", "include": [CAT, {"class": "dog", "count": 1, "position": ["left of", 0]}]}


@pytest.mark.parametrize(
    ("metadata", "made", "reason"),
    [
        ({"tag": "single_object", "include": [CAT]}, [make("cat", 0.31)], None),
        # A score has to be above the limit
        ({"tag": "single_object", "include": [CAT]}, [make("cat", 0.3)], "expected cat >= 1, found 0"),
        ({"tag": "single_object", "include": [CAT]}, [make("dog")], "expected cat >= 1, found 0"),
        # Others beside it do not matter
        ({"tag": "two_object", "include": [CAT, DOG]}, [make("dog"), make("cat"), make("cow")], None),
        (TWO, [make("cat", 0.91), make("cat", 0.92)], None),
        (TWO, [make("cat", 0.91), make("cat", 0.9)], "expected cat >= 2, found 1"),
        (TWO, [make("cat")] * 3, "expected cat < 3, found 3"),
        (RED, [make("cat", color="red")], None),
        (RED, [make("cat", color="blue")], "expected red cat >= 1, found blue"),
        # Of two, the better one is looked at
        (RED, [make("cat", 0.5, color="red"), make("cat", 0.6, color="blue")], "expected red cat >= 1, found blue"),
        (BOTH, [make("cat", color="red"), make("dog", color="blue")], None),
        (BOTH, [make("cat", color="blue"), make("dog", color="red")], "expected red cat >= 1, found blue"),
        (LEFT, [make("cat", box=(30, 0, 40, 10)), make("dog", box=(0, 0, 10, 10))], None),
        (LEFT, [make("cat", box=(0, 0, 9, 9)), make("dog", box=(30, 0, 39, 9))], "dog left of target, found right of"),
        (LEFT, [make("dog")], "no target for dog to be left of"),
    ],
)  # fmt: skip
def test_rules_of_every_tag(metadata, made, reason):
    right, reasons = score(metadata, *made)
    assert right == (reason is None)
    assert reason is None or reason in "; ".join(reasons)


@pytest.mark.parametrize(
    ("found", "asked"),
    [
        ("sofa", "couch"), ("motorbike", "motorcycle"), ("aeroplane", "airplane"), ("pottedplant", "potted plant"),
        ("potted-plant", "potted plant"), ("Dining_Table", "dining table"), ("tvmonitor", "tv"),
        ("mouse", "computer mouse"), ("remote", "tv remote"), ("keyboard", "computer keyboard"),
        ("hair dryer", "hair drier"), ("trafficlight", "traffic light"), ("cat", "Cat"),
    ],
)  # fmt: skip
def test_a_class_has_one_name_in_all_spellings(found, asked):
    """Those of COCO's older lists, and those of GenEval's prompts, as what is wanted and as what is not."""
    wanted = {"tag": "single_object", "include": [{"class": asked, "count": 1}]}
    assert score(wanted, make(found))[0]
    assert not score({**wanted, "exclude": [{"class": asked, "count": 1}]}, make(found))[0]
    assert geneval.name_class(asked) in {geneval.name_class(label) for label in (found, "dog")}


def test_at_most_sixteen_of_a_class_count():
    many = {"tag": "counting", "include": [{"class": "cat", "count": 17}]}
    assert score(many, *[make("cat")] * 20)[1] == ["expected cat >= 17, found 16"]


@pytest.mark.parametrize(
    ("box", "other", "relations"),
    [
        ((0, 0, 10, 10), (20, 0, 30, 10), {"left of"}),
        ((20, 0, 30, 10), (0, 0, 10, 10), {"right of"}),
        ((0, 0, 10, 10), (0, 20, 10, 30), {"above"}),
        ((0, 20, 10, 30), (0, 0, 10, 10), {"below"}),
        ((0, 0, 10, 10), (20, 20, 30, 30), {"left of", "above"}),
        ((0, 0, 10, 10), (0, 0, 10, 10), set()),
        # Within a tenth of both sizes, they are at one place
        ((0, 0, 10, 10), (2, 0, 12, 10), set()),
        ((0, 0, 10, 10), (4.1, 0, 14.1, 10), {"left of"}),
    ],
)
def test_relations_of_boxes(box, other, relations):
    assert relate(box, other) == relations


def test_scores_agree_with_the_exact_checker_where_detections_are_of_the_scene():
    """For every tag, on scenes that show what is asked for and on others; the objects are those that were drawn.

    The checker takes any offset of 6 % for a relation, GenEval one that is at least half of the way. So objects are in
    a row or a column here.
    """
    rng, counts = np.random.default_rng(0), {}
    while min(counts.values(), default=0) < 5 or len(counts) < 12:
        category = CATEGORIES[int(rng.integers(len(CATEGORIES)))]
        prompt, scene = sample_prompt(category, rng, SEEN_PAIRS), sample_scene(rng, "test", SEEN_PAIRS)
        if prompt.relation or rng.random() < 0.7:
            scene = make_like(prompt, scene, rng)
        if scene is None:
            continue
        wanted = check_drawing(prompt, draw_scene(scene, 128))
        detections = [Detection(o.shape, 0.95, box_of(o)) for o in scene.objects]
        colors = {id(one): o.color for one, o in zip(detections, scene.objects)}
        include = [
            {"class": shape, "count": 1, **({"color": color} if color else {})} for color, shape in prompt.wanted
        ]
        if category == "counting":
            include = [{**include[0], "count": len(prompt.wanted)}]
        if prompt.relation:
            # Of the first to the second, which GenEval names first
            include = [include[1], {**include[0], "position": [prompt.relation, 0]}]
        asked = [shape for _, shape in prompt.wanted]
        exclude = [{"class": shape, "count": asked.count(shape) + 1} for shape in SHAPES]
        metadata = {"tag": TAGS[category], "include": include, "exclude": exclude}
        right, _ = score_picture(metadata, detections, lambda one, label, colors=colors: colors[id(one)])
        assert right == wanted, (prompt, scene)
        counts[category, right] = counts.get((category, right), 0) + 1


def make_like(prompt, scene, rng):
    """A scene of the prompt's shapes, often also of its colors, at the places of another scene or in a row."""
    if len(scene.objects) < len(prompt.wanted):
        return None
    keeps, items = rng.random() < 0.6, scene.objects
    if prompt.relation:
        places = [(0.25, 0.5), (0.75, 0.5)] if rng.random() < 0.5 else [(0.5, 0.25), (0.5, 0.75)]
        items = [replace(item, x=x, y=y) for item, (x, y) in zip(items, rng.permutation(places))]
    objects = tuple(
        replace(item, shape=shape, color=(color if color and keeps else item.color))
        for item, (color, shape) in zip(items, prompt.wanted)
    )
    return replace(scene, objects=objects)


def box_of(item):
    return tuple(
        128 * v for v in (item.x - item.radius, item.y - item.radius, item.x + item.radius, item.y + item.radius)
    )


@pytest.fixture(scope="module")
def judges(tmp_path_factory):
    """A small random Mask2Former and CLIP."""
    from language_models import make_tokenizer
    from transformers import (
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPProcessor,
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        SwinConfig,
    )

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("judges")
    backbone = SwinConfig(
        image_size=32, embed_dim=16, depths=[1, 1, 1, 1], num_heads=[2, 2, 2, 2], window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    sizes = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 16}
    sizes |= {"encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2, "dim_feedforward": 16}
    names = ("cat", "mouse", "dog")
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}
    config = Mask2FormerConfig(backbone_config=backbone, num_queries=5, **sizes, **labels)
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder / "detector")
    Mask2FormerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder / "detector")
    tokenizer = make_tokenizer("chatml", "bytes")
    tokenizer.pad_token = tokenizer.eos_token
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**tower, "vocab_size": len(tokenizer), "max_position_embeddings": 64}
    clip = CLIPConfig(text_config=text, vision_config={**tower, "image_size": 32, "patch_size": 8}, projection_dim=8)
    CLIPModel(clip).save_pretrained(folder / "clip")
    image_processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor, tokenizer).save_pretrained(folder / "clip")
    return folder


def write_pictures(folder, count=2):
    rng = np.random.default_rng(0)
    for number, metadata in enumerate((RED, LEFT)):
        samples = folder / f"{number:05d}" / "samples"
        samples.mkdir(parents=True)
        (samples.parent / "metadata.jsonl").write_text(json.dumps({**metadata, "prompt": "a cat"}))
        for j in range(count):
            Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8)).save(samples / f"{j:05d}.png")


def run(folder, judges, card):
    words = ["--images", folder, "--detector", judges / "detector", "--clip", judges / "clip", "--json", card]
    return main(make_parser().parse_args(list(map(str, words))))


def test_pictures_are_scored_by_the_models_of_transformers(judges, tmp_path, monkeypatch):
    """Random ones, which find something somewhere; a second run reads what the first one found."""
    from transformers_unicode2.evaluation import detectors

    write_pictures(tmp_path / "drawn")
    card = run(tmp_path / "drawn", judges, tmp_path / "card.json")
    assert [figure.name for figure in card.figures] == ["overall", "colors", "position", "prompts with a right picture"]
    assert card.figures[0].count == 4 and {*card.protocol["generation"]} == {"not known, of the pictures"}
    assert card.protocol["benchmark"] == "geneval_hf"
    assert read_card(tmp_path / "card.json").protocol_hash == card.protocol_hash
    found = detectors.Mask2FormerDetector(judges / "detector")(Image.open(tmp_path / "drawn/00000/samples/00000.png"))
    assert found and {one.label for one in found} <= {"cat", "mouse", "dog"}
    assert all(one.mask.shape == (48, 64) and one.box == find_box(one.mask) for one in found)
    namer = detectors.ColorNamer(judges / "clip")
    assert namer(Image.new("RGB", (64, 48), "red"), found[0], "cat") in detectors.COLORS
    assert namer.embed_colors("cat").norm(dim=-1).tolist() == pytest.approx([1.0] * 10)
    monkeypatch.setattr(detectors, "Mask2FormerDetector", None)
    again = run(tmp_path / "drawn", judges, tmp_path / "again.json")
    assert again.figures == card.figures and again.items == card.items
    assert (again.protocol_hash, again.subject) == (card.protocol_hash, card.subject)
    # Other metadata are another question
    (tmp_path / "drawn/00001/metadata.jsonl").write_text(json.dumps({**LEFT, "prompt": "a dog"}))
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        run(tmp_path / "drawn", judges, tmp_path / "again.json")


def test_overall_is_the_mean_of_the_tags(judges, tmp_path, monkeypatch):
    write_pictures(tmp_path / "drawn")
    flags = {"colors": [True, True], "position": [True, False]}
    scored = iter([{"tag": tag, "right": right, "reasons": [[], []]} for tag, right in flags.items()])
    monkeypatch.setattr(geneval, "score_prompt", lambda *_: next(scored))
    figures = {figure.name: figure.value for figure in run(tmp_path / "drawn", judges, tmp_path / "card.json").figures}
    assert figures == {"overall": 75.0, "colors": 100.0, "position": 50.0, "prompts with a right picture": 100.0}


@pytest.mark.parametrize("kept", ["[]", "null", "12", "{", '{"tag": "colors", "right": []}', "[" * 100_000])
def test_damaged_verdicts_are_made_anew(judges, tmp_path, monkeypatch, kept):
    write_pictures(tmp_path / "drawn")
    scored = {"tag": "colors", "right": [True, True], "reasons": [[], []]}
    monkeypatch.setattr(geneval, "score_prompt", lambda *_: scored)
    run(tmp_path / "drawn", judges, tmp_path / "card.json")
    file = tmp_path / "drawn/00000/geneval_hf.json"
    content = json.loads(file.read_text())
    # One that answers the same, but for what it says
    for text in (kept, json.dumps({**content, "right": None}), json.dumps({**content, "tag": None})):
        file.write_text(text)
        run(tmp_path / "drawn", judges, tmp_path / "card.json")
        assert json.loads(file.read_text()) == content


def test_only_numbers_are_prompts_and_pictures(tmp_path):
    """As the official scorer has it."""
    write_pictures(tmp_path)
    (tmp_path / "0backup").mkdir()
    (tmp_path / "00000/samples/grid.png").write_bytes(b"")
    folders = geneval.find_folders(tmp_path)
    assert [folder.name for folder in folders] == ["00000", "00001"]
    assert [file.name for file in geneval.list_pictures(folders[0])] == ["00000.png", "00001.png"]


def test_gaps_in_the_numbers_are_refused(tmp_path):
    write_pictures(tmp_path / "a")
    (tmp_path / "a/00001").rename(tmp_path / "a/00002")
    with pytest.raises(ValueError, match="has 2 folders of prompts, and the last is 00002; run `unicode2 evaluate gen"):
        geneval.find_folders(tmp_path / "a")
    write_pictures(tmp_path / "b", 3)
    for number in range(2):
        (tmp_path / f"b/0000{number}/samples/00001.png").unlink()
    with pytest.raises(ValueError, match="2 of 2 prompts in .* lack pictures, the first is 00000"):
        geneval.find_folders(tmp_path / "b")


def test_a_picture_that_is_cut_is_named(judges, tmp_path):
    write_pictures(tmp_path / "drawn")
    file = tmp_path / "drawn/00001/samples/00001.png"
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(ValueError, match="00001/samples/00001.png .* cannot be read as an image"):
        run(tmp_path / "drawn", judges, tmp_path / "card.json")


def test_what_cannot_be_scored_is_refused(judges, tmp_path):
    with pytest.raises(ValueError, match="has no folders 00000, 00001 and so on"):
        run(tmp_path, judges, tmp_path / "card.json")
    write_pictures(tmp_path / "drawn")
    (tmp_path / "drawn/00001/samples/00001.png").unlink()
    with pytest.raises(
        ValueError, match="1 of 2 prompts in .* lack pictures, the first is 00001; run `unicode2 evaluate"
    ):
        run(tmp_path / "drawn", judges, tmp_path / "card.json")
    write_pictures(tmp_path / "half")
    (tmp_path / "half/00001/metadata.jsonl").unlink()
    with pytest.raises(ValueError, match="1 of 2 prompts in .* have no metadata.jsonl, the first is 00001; run"):
        run(tmp_path / "half", judges, tmp_path / "card.json")
    write_pictures(tmp_path / "other")
    (tmp_path / "other/00001/metadata.jsonl").write_text('{"prompt": "a", "tag": "x"}')
    with pytest.raises(ValueError, match="metadata.jsonl is none of GenEval's: `tag` is 'x'"):
        run(tmp_path / "other", judges, tmp_path / "card.json")
    for wanted, message in (
        (
            {**CAT, "class": "unicorn"},
            "has the class 'unicorn', which the detector does not know; its 3 classes",
        ),
        ({**CAT, "color": "grey"}, "has the color 'grey'; it must be one of red, orange"),
    ):
        content = {"prompt": "a", "tag": "colors", "include": [wanted]}
        (tmp_path / "other/00001/metadata.jsonl").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            run(tmp_path / "other", judges, tmp_path / "card.json")
    assert "evaluate geneval" in cli.COMMANDS
