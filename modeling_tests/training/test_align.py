"""Alignment draws images to their own captions, changes C2 and the projector alone, and resumes to the same bytes."""

import shutil

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import TrainingArguments

from transformers_unicode2.training.align import AlignArguments, collate, load_alignment, main
from transformers_unicode2.training.checkpointing import find_last_checkpoint
from transformers_unicode2.training.messages import find_pair

COLORS = ("red", "blue", "green", "yellow", "black", "white", "orange", "purple")
SHAPES = ("circle", "square", "triangle", "star")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, tiny_run):
    """Chats about 64 images whose codes tell the color and the shape, of 32 captions, and chats that take no part."""
    folder, generator = tmp_path_factory.mktemp("pairs"), torch.Generator().manual_seed(0)
    rows = []
    for number in range(64):
        color, shape = number % 8, number // 8 % 4
        codes = torch.cat([torch.full((16,), color), torch.full((16,), 8 + shape)])
        codes = torch.cat([codes, torch.randint(20, 8192, (32,), generator=generator)]).tolist()
        answer = [{"type": "text", "text": f"a {COLORS[color]} {SHAPES[shape]}"}]
        user = [{"type": "image", "text": None}, {"type": "text", "text": "describe the image."}]
        rows.append({"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]})
        rows[-1]["codes"] = [codes]
    rows.append({"messages": [{"role": "user", "content": answer}, {"role": "assistant", "content": user[:1]}]})
    rows[-1]["codes"] = [codes]
    rows.append({"messages": [{"role": "user", "content": answer}, {"role": "assistant", "content": answer}]})
    rows[-1]["codes"] = []
    Dataset.from_list(rows).to_parquet(str(folder / "train-00000.parquet"))
    return folder


@pytest.fixture
def align(tiny_run, pairs):
    def run(output, **options):
        settings = {"max_steps": 40, "per_device_train_batch_size": 32, "weight_decay": 0.01, "use_cpu": True}
        settings |= {"lr_scheduler_type": "constant", "save_steps": 20, "report_to": "none", "disable_tqdm": True}
        args = AlignArguments(str(tiny_run / "model"), [{"path": str(pairs)}])
        main(args, TrainingArguments(str(output), **{**settings, **options}))

    return run


def test_the_loss_is_infonce_both_ways_without_twins(tiny_run):
    """As computed pair by pair, in float64."""
    alignment, config = load_alignment(str(tiny_run / "model"), 0.5)
    codes = torch.randint(0, 8192, (4, 64), generator=torch.Generator().manual_seed(1))
    captions = [[5, 6, 7], [5, 6, 7], [8, 9], [10]]
    rows = [
        {"codes": row.tolist(), "caption_ids": ids, "image_key": number, "caption_key": max(number, 1)}
        for number, (row, ids) in enumerate(zip(codes, captions))
    ]
    with torch.no_grad():
        got = alignment(**collate(rows))["loss"]
        table, mean = alignment.frozen[0].weight.double(), alignment.frozen[0].weight.double().mean(0)
        images = [alignment.projector(alignment.visual_embeddings.weight[row]).double().mean(0) - mean for row in codes]
    texts = [table[ids].mean(0) - mean for ids in captions]
    scores = torch.stack([torch.stack([torch.cosine_similarity(i, t, dim=0) / 0.5 for t in texts]) for i in images])
    expected = 0.0
    for way in (scores, scores.T):
        for row in range(4):
            # The first two rows have one caption
            others = [column for column in range(4) if column == row or {row, column} != {0, 1}]
            expected -= way[row, row] - way[row, others].logsumexp(0)
    assert got.item() == pytest.approx(expected.item() / 8, rel=1e-4)


def test_images_are_drawn_to_their_captions_and_nothing_else_changes(align, tiny_run, tmp_path, capsys):
    align(tmp_path / "out")
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Own caption"))
    before, after = (float(word.rstrip("%")) for word in line.split() if word.endswith("%"))
    assert "among 65 training rows" in line and before < 25 and after > 75
    old, new = (load_file(folder / "model.safetensors") for folder in (tiny_run / "model", tmp_path / "out"))
    assert old.keys() == new.keys() and all(old[name].dtype == new[name].dtype for name in old)
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    projector = {name for name in old if name.startswith("model.projector.")}
    assert changed == {"model.visual_embeddings.weight", *projector}
    # The output of the projector is on the scale of the token embeddings
    alignment, _ = load_alignment(str(tmp_path / "out"), 0.07)
    with torch.no_grad():
        projected = alignment.projector(alignment.visual_embeddings.weight)
    table = alignment.frozen[0].weight
    assert torch.allclose(projected.mean(0), table.mean(0), atol=1e-4)
    assert projected.var(0, correction=0).mean().sqrt().item() == pytest.approx(alignment.spread, rel=1e-3)
    # It loads, and says what it is
    from transformers_unicode2 import UniCode2ForConditionalGeneration

    UniCode2ForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert "own caption is the nearest" in (tmp_path / "out/README.md").read_text()


def test_a_killed_alignment_resumes_to_the_same_bytes(align, tmp_path):
    align(tmp_path / "whole", max_steps=4, save_steps=2)
    shutil.copytree(tmp_path / "whole/checkpoint-2", tmp_path / "killed/checkpoint-2")
    align(tmp_path / "killed", max_steps=4, save_steps=2)
    assert find_last_checkpoint(tmp_path / "killed").endswith("checkpoint-4")
    one, other = (tmp_path / name / "model.safetensors" for name in ("whole", "killed"))
    assert one.read_bytes() == other.read_bytes()


def test_rows_of_other_kinds_take_no_part():
    image, text = {"type": "image", "text": None}, {"type": "text", "text": "a cat"}
    read = [{"role": "user", "content": [image]}, {"role": "assistant", "content": [text]}]
    drawn = [{"role": "user", "content": [text]}, {"role": "assistant", "content": [image]}]
    assert find_pair(read, [[1, 2]]) == ([1, 2], "a cat")
    assert find_pair(drawn, [[1, 2]]) == ([1, 2], "a cat") and find_pair(read, [[1], [2]]) is None
    assert find_pair(read[:1], [[1, 2]]) is None
    # An answer before the image is not about it
    hello = [{"role": "user", "content": [text]}, {"role": "assistant", "content": [{"type": "text", "text": "hello"}]}]
    assert find_pair([*hello, *read], [[1, 2]]) == ([1, 2], "a cat")
    assert find_pair([*hello, read[0]], [[1, 2]]) is None
    assert find_pair([read[0], {"role": "assistant", "content": []}, *read[1:]], [[1, 2]]) == ([1, 2], "a cat")


def test_what_cannot_be_aligned_is_refused(tiny_run, pairs, tmp_path):
    settings = {"use_cpu": True, "report_to": "none", "max_steps": 1}
    model, data = str(tiny_run / "model"), [{"path": str(pairs)}]
    for args, options, message in (
        (AlignArguments(model, []), {}, "`datasets` is empty"),
        (AlignArguments(model, data, temperature=0.0), {}, "`temperature` is 0"),
        (AlignArguments(model, data), {"per_device_train_batch_size": 1}, "other rows of a batch"),
        (
            AlignArguments(model, data),
            {"learning_rate": 1e-3},
            "`learning_rate` is 0.001, and `learning_rates` has one",
        ),
        (AlignArguments(model, data, learning_rates={"head": 1.0}), {}, "`learning_rates` names `head`"),
    ):
        with pytest.raises(ValueError, match=message):
            main(args, TrainingArguments(str(tmp_path / "out"), **settings, **options))
