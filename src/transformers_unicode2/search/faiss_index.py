"""A codebook as a FAISS index, and the search in one."""

import importlib

import torch

from ..search_unicode2 import LARGEST_SQUARE, check_num_probes, exact_distance


class FaissSearch:
    r"""
    Searches a codebook with FAISS on the CPU: `codebook.search = FaissSearch(codebook, "ivf")`. `del codebook.search`
    ends it.

    The codes stay the same with `"flat"`, and with `"ivf"` when it looks into all lists. The candidates of the index
    are compared in float64, and ties go to the lowest code. The codebook is searched where the rounding of the index
    may have left out a nearer code. The same holds where the index finds nothing, and where its float32 cannot hold
    the squares of the feature or of the codes.

    Args:
        codebook (`UniCode2Codebook`): the codes and their cells.
        index (`str` or `faiss.Index`, *optional*, defaults to `"flat"`): the lists of `"ivf"` are the cells of the
            codebook. A trained index must have metric L2 and hold the codes in their order.
        num_probes (`int`, *optional*): lists that `"ivf"` looks into; all of them, which is exact, by default.

    Raises:
        `ImportError`: without FAISS. `ValueError`: on another kind, or on an index of other vectors or another
            metric, see `check_index`.
    """

    def __init__(self, codebook, index="flat", num_probes: int | None = None):
        if isinstance(index, str):
            index = make_index(codebook, index, num_probes)
        elif num_probes is not None:
            raise ValueError(f"`num_probes` is {num_probes}, but the index is yours; set its `nprobe`.")
        else:
            check_index(index, codebook)
        self.codebook, self.index = codebook, index
        self.moderate = holds_moderate_rows(codebook)

    def __call__(
        self, features: torch.Tensor, num_probes: int | None = None, num_candidates: int = 4
    ) -> torch.LongTensor:
        """Codes of float32 features `(num_features, codebook_dim)`, `(num_features,)`.

        Raises `ValueError` when `num_probes` is given.
        """
        if num_probes is not None:
            raise ValueError(f"`num_probes` is {num_probes}, but a FAISS index is in use; give it to `FaissSearch`.")
        num_candidates, codes, query = min(num_candidates, self.index.ntotal), self.codebook.codes, features.cpu()
        reached, candidates = map(torch.from_numpy, self.index.search(query.numpy(), num_candidates))
        # -1 stands where too few were found.
        candidates = candidates.sort(-1).values  # (num_features, num_candidates)
        held = codes[candidates.clamp(min=0).to(codes.device)].float().cpu().flatten(0, 1)
        distance = exact_distance(held, query.repeat_interleave(num_candidates, 0)).view_as(candidates)
        nearest, place = distance.masked_fill(candidates < 0, torch.inf).min(-1)
        found = candidates.gather(-1, place[:, None])[:, 0]
        # Of the norms of the feature and a code as near.
        largest = 2 * query.double().norm(dim=-1) + nearest.sqrt()
        error = query.shape[1] * (2**-23 * largest.square() + torch.finfo(torch.float32).tiny)
        unsure = ~(reached.amax(-1) - nearest > error) | (found < 0) | ~are_moderate(query) | (not self.moderate)
        if unsure.any():
            found[unsure] = type(self.codebook).search(self.codebook, query[unsure].to(codes.device)).cpu()
        return found


def make_index(codebook, kind: str = "flat", num_probes: int | None = None):
    """A FAISS index of the codes in their order.

    Args:
        codebook (`UniCode2Codebook`): the codes and their cells.
        kind (`str`, *optional*, defaults to `"flat"`): `"flat"` for an `IndexFlatL2`, `"ivf"` for an `IndexIVFFlat`
            whose lists are the cells.
        num_probes (`int`, *optional*): lists that `"ivf"` looks into; all of them, which is exact, by default.

    Raises:
        `ImportError`: without FAISS. `ValueError`: on another kind.
    """
    faiss, num_probes = import_faiss(), check_num_probes(num_probes)
    if kind not in ("flat", "ivf"):
        raise ValueError(f"The index is {kind!r}; it must be 'flat', 'ivf' or an index of FAISS.")
    if num_probes and kind == "flat":
        raise ValueError(f"`num_probes` is {num_probes}, but a flat index has no lists; ask for 'ivf'.")
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
    # The index owns it, as one read from disk does.
    coarse.this.disown()
    index.own_fields = index.is_trained = True
    index.add_core(len(codes), faiss.swig_ptr(codes), None, faiss.swig_ptr(lists))
    index.nprobe = num_probes or len(centroids)
    return index


def import_faiss():
    try:
        return importlib.import_module("faiss")
    except ModuleNotFoundError as error:
        raise ImportError("Searching with FAISS needs faiss-cpu; install transformers_unicode2[codebook].") from error


def check_index(index, codebook) -> None:
    """Raises `ValueError` unless an index holds the codes of a codebook in their order and compares them by Euclidean
    distance.

    Vectors that the index can give back have to be the codes. One that rounds them has to find half of a sample of
    codes.
    """
    faiss, (size, width) = import_faiss(), codebook.codes.shape
    if not isinstance(index, faiss.Index):
        raise ValueError(f"The index is a {type(index).__name__}; it must be 'flat', 'ivf' or an index of FAISS.")
    if (index.ntotal, index.d) != (size, width):
        raise ValueError(
            f"The index holds {index.ntotal} vectors of width {index.d}, the codebook {size} of width {width}."
        )
    parts = list_parts(index)
    for part in parts:
        check_part(part, size)
    same = count_same(parts[-1] if isinstance(parts[0], faiss.IndexIDMap) else index, codebook)
    if size / 2 < same < size:
        raise ValueError(f"{size - same} of the {size} vectors in the index are not the codes in their order.")
    device = find_device(codebook)
    sample = codebook(torch.arange(0, size, -(-size // 64), device=device), task="decode").float().cpu()
    # (num_sampled, num_candidates)
    found = torch.from_numpy(index.search(sample.numpy(), min(4, size))[1]).clamp(min=0)
    hits = (codebook(found.to(device), task="decode").float().cpu() == sample[:, None]).all(-1).any(-1).sum().item()
    if hits < len(sample) / 2:
        raise ValueError(
            f"The index finds {hits} of {len(sample)} codes by themselves; it does not hold the codes in their order."
        )


def list_parts(index) -> list:
    """An index and those inside of it, as what they are."""
    faiss = import_faiss()
    parts = [faiss.downcast_index(index)]
    while isinstance(parts[-1], (faiss.IndexPreTransform, faiss.IndexIDMap, faiss.IndexRefine)):
        inner = parts[-1].base_index if isinstance(parts[-1], faiss.IndexRefine) else parts[-1].index
        parts.append(faiss.downcast_index(inner))
    return parts


def check_part(index, size: int) -> None:
    """Raises `ValueError` on an index that is not trained, of another metric, that changes distances or has other
    ids."""
    faiss, name = import_faiss(), type(index).__name__
    if not index.is_trained:
        raise ValueError(f"The {name} is not trained; train it and add the codes in their order.")
    if index.metric_type != faiss.METRIC_L2:
        raise ValueError(
            f"The {name} has FAISS's metric {index.metric_type}; codes are nearest by METRIC_L2, which is "
            f"{faiss.METRIC_L2}."
        )
    if isinstance(index, faiss.IndexIDMap) and (faiss.vector_to_array(index.id_map) != range(size)).any():
        raise ValueError(f"The ids of the {name} are not 0 to {size - 1} in their order; add the codes in their order.")
    if isinstance(index, faiss.IndexPreTransform):
        for place in range(index.chain.size()):
            transform = faiss.downcast_VectorTransform(index.chain.at(place))
            if not (isinstance(transform, faiss.LinearTransform) and transform.is_orthonormal):
                raise ValueError(
                    f"The {name} applies a {type(transform).__name__}, after which other codes are nearest."
                )


def count_same(index, codebook, rows: int = 2**16) -> int:
    """How many vectors an index gives back that are the codes at their places, but for rounding; 0 if it gives none
    back."""
    try:
        # By itself: in several threads, what a kind of index cannot do ends the process.
        index.reconstruct_n(0, 1)
    except RuntimeError:
        return 0
    same = 0
    for ids in torch.arange(index.ntotal, device=find_device(codebook)).split(rows):
        held = torch.from_numpy(index.reconstruct_n(ids[0].item(), len(ids)))
        codes = codebook(ids, task="decode").float().cpu()
        same += ((held - codes).norm(dim=-1) <= 1e-4 * codes.norm(dim=-1)).sum().item()
    return same


def holds_moderate_rows(codebook, rows: int = 2**16) -> bool:
    """Whether float32 can hold the squares of all codes and centroids."""
    device = find_device(codebook)
    return all(
        are_moderate(codebook(ids, task=task)).all()
        for task, table in (("decode", codebook.codes), ("decode_cells", codebook.cell_centroids))
        for ids in torch.arange(len(table), device=device).split(rows)
    )


def are_moderate(rows: torch.Tensor) -> torch.BoolTensor:
    """For which rows float32 can hold the squares, `(num_rows,)`."""
    return rows.double().square().sum(-1) < LARGEST_SQUARE


def find_device(codebook) -> torch.device:
    """Where the codebook takes its inputs; one that is offloaded takes them from anywhere."""
    device = codebook.codes.device
    return torch.device("cpu") if device.type == "meta" else device
