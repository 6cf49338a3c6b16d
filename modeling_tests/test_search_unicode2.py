"""The same ids in a process without a compiler, in one that does without the kernel, and in one without the package."""

import os
import subprocess
import sys

import pytest
import torch
from vectors import DIM, draw_clusters, equal_cells

from transformers_unicode2 import UniCode2Quantizer, UniCode2QuantizerConfig
from transformers_unicode2.search.nearest import MIN_SIZE

SCRIPT = """
import sys
folder, features, target, package = sys.argv[1:]
if package == "without":
    import importlib.util
    sys.path = [path for path in sys.path if not path.rstrip("/").endswith("src")]
    sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder).lower()]
    assert importlib.util.find_spec("transformers_unicode2") is None
    from transformers import AutoModel
    quantizer = AutoModel.from_pretrained(folder, trust_remote_code=True)
else:
    from transformers_unicode2 import UniCode2Quantizer
    quantizer = UniCode2Quantizer.from_pretrained(folder)
import torch
features = torch.load(features)
codebook = quantizer.codebook
torch.save([codebook.encode(features), codebook.encode(features, num_probes=3)], target)
kernel = sys.modules.get("transformers_unicode2.search.kernel")
print(bool(kernel and kernel.load_kernel()))
"""

PROCESSES = {
    "no compiler": ({"CC": "/nonexistent"}, "with"),
    "no kernel": ({"UNICODE2_KERNEL": "0"}, "with"),
    "no package": ({}, "without"),
}


@pytest.fixture(scope="module")
def quantizer() -> UniCode2Quantizer:
    """One with a codebook large enough for the kernel, and codes that are there twice."""
    vision = {"hidden_size": DIM, "image_size": 16, "patch_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    cells = {"codebook_size": MIN_SIZE + 5, "codebook_dim": DIM, "num_cells": 20}
    config = UniCode2QuantizerConfig(vision_config={**vision, "intermediate_size": 16}, codebook_config=cells)
    quantizer = UniCode2Quantizer(config)
    codes, _ = draw_clusters(8, MIN_SIZE + 5, 1)
    codes[-100:] = codes[:100]
    centroids, offsets = equal_cells(codes, 20)
    quantizer.codebook.load_state_dict({"codes": codes, "cell_centroids": centroids, "cell_offsets": offsets})
    return quantizer


def test_ids_are_the_same_in_every_process(quantizer, tmp_path):
    features = draw_clusters(8, MIN_SIZE + 5, 300)[1]
    features[:50] = quantizer.codebook.codes[-50:]
    quantizer.save_pretrained(tmp_path / "quantizer")
    torch.save(features, tmp_path / "features.pt")
    runs = {}
    for name, (environment, package) in PROCESSES.items():
        words = [tmp_path / "quantizer", tmp_path / "features.pt", tmp_path / f"{name}.pt", package]
        # -S and site.main: so that what makes an editable package importable can be taken away again.
        runs[name] = subprocess.Popen(
            [sys.executable, "-S", "-c", "import site; site.main()\n" + SCRIPT, *map(str, words)],
            env={**os.environ, "UNICODE2_CACHE": str(tmp_path / f"cache {name}"), **environment},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    expected = [quantizer.codebook.encode(features), quantizer.codebook.encode(features, num_probes=3)]
    for name, run in runs.items():
        said, error = run.communicate()
        assert run.returncode == 0 and said.split()[-1] == "False", error[-3000:]
        assert all(map(torch.equal, torch.load(tmp_path / f"{name}.pt"), expected)), name
        assert not list(tmp_path.glob(f"cache {name}/*"))
