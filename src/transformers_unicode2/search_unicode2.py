"""Exact nearest-code search in a fraction of the arithmetic of a scan (Eq. 5 of the paper).

Three steps, each of which drops only codes that cannot be the nearest. With x the feature and c a code, both less the mean of the
codes, the nearest code has the largest score x·c - |c|²/2.

1. x and c in the leading principal directions of the codes, rotated at random and rounded to int8: an integer matrix product,
   plus a bound of what was left out (Cauchy-Schwarz over the other directions and over the rounding), is at least the score.
   Columns of the product hold that bound, so that a code survives if an integer reaches a threshold. The threshold is the score of the
   best code so far, which at first is the best of the nearest cells.
2. Survivors are scored with further directions in the same way.
3. What is left is compared in float64, on the values as given; of equal distances the lowest code wins.

Where the bounds exclude too little, as on data without structure, all codes are scored in float32 and those that its rounding
error cannot exclude are compared in float64. The result is the same by every way: on a CPU with the C kernel of
`kernel_unicode2.py`, with torch alone, on any device and for any split of a batch.
"""

import math
import weakref
from concurrent.futures import ThreadPoolExecutor

import torch

from .kernel_unicode2 import BLOCK, Queries, Tables, load_kernel

MIN_SIZE, MIN_DIM = 8192, 64  # of the codes: below, a plain scan is as fast
AUXILIARY_SHARE = 0.1  # of the memory of the codes
TAIL_COLUMNS, SLACK_COLUMNS = 4, 2
NEVER = -(2**30)
NUM_SEED_CELLS, NUM_SEEDS = 2, 4  # nearest cells, and codes in them, that give the first threshold
SAMPLE_SIZE = 32768  # codes to find the directions from
QUERY_RANGE = 1.5  # of the int8 range of the features over that of the codes
FEATURES_PER_GROUP = 128


class NearestCodeSearch:
    r"""
    Tables derived from a codebook, and the search in them.

    The tables take a tenth of the memory of the codes and are derived in seconds. They are no state, and they hold no reference to
    the codes, which may move.

    Args:
        codes (`torch.FloatTensor` of shape `(codebook_size, codebook_dim)`): the codes.
        cell_centroids (`torch.FloatTensor` of shape `(num_cells, codebook_dim)`): centroids of the cells.
        cell_offsets (`torch.LongTensor` of shape `(num_cells + 1,)`): where the cells begin and end.
        workspace (`int`, *optional*, defaults to 256 MiB): bytes that a search may use at a time.
    """

    def __init__(self, codes, cell_centroids, cell_offsets, workspace: int = 256 * 2**20):
        self.workspace = workspace
        self.size, self.dim = size, dim = codes.shape
        self.mean = torch.zeros(dim, device=codes.device)
        rows = max(1, workspace // (8 * dim))
        for part in codes.split(rows):
            self.mean += (part.double().sum(0) / size).float()
        self.half_norm = torch.cat([(part - self.mean).double().square().sum(-1).div(2) for part in codes.split(rows)])
        self.largest_norm = self.half_norm.max().mul(2).sqrt().item() if size else 0.0
        hashes = hash_rows(codes, rows)
        self.source, self.version, self.checksum = weakref.ref(codes), version_of(codes), sum_up(hashes)
        self.repeated = find_first_rows(codes, hashes, rows) != torch.arange(size, device=codes.device)
        self.any_repeated = bool(self.repeated.any())
        sizes = cell_offsets.diff()
        self.cell_centroids = cell_centroids[sizes > 0] - self.mean
        self.cells = torch.stack([cell_offsets[:-1], cell_offsets[1:]], -1)[sizes > 0]  # (num_cells, 2)
        self.pruned = size >= MIN_SIZE and dim >= MIN_DIM and math.isfinite(self.largest_norm) and self.largest_norm > 0
        if self.pruned:
            self.make_tables(codes, rows)

    def fits(self, codes: torch.Tensor) -> bool:
        """Whether these are the codes that the tables were made from, on the same device; quick for the same, unchanged tensor."""
        if self.source() is codes and self.version == version_of(codes) is not None:
            return True
        if (codes.shape, codes.device) != ((self.size, self.dim), self.mean.device):
            return False
        if sum_up(hash_rows(codes, max(1, self.workspace // (8 * self.dim)))) != self.checksum:
            return False
        self.source, self.version = weakref.ref(codes), version_of(codes)
        return True

    def make_tables(self, codes: torch.Tensor, rows: int) -> None:
        size, dim = codes.shape
        budget = int(AUXILIARY_SHARE * 4 * dim * size / (size + 4 * dim)) - 12  # bytes a code, the basis counted in
        budget = min(budget, dim + TAIL_COLUMNS + SLACK_COLUMNS)
        self.prefix_size = max(16, int(budget * 0.45) // 16 * 16)
        self.rest_size = max(16, (budget - self.prefix_size) // 16 * 16)
        lead = self.prefix_size - TAIL_COLUMNS - SLACK_COLUMNS
        self.basis = make_basis(codes, self.mean, lead, lead + self.rest_size)
        lead_basis, rest_basis = self.basis[:, :lead], self.basis[:, lead:]

        sample = (codes[:: max(1, size // SAMPLE_SIZE)] - self.mean) @ self.basis
        steps = [part.abs().flatten().kthvalue(max(1, round(0.9999 * part.numel()))).values.item() / 127
                 for part in (sample[:, :lead], sample[:, lead:])]  # fmt: skip
        self.steps = [step or self.largest_norm / 127 for step in steps]
        self.query_steps = [QUERY_RANGE * step for step in self.steps]
        self.unit, self.rest_unit = (a * b for a, b in zip(self.steps, self.query_steps))

        kept = {name: [] for name in ("lead", "rest", "lead_norm", "lead_error", "lead_tail", "norm", "error", "tail")}
        for part, half_norm in zip(codes.split(rows), self.half_norm.split(rows)):
            centred = part - self.mean
            lead_part, rest_part = centred @ lead_basis, centred @ rest_basis
            lead_codes = (lead_part / self.steps[0]).round().clamp(-127, 127)
            rest_codes = (rest_part / self.steps[1]).round().clamp(-127, 127)
            lead_values, rest_values = lead_codes * self.steps[0], rest_codes * self.steps[1]
            squared = 2 * half_norm
            kept["lead"].append(lead_codes.to(torch.int8))
            kept["rest"].append(rest_codes.to(torch.int8))
            kept["lead_norm"].append(lead_values.norm(dim=-1))
            kept["lead_error"].append((lead_part - lead_values).norm(dim=-1))
            kept["lead_tail"].append((squared - lead_part.double().square().sum(-1)).clamp(min=0).sqrt().float())
            kept["norm"].append(torch.cat([lead_values, rest_values], -1).norm(dim=-1))
            kept["error"].append(torch.cat([lead_part - lead_values, rest_part - rest_values], -1).norm(dim=-1))
            whole = lead_part.double().square().sum(-1) + rest_part.double().square().sum(-1)
            kept["tail"].append((squared - whole).clamp(min=0).sqrt().float())
        kept = {name: torch.cat(parts) for name, parts in kept.items()}
        self.rest = kept["rest"]

        # The slack of a code for the first product: units of its own, in columns of 0 to 255.
        self.lead_means = (kept["lead_norm"].mean().item(), kept["lead_error"].mean().item() + 1e-30)
        slack = relative_slack(kept["lead_norm"], kept["lead_error"], self.lead_means)
        self.tail_step = kept["lead_tail"].max().item() / 255 or 1.0
        self.slack_step = slack.max().item() / 255 or 1.0
        tail_column = (kept["lead_tail"] / self.tail_step * (1 + 1e-6)).ceil().clamp(0, 255) - 128
        slack_column = (slack / self.slack_step * (1 + 1e-6)).ceil().clamp(0, 255) - 128
        columns = [tail_column.to(torch.int8)] * TAIL_COLUMNS + [slack_column.to(torch.int8)] * SLACK_COLUMNS
        prefix = torch.cat([kept.pop("lead"), torch.stack(columns, -1)], -1)  # (size, prefix_size)
        constant = -(self.half_norm * (1 - 1e-6) / self.unit).floor().clamp(max=-NEVER)

        # The same for the second, in bfloat16.
        self.means = (kept["norm"].mean().item(), kept["error"].mean().item() + 1e-30)
        slack = torch.stack([relative_slack(kept["norm"], kept["error"], self.means), kept["tail"]], -1)
        self.slack = (slack * (1 + 2**-7)).bfloat16()  # (size, 2)

        self.half_norm = self.half_norm.float().masked_fill(self.repeated, torch.inf)
        self.constant = constant.int().masked_fill(self.repeated, NEVER)
        self.prefix = prefix
        self.kernel = load_kernel() if codes.device.type == "cpu" else None
        if self.kernel:
            self.lay_out()

    def lay_out(self) -> None:
        """The tables in the order in which the kernel reads them."""
        size = len(self.prefix)
        padding = -size % BLOCK
        prefix = torch.cat([self.prefix, self.prefix.new_zeros(padding, self.prefix_size)]).view(torch.uint8) ^ 128
        self.prefix = prefix.view(-1, 16, self.prefix_size // 4, 4).transpose(1, 2).contiguous()
        self.constant = torch.cat([self.constant, self.constant.new_full((padding,), NEVER)])
        self.rest = self.rest.view(torch.uint8) ^ 128

    def auxiliary_bytes(self) -> int:
        """Bytes of all tables."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, torch.Tensor))

    @torch.no_grad()
    def __call__(self, features: torch.Tensor, codes: torch.Tensor, num_probes: int | None = None) -> torch.LongTensor:
        r"""
        Nearest codes.

        Args:
            features (`torch.FloatTensor` of shape `(num_features, codebook_dim)`): finite features, on the device of the codes.
            codes (`torch.FloatTensor` of shape `(codebook_size, codebook_dim)`): the codes that the tables were made from.
            num_probes (`int`, *optional*): looks in that many nearest cells only; all codes by default.

        Returns:
            `torch.LongTensor` of shape `(num_features,)`.
        """
        with torch.autocast(features.device.type, enabled=False):
            if not self.pruned:
                return (
                    self.scan(features, codes) if num_probes is None else self.scan_cells(features, codes, num_probes)
                )
            step = max(1, self.workspace // (64 * self.dim))
            return torch.cat(
                [self.search(part, codes, num_probes) for part in features.split(step)]
                or [features.new_zeros(0).long()]
            )

    def search(self, features: torch.Tensor, codes: torch.Tensor, num_probes: int | None) -> torch.LongTensor:
        query = self.prepare(features)
        if self.kernel is None:
            found = self.search_with_torch(features, codes, query, num_probes)
        else:
            found = self.search_with_kernel(features, codes, query, num_probes)
        missing = (found < 0).nonzero()[:, 0]
        if len(missing):
            rest = features[missing]
            found[missing] = self.scan(rest, codes) if num_probes is None else self.scan_cells(rest, codes, num_probes)
        return found

    def prepare(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the bounds need to know of the features."""
        lead = self.prefix_size - TAIL_COLUMNS - SLACK_COLUMNS
        centred = features - self.mean
        projected = centred @ self.basis
        squared = centred.double().square().sum(-1)
        parts, norms, errors = [], [], []
        for values, step in zip((projected[:, :lead], projected[:, lead:]), self.query_steps):
            rounded = (values / step).round().clamp(-127, 127)
            parts.append(rounded)
            norms.append(values.double().square().sum(-1))
            errors.append((values - rounded * step).double().square().sum(-1))
        size = squared.sqrt()
        # Rounding of the projections, the centred features and of the score itself, generously.
        margin = 2e-5 * (size + self.largest_norm).square()
        margin += 1e-6 * self.mean.norm().item() * (size + self.largest_norm)
        lead_tail = (squared * (1 + 1e-4) - norms[0]).clamp(min=0).sqrt()
        tail = (squared * (1 + 1e-4) - norms[0] - norms[1]).clamp(min=0).sqrt()
        lead_slack = errors[0].sqrt() * self.lead_means[0] + norms[0].sqrt() * self.lead_means[1]
        slack = (errors[0] + errors[1]).sqrt() * self.means[0] + (norms[0] + norms[1]).sqrt() * self.means[1]
        tail_weight = (lead_tail * self.tail_step / self.unit * (1 + 1e-6)).ceil()
        slack_weight = (lead_slack * self.slack_step / self.unit * (1 + 1e-6)).ceil()
        columns = [spread(tail_weight, TAIL_COLUMNS), spread(slack_weight, SLACK_COLUMNS)]
        usable = (tail_weight <= 127 * TAIL_COLUMNS) & (slack_weight <= 127 * SLACK_COLUMNS) & squared.isfinite()
        return {
            "centred": centred,
            "prefix": torch.cat([parts[0].to(torch.int8), *columns], -1),
            "rest": parts[1].to(torch.int8),
            "squared": squared,
            "margin": margin,
            "weights": torch.stack([slack, tail], -1).float() * (1 + 1e-5),
            "usable": usable,
        }

    def find_cells(self, centred: torch.Tensor, num_probes: int) -> torch.LongTensor:
        """First and last code of the nearest cells, `(num_features, num_probes, 2)`, the nearest first."""
        score = centred @ self.cell_centroids.T - self.cell_centroids.square().sum(-1) / 2
        return self.cells[score.topk(min(num_probes, len(self.cells)), dim=-1).indices]

    def search_with_kernel(self, features, codes, query: dict, num_probes: int | None) -> torch.LongTensor:
        size, dim = codes.shape
        count = len(features)
        features, codes = features.contiguous(), codes.contiguous()
        cells = self.find_cells(query["centred"], num_probes or NUM_SEED_CELLS).contiguous()
        distance, found = torch.empty(count, dtype=torch.double), torch.full((count,), -1)
        costs = (self.prefix_size / 64, 8 + self.rest_size / 8, 64 + dim / 4)  # cycles
        tables = Tables(
            *(x.data_ptr() for x in (self.prefix, self.constant, self.rest, self.half_norm, self.slack, codes)),
            size, dim, self.prefix_size, self.rest_size, TAIL_COLUMNS, SLACK_COLUMNS, self.unit, self.rest_unit, costs,
        )  # fmt: skip
        names = ("prefix", "rest", "squared", "margin", "weights")
        kept = {name: query[name].contiguous() for name in names}
        queries = Queries(
            kept["prefix"].data_ptr(), kept["rest"].data_ptr(), features.data_ptr(), kept["squared"].data_ptr(),
            kept["margin"].data_ptr(), kept["weights"].data_ptr(), cells.data_ptr(), cells.shape[1], min(NUM_SEED_CELLS, cells.shape[1]),
            distance.data_ptr(), found.data_ptr(),
        )  # fmt: skip

        def run(group: torch.Tensor) -> None:
            begin, end = group
            space = torch.empty(self.kernel.workspace_size(end - begin), dtype=torch.uint8)
            budget = 0.2 * dim / 16 * size * (end - begin)  # a fifth of a scan
            failed = self.kernel.search(tables, queries, begin, end, num_probes is not None, budget, space.data_ptr())
            if failed:
                found[begin:end] = -1

        threads = torch.get_num_threads()
        group = min(FEATURES_PER_GROUP, -(-count // threads))
        groups = [(begin, min(begin + group, count)) for begin in range(0, count, group)]
        if threads == 1 or len(groups) == 1:
            for one in groups:
                run(one)
        else:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(run, groups))
        return found.where(query["usable"], -1)

    def search_with_torch(self, features, codes, query: dict, num_probes: int | None) -> torch.LongTensor:
        cells = self.find_cells(query["centred"], num_probes or NUM_SEED_CELLS)
        row, code, product = self.multiply_cells(query["prefix"], cells[:, :NUM_SEED_CELLS])
        top = torch.full((len(features), NUM_SEEDS), -1, device=row.device)
        for place in range(NUM_SEEDS):  # the best by the first product, one after another
            best = product.new_full((len(features),), 2 * NEVER).scatter_reduce(0, row, product, "amax")
            hit = product == best[row]
            top[row[hit], place] = code[hit]
            row, code, product = row[~hit], code[~hit], product[~hit]
        seeds, place = (top >= 0).nonzero(as_tuple=True)
        found, distance = self.decide(features, codes, seeds, top[seeds, place])
        score = (query["squared"] - distance) / 2 - query["margin"]
        offset = 128 * query["prefix"][:, -TAIL_COLUMNS - SLACK_COLUMNS :].long().sum(-1)
        threshold = (score / self.unit - offset - 2).clamp(NEVER, -NEVER).int()

        if num_probes is None:
            parts = self.multiply_all(query["prefix"], threshold)
        else:
            row, code, product = self.multiply_cells(query["prefix"], cells)
            alive = product >= threshold[row]
            parts = [(row[alive], code[alive], product[alive])]
        rows, codes = [seeds], [top[seeds, place]]
        budget = 0.05 * self.size * len(features)
        for row, code, product in parts:
            budget -= len(row)
            if budget < 0 and num_probes is None:
                return torch.full_like(found, -1)
            step = max(1, self.workspace // (16 * self.rest_size))
            for a, b, c in zip(row.split(step), code.split(step), product.split(step)):
                alive = self.second_score(query, a, b, c) >= score[a].float()
                rows.append(a[alive])
                codes.append(b[alive])
        return self.decide(features, codes, torch.cat(rows), torch.cat(codes))[0].where(query["usable"], -1)

    def multiply_all(self, prefix: torch.Tensor, threshold: torch.Tensor):
        """First product of all features with all codes, in parts: those that reach the threshold, as features, codes, products."""
        step = max(BLOCK, self.workspace // (16 * len(prefix)) // BLOCK * BLOCK)
        count = len(prefix)
        prefix = torch.cat([prefix, prefix.new_zeros(max(32 - count, -count % 8), prefix.shape[1])])
        for start in range(0, len(self.prefix), step):
            part = self.prefix[start : start + step]
            short = -len(part) % BLOCK
            part = torch.cat([part, part.new_zeros(short, part.shape[1])]) if short else part
            constant = torch.nn.functional.pad(self.constant[start : start + step], (0, short), value=NEVER)
            product = integer_product(prefix, part)[:count] + constant  # (count, step)
            block = product.view(count, -1, BLOCK // 2).amax(-1) >= threshold[:, None]
            row, place = block.nonzero(as_tuple=True)
            lanes = product.view(count, -1, BLOCK // 2)[row, place]  # (num_blocks, BLOCK / 2)
            hit, lane = (lanes >= threshold[row, None]).nonzero(as_tuple=True)
            code = place[hit] * (BLOCK // 2) + lane + start
            inside = code < self.size
            yield row[hit][inside], code[inside], lanes[hit, lane][inside]

    def multiply_cells(self, prefix: torch.Tensor, cells: torch.LongTensor) -> tuple[torch.Tensor, ...]:
        """First product of features with the codes of cells `(num_features, num_probes, 2)`, as features, codes, products."""
        row, code = list_codes(cells)
        step = max(1, self.workspace // (12 * self.prefix_size))
        products = [
            (self.prefix[b].float() * prefix[a].float()).sum(-1).int() + self.constant[b]
            for a, b in zip(row.split(step), code.split(step))
        ]
        return row, code, torch.cat(products)

    def second_score(self, query: dict, row: torch.Tensor, code: torch.Tensor, product: torch.Tensor) -> torch.Tensor:
        """At least the score of pairs of features and codes, from both products, `(num_pairs,)`."""
        columns = TAIL_COLUMNS + SLACK_COLUMNS
        spent = (self.prefix[code, -columns:].int() * query["prefix"][row, -columns:].int()).sum(-1)
        first = product - self.constant[code] - spent
        second = (self.rest[code].float() * query["rest"][row].float()).sum(-1)
        slack = (self.slack[code].float() * query["weights"][row]).sum(-1)
        return self.unit * first.float() + self.rest_unit * second - self.half_norm[code] + slack

    def scan(self, features: torch.Tensor, codes: torch.Tensor) -> torch.LongTensor:
        """All codes in float32, and those that its rounding error cannot exclude in float64."""
        size, dim = codes.shape
        centred = features - self.mean
        norm = centred.double().norm(dim=-1)
        eps = 2**-10 if features.is_cuda and torch.backends.cuda.matmul.allow_tf32 else 2**-23
        error = (norm + self.largest_norm) * (
            (4 + dim * 2**-3 if eps > 2**-20 else 4 + dim) * eps * (norm + self.largest_norm)
        )
        error += 2**-22 * self.mean.double().norm() * (norm + self.largest_norm)
        best = torch.full_like(norm, -torch.inf, dtype=torch.float32)
        window = (2 * error).float()
        step = max(1, min(size, self.workspace // (8 * dim + 8 * max(1, len(features)))))
        pairs = [[], [], []]
        for start in range(0, size, step):
            part = codes[start : start + step] - self.mean
            score = torch.addmm(part.square().sum(-1), centred, part.T, beta=-0.5)  # (num_features, step)
            if self.any_repeated:
                score.masked_fill_(self.repeated[start : start + step], -torch.inf)
            top = score.amax(-1)
            best = torch.maximum(best, top)
            rows = (top >= best - window).nonzero()[:, 0]
            row, code = (score[rows] >= (best - window)[rows, None]).nonzero(as_tuple=True)
            for kept, new in zip(pairs, (rows[row], code + start, score[rows[row], code])):
                kept.append(new)
            if sum(map(len, pairs[0])) > self.workspace // 64:  # many near equals: keep the nearest of each feature
                row, code, score = (torch.cat(kept) for kept in pairs)
                found, _ = self.decide(features, codes, row, code)
                keep = code == found[row]
                pairs = [[row[keep]], [code[keep]], [score[keep]]]
        row, code, score = (torch.cat(kept) for kept in pairs)
        alive = score >= (best - window)[row]
        return self.decide(features, codes, row[alive], code[alive])[0]

    def decide(self, features, codes, row: torch.Tensor, code: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Of pairs of features and codes the nearest of each feature in float64, the lowest of equals, and the squared distance.

        A feature without any pair gets -1 and infinity.
        """
        step = max(1, self.workspace // (32 * self.dim))
        distance = torch.cat(
            [
                (features[a].double() - codes[b].double()).square().sum(-1)
                for a, b in zip(row.split(step), code.split(step))
            ]
            or [features.new_zeros(0, dtype=torch.double)]
        )
        best = distance.new_full((len(features),), torch.inf).scatter_reduce(0, row, distance, "amin")
        size = self.size
        winners = torch.where(distance == best[row], code, size)
        found = torch.full((len(features),), size, device=row.device).scatter_reduce(0, row, winners, "amin")
        return found.where(found < size, -1), best

    def scan_cells(self, features: torch.Tensor, codes: torch.Tensor, num_probes: int) -> torch.LongTensor:
        """All codes of the nearest cells in float64."""
        cells = self.find_cells(features - self.mean, num_probes)
        per_feature = (cells[..., 1] - cells[..., 0]).sum(-1).max().item()
        step = max(1, self.workspace // (32 * max(1, per_feature)))
        found = []
        for part, places in zip(features.split(step), cells.split(step)):
            found.append(self.decide(part, codes, *list_codes(places))[0])
        return torch.cat(found)


def integer_product(features: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Exact product of int8 matrices, `(num_features, width)` and `(num_codes, width)`, in int32."""
    if features.device.type in ("cpu", "cuda"):
        return torch._int_mm(features, codes.T)
    return (features.float() @ codes.float().T).int()  # below 2**24, so exact as well


def list_codes(cells: torch.LongTensor) -> tuple[torch.LongTensor, torch.LongTensor]:
    """All pairs of features and codes of their cells, given as first and last code, `(num_features, num_probes, 2)`."""
    first, count = cells[..., 0].flatten(), (cells[..., 1] - cells[..., 0]).flatten()
    row = torch.arange(len(cells), device=cells.device).repeat_interleave(cells.shape[1])
    begin = count.cumsum(0) - count
    code = torch.arange(int(count.sum()), device=cells.device) + (first - begin).repeat_interleave(count)
    return row.repeat_interleave(count), code


def spread(weight: torch.Tensor, columns: int) -> torch.Tensor:
    """Whole numbers as sums of `columns` int8 of at most 127, `(len(weight), columns)`."""
    shares = [(weight - 127 * column).clamp(0, 127) for column in range(columns)]
    return torch.stack(shares, -1).to(torch.int8)


def relative_slack(norm: torch.Tensor, error: torch.Tensor, means: tuple[float, float]) -> torch.Tensor:
    """`s` such that `a * norm + b * error` is at most `s * (a * means[0] + b * means[1])` for all positive a and b."""
    return torch.maximum(norm / means[0] if means[0] else norm * 0, error / means[1]) * (1 + 1e-5)


def make_basis(codes: torch.Tensor, mean: torch.Tensor, lead: int, total: int) -> torch.Tensor:
    """The leading principal directions of the codes, `(dim, total)`; the first `lead` are rotated at random among themselves, and so
    is the rest, so that no direction needs a finer grid than another."""
    sample = codes[:: max(1, len(codes) // SAMPLE_SIZE)] - mean
    covariance = (sample.T @ sample).double()
    directions = torch.linalg.eigh(covariance).eigenvectors.flip(-1)[:, :total]
    generator = torch.Generator().manual_seed(0)
    parts = []
    for part in (directions[:, :lead], directions[:, lead:]):
        width = part.shape[1]
        turn = torch.linalg.qr(torch.randn(width, width, dtype=torch.double, generator=generator)).Q
        parts.append(part @ turn.to(part.device))
    return torch.cat(parts, -1).float().contiguous()


def version_of(codes: torch.Tensor) -> int | None:
    """Grows whenever a tensor is written to; `None` for one that does not count."""
    return None if codes.is_inference() else codes._version


def hash_rows(codes: torch.Tensor, rows: int) -> torch.LongTensor:
    """A number for each row, `(len(codes),)`, equal for equal rows."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (codes.shape[1],), generator=generator).to(codes.device) | 1
    parts = [((part + 0.0).view(torch.int32).long() * factors).sum(-1) for part in codes.split(rows)]  # -0.0 equals 0.0
    return torch.cat(parts)


def sum_up(hashes: torch.LongTensor) -> int:
    """One number for rows in their order."""
    return (hashes * torch.arange(1, 2 * len(hashes), 2, device=hashes.device)).sum().item()


def find_first_rows(codes: torch.Tensor, hashes: torch.LongTensor, rows: int) -> torch.LongTensor:
    """For each row the number of the first row that equals it, `(len(codes),)`."""
    hashes, order = hashes.sort(stable=True)
    equal = torch.zeros_like(order, dtype=torch.bool)
    places = (hashes[1:] == hashes[:-1]).nonzero()[:, 0] + 1
    for part in places.split(rows):
        equal[part] = (codes[order[part]] == codes[order[part - 1]]).all(-1)
    start = torch.arange(len(order), device=order.device).masked_fill(equal, 0).cummax(0).values
    return torch.empty_like(order).scatter_(0, order, order[start])
