"""Codebooks to search in and features to search for, with the definition of the nearest code."""

import torch

from transformers_unicode2.search_unicode2 import exact_distance

DIM = 160


def brute_force(features: torch.Tensor, codes: torch.Tensor) -> torch.LongTensor:
    """The definition: the smallest distance in float64, the lowest of equals."""
    return torch.stack([exact_distance(feature[None].expand_as(codes), codes).argmin() for feature in features])


def equal_cells(codes: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.LongTensor]:
    """Centroids `(count, dim)` and offsets `(count + 1,)` of cells of equal size."""
    offsets = torch.arange(count + 1) * len(codes) // count
    parts = [codes[first:last] for first, last in zip(offsets[:-1], offsets[1:])]
    return torch.stack([part.mean(0) if len(part) else codes[0] for part in parts]), offsets


def draw_clusters(seed: int, size: int = 2000, count: int = 24, dim: int = DIM, far: float = 0.0):
    """Codes in clusters with a falling spectrum, rounded to bfloat16, and features like them."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, dim + 1) ** -0.6
    centres = torch.randn(20, dim, generator=generator) * spectrum + far
    points = centres[torch.randint(20, (size + count,), generator=generator)]
    points += 0.7 * spectrum * torch.randn(size + count, dim, generator=generator)
    return points[:size].bfloat16().float(), points[size:]


def adversarial(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    codes = torch.randn(1000, DIM, generator=generator)
    features = torch.randn(24, DIM, generator=generator)
    if name == "sphere":
        codes, features = codes / codes.norm(dim=-1, keepdim=True), features / features.norm(dim=-1, keepdim=True)
    elif name == "equal rows":
        codes = codes[:1].expand(1000, DIM).clone()
    elif name == "duplicates":
        codes = codes[torch.arange(1000) // 7]
    elif name == "nearly equal":
        codes = (1000 + codes * 2**-12).contiguous()
        features = codes[::42] + features[:, :1] * 2**-13
    elif name == "dynamic range":
        codes *= torch.logspace(-12, 12, 1000)[torch.randperm(1000, generator=generator)][:, None]
        features *= torch.logspace(-12, 12, 24)[:, None]
    elif name == "outlier":
        codes[500] *= 1e6
    elif name == "permuted":
        # Distances to zero that differ in rounding only.
        codes = torch.stack([codes[0, torch.randperm(DIM, generator=generator)] for _ in range(1000)])
        features[:12] = 0
    elif name in ("huge", "tiny", "denormal"):
        scale = {"huge": 1e30, "tiny": 1e-25, "denormal": 1e-42}[name]
        codes, features = codes * scale, features * scale
    elif name == "low rank":
        codes = codes[:, :8] @ torch.randn(8, DIM, generator=generator)
    elif name == "codes themselves":
        features = codes[::40]
    elif name == "not finite":
        codes[::3, 5], codes[1::3, 7] = torch.nan, torch.inf
    return codes, features


ADVERSARIAL = (
    "sphere",
    "equal rows",
    "duplicates",
    "nearly equal",
    "dynamic range",
    "outlier",
    "permuted",
    "huge",
    "tiny",
    "denormal",
    "low rank",
    "codes themselves",
    "not finite",
)
