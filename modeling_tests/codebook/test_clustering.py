"""K-means on points in memory: what it allocates."""

import numpy as np
import pytest
import torch
from memory import MadeTensors

from transformers_unicode2.codebook.clustering import TorchBackend


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_scores_share_their_memory(dtype):
    """Blocks that come and go between small results that stay leave holes in the heap, as large as all scores."""
    backend, points = TorchBackend(), np.random.default_rng(0).standard_normal((4000, 8), dtype=np.float32)
    backend.fast_dtype = dtype
    with MadeTensors() as made:
        centroids = backend.kmeans(backend.put(points), 2000, seed=0, num_iterations=3)
        indices, distances = backend.assign(backend.put(points), centroids)
    assert made.num_bytes < 4 * 4000 * 2000 / 2
    expected = torch.cdist(torch.tensor(points).double(), torch.tensor(centroids).double()).min(1)
    assert np.array_equal(indices, expected.indices) and np.allclose(distances, expected.values**2, atol=1e-5)
