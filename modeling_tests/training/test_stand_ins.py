"""The scripts that train stand-ins for the models that a full-size recipe downloads."""

from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "training_recipes/unicode2-tiny/stand_ins")


def test_flux_says_which_shift_is_wrong():
    from train_flux import FluxArguments, main

    with pytest.raises(ValueError, match="`shift` is -1; it must be above 0"):
        main(FluxArguments("nowhere", "nowhere", "nowhere", "nowhere", shift=-1.0), None)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_coarse_features_are_rows_of_the_table(share, tmp_path):
    """The first images are rounded, each patch to the nearest of half a table; the others keep every bit."""
    from train_flux import CoarseFeatures

    from transformers_unicode2.scenes import write
    from transformers_unicode2.training.data import load_images

    write.main(write.make_parser().parse_args(["--output", str(tmp_path), "--num-scenes", "8"]))

    def encode(pixel_values):  # (1, 3, 64, 64) to the means of 64 patches
        return torch.nn.functional.avg_pool2d(pixel_values, 8).flatten(2).transpose(1, 2)

    coarsen = CoarseFeatures(encode, load_images(str(tmp_path)), 64)
    assert coarsen.table.shape == (64, 3)
    features = torch.rand(4, 64, 3) * 2 - 1
    coarse = coarsen(features, share)
    num_coarse = round(4 * share)
    assert torch.equal(coarse[num_coarse:], features[num_coarse:])
    assert (coarse[:num_coarse, :, None] == coarsen.table).all(-1).any(-1).all()
    distances = torch.cdist(features[:num_coarse], coarsen.table)
    kept = (coarsen.table == coarse[:num_coarse, :, None]).all(-1)
    rank = (distances < distances.where(kept, torch.inf).amin(-1, keepdim=True)).sum(-1)
    # At most the other half of the table is nearer
    assert (rank <= 32).all()


def test_prompts_are_dropped_of_whole_images():
    from train_flux import drop_prompts

    torch.manual_seed(0)
    prompts = torch.ones(400, 3, 5, dtype=torch.bfloat16), torch.ones(400, 2)
    for share in (0.0, 0.25, 1.0):
        kept, pooled = drop_prompts(share, *prompts)
        dropped = (pooled == 0).all(1)
        assert torch.equal(dropped, (kept == 0).all(2).all(1)) and torch.equal(~dropped, (kept == 1).all(2).all(1))
        assert kept.dtype == torch.bfloat16 and pooled.dtype == torch.float32
        assert dropped.float().mean().item() == pytest.approx(share, abs=0.08 * (0 < share < 1))
    with pytest.raises(ValueError, match=r"`drop_share` is nan; it must be in \[0, 1\]"):
        drop_prompts(float("nan"), *prompts)
