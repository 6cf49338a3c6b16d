"""A codebook as a FAISS index, and the search in one."""

import importlib

import torch

from .search_unicode2 import exact_distance


def make_index(codebook, kind: str = "flat", num_probes: int | None = None):
    """A FAISS index of the codes in their order.

    Args:
        codebook (`UniCode2Codebook`): the codes and their cells.
        kind (`str`, *optional*, defaults to `"flat"`): `"flat"` for an `IndexFlatL2`, `"ivf"` for an `IndexIVFFlat` whose lists are
            the cells.
        num_probes (`int`, *optional*): lists that `"ivf"` looks into; all of them, which is exact, by default.

    Raises:
        `ImportError`: without FAISS. `ValueError`: on another kind.
    """
    try:
        faiss = importlib.import_module("faiss")
    except ModuleNotFoundError as error:
        raise ImportError("Searching with FAISS needs faiss-cpu; install transformers_unicode2[codebook].") from error
    if kind not in ("flat", "ivf"):
        raise ValueError(f"The index is {kind!r}; it must be 'flat', 'ivf' or an index of FAISS.")
    ids = torch.arange(len(codebook.codes), device=find_device(codebook))
    codes, lists = (codebook(ids, task=task).cpu().numpy() for task in ("decode", "locate"))
    if kind == "flat":
        index = faiss.IndexFlatL2(codes.shape[1])
        index.add(codes)
        return index
    cells = torch.arange(len(codebook.cell_centroids), device=ids.device)
    centroids = codebook(cells, task="decode_cells").cpu().numpy()
    coarse = faiss.IndexFlatL2(codes.shape[1])
    coarse.add(centroids)
    index = faiss.IndexIVFFlat(coarse, codes.shape[1], len(centroids), faiss.METRIC_L2)
    coarse.this.disown()  # the index owns it, as one read from disk does
    index.own_fields = index.is_trained = True
    index.add_core(len(codes), faiss.swig_ptr(codes), None, faiss.swig_ptr(lists))
    index.nprobe = num_probes or len(centroids)
    return index


def search_index(index, codebook, query: torch.Tensor, num_candidates: int = 4) -> torch.LongTensor:
    """Nearest code of float32 features on the CPU, `(num_queries, codebook_dim)`, among the candidates of an index, `(num_queries,)`.

    Candidates are compared in float64, and ties go to the lowest code. Where the rounding of the index itself may have left out
    a nearer code, the codebook is searched. Raises `ValueError` when the index finds none.
    """
    num_candidates, device = min(num_candidates, index.ntotal), find_device(codebook)
    reached, candidates = (torch.from_numpy(x) for x in index.search(query.numpy(), num_candidates))
    candidates = candidates.sort(-1).values  # (num_queries, num_candidates), -1 where too few were found
    if (candidates[:, -1] < 0).any():
        raise ValueError("The index found no code for a feature; let it probe more of its lists.")
    codes = codebook(candidates.clamp(min=0).to(device), task="decode").cpu()
    distance = exact_distance(codes.flatten(0, 1), query.repeat_interleave(num_candidates, 0)).view_as(candidates)
    nearest, place = distance.masked_fill(candidates < 0, torch.inf).min(-1)
    found = candidates.gather(-1, place[:, None])[:, 0]
    largest = 2 * query.double().norm(dim=-1) + nearest.sqrt()  # of the norms of the feature and a code as near
    unsure = reached.amax(-1) - nearest < query.shape[1] * 2**-23 * largest.square()
    if unsure.any() and num_candidates < index.ntotal:
        found[unsure] = codebook(query[unsure].to(device)).cpu()
    return found


def find_device(codebook) -> torch.device:
    """Where the codebook takes its inputs; one that is offloaded takes them from anywhere."""
    device = codebook.codes.device
    return torch.device("cpu") if device.type == "meta" else device
