"""Tables that exclude most codes from a nearest-code search by small integer products, and the bounds behind them.

With x a feature and c a code, both less a middle of the codes, the nearest code has the largest score x·c - |c|²/2. The score is
bounded from above by parts, each of them rounded to int8:

1. `prefix`: the products in the leading principal directions, rotated at random so that no direction needs a finer grid than another.
   What is left out is bounded by Cauchy-Schwarz: the other directions by `tail`, the rounding by `slack`. Columns of the product itself
   hold both bounds, so that a code survives if one integer reaches a threshold.
2. `rest`: the products in further directions, for the survivors.

Rounding in float32 is covered by enlarging the tails and reducing the norms, each in proportion to the code or feature itself.
"""

import torch

from .kernel_unicode2 import BLOCK

AUXILIARY_SHARE = 0.1  # of the memory of the codes in float32, for all tables
BYTES_BESIDE = 18  # a code: constants, norms and slack
TAIL_COLUMNS, SLACK_COLUMNS = 4, 2
COLUMNS = TAIL_COLUMNS + SLACK_COLUMNS
NEVER, ALWAYS = -(2**30), 2**29  # constants of codes that the first product drops, or keeps, whatever it is
SAMPLE_SIZE = 8192  # codes to find the directions from
WIDEST = 4  # tail and slack of a code that the first product bounds, in medians
QUERY_RANGE = 1.5  # of the int8 range of the features over that of the codes
TAIL_MARGIN, NORM_MARGIN = 3e-4, 1e-5  # of the squared norm: what float32 may lose, and more than that


class Screen:
    r"""
    Tables of a codebook and the bounds in them.

    Args:
        codes (`torch.FloatTensor` of shape `(codebook_size, codebook_dim)`): the codes.
        mean (`torch.FloatTensor` of shape `(codebook_dim,)`): what to subtract from codes and features.
        half_norm (`torch.FloatTensor` of shape `(codebook_size,)`): half the squared norm of each code less the mean.
        unused (`torch.BoolTensor` of shape `(codebook_size,)`): codes that no search may find.
        kernel (`ctypes.CDLL`, *optional*): what `load_kernel` gave, to lay the tables out for.
    """

    def __init__(self, codes, mean, half_norm, unused, kernel=None):
        size, dim = codes.shape
        width = (
            int(AUXILIARY_SHARE * 4 * dim * size / (size + 4 * dim)) - BYTES_BESIDE
        )  # bytes a code, the basis counted in
        width = min(width, dim + COLUMNS)
        self.size, self.mean = size, mean
        self.prefix_size = max(16, int(width * 0.45) // 16 * 16)
        self.rest_size = max(16, (width - self.prefix_size) // 16 * 16)
        self.lead = self.prefix_size - COLUMNS
        sample = codes[:: max(1, size // SAMPLE_SIZE)].float() - mean
        self.basis = make_basis(sample, self.lead, min(dim, self.lead + self.rest_size))
        self.rest_size = self.basis.shape[1] - self.lead
        self.steps = [find_step(part) for part in self.project(sample[::2]).split((self.lead, self.rest_size), -1)]
        self.unit, self.rest_unit = (QUERY_RANGE * step**2 for step in self.steps)
        self.kernel = kernel
        self.measure(codes, half_norm, unused)
        self.half_norm = (half_norm * (1 - NORM_MARGIN)).float().masked_fill(unused, torch.inf)
        constant = -(half_norm.double() * (1 - NORM_MARGIN) / self.unit).floor().clamp(max=-NEVER)
        self.constant = constant.int().masked_fill(self.wide, ALWAYS).masked_fill(unused, NEVER)
        if self.kernel:
            self.lay_out()

    def project(self, centred: torch.Tensor) -> torch.Tensor:
        """Rows `(num_rows, dim)` in the directions of the basis, `(num_rows, lead + rest_size)`."""
        dtype = torch.float32 if products_are_exact() else torch.float64
        return (centred.to(dtype) @ self.basis.to(dtype)).float()

    def measure(self, codes: torch.Tensor, half_norm: torch.Tensor, unused: torch.Tensor) -> None:
        """Rounds the codes, and measures what that and the directions leave out."""
        size, dim = codes.shape
        self.prefix = torch.empty(size, self.prefix_size, dtype=torch.int8, device=codes.device)
        self.rest = torch.empty(size, self.rest_size, dtype=torch.int8, device=codes.device)
        measured = torch.empty(6, size, device=codes.device)
        steps = torch.tensor(self.steps, device=codes.device).repeat_interleave(
            torch.tensor([self.lead, self.rest_size], device=codes.device)
        )
        rows = max(1, 2**22 // dim)
        for start in range(0, size, rows):
            place = slice(start, start + rows)
            values = self.project(codes[place].float() - self.mean)
            rounded = (values / steps).round_().clamp_(-127, 127)
            self.prefix[place, : self.lead], self.rest[place] = rounded[:, : self.lead], rounded[:, self.lead :]
            rounded *= steps
            squared, error = (2 * half_norm[place]).float(), values - rounded
            inside = values[:, : self.lead].square().sum(-1), values.square().sum(-1)
            tails = [(squared * (1 + TAIL_MARGIN) - part).clamp(min=0).sqrt() for part in inside]
            norms = rounded[:, : self.lead].norm(dim=-1), rounded.norm(dim=-1)
            errors = error[:, : self.lead].norm(dim=-1), error.norm(dim=-1)
            measured[:, place] = torch.stack([*tails, *norms, *errors])
        tail, whole_tail, norm, whole_norm, error, whole_error = measured.masked_fill_(unused, 0)
        self.means = [(typical(a), typical(b)) for a, b in ((norm, error), (whole_norm, whole_error))]
        slack = relative_slack(norm, error, self.means[0])
        whole_slack = relative_slack(whole_norm, whole_error, self.means[1])
        limits = [min(part.max().item(), WIDEST * typical(part)) for part in (tail, slack)]
        self.wide = (tail > limits[0]) | (slack > limits[1])  # these few would make the steps of all others coarse
        self.tail_step, self.slack_step = (limit / 254 or 1.0 for limit in limits)
        columns = [(tail / self.tail_step)] * TAIL_COLUMNS + [slack / self.slack_step] * SLACK_COLUMNS
        for place, column in enumerate(columns, self.lead):
            self.prefix[:, place] = (column * (1 + 1e-6)).ceil().clamp(0, 255) - 128
        whole = torch.stack([whole_slack, whole_tail], -1)  # (size, 2)
        self.slack = (whole * (1 + 2**-7)).bfloat16()  # never rounded below

    def lay_out(self) -> None:
        """The tables in the order in which the kernel reads them."""
        padding = -self.size % BLOCK
        prefix = torch.cat([self.prefix, self.prefix.new_zeros(padding, self.prefix_size)]).view(torch.uint8)
        prefix.bitwise_xor_(128)  # unsigned
        self.prefix = prefix.view(-1, 16, self.prefix_size // 4, 4).transpose(1, 2).contiguous()
        self.constant = torch.cat([self.constant, self.constant.new_full((padding,), NEVER)])
        self.rest = self.rest.view(torch.uint8).bitwise_xor_(128)

    def prepare(self, centred: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the bounds need to know of features less the mean, float64 `(num_features, dim)`.

        `usable` is false for a feature that is too far from the codes for the integers.
        """
        squared = centred.square().sum(-1)
        values = self.project(centred.float()).double()
        parts, norms, errors = [], [], []
        for part, step in zip(values.split((self.lead, self.rest_size), -1), self.steps):
            rounded = (part / (QUERY_RANGE * step)).round().clamp(-127, 127)
            parts.append(rounded.to(torch.int8))
            norms.append(part.square().sum(-1))
            errors.append((part - rounded * (QUERY_RANGE * step)).square().sum(-1))
        norms[1], errors[1] = norms[0] + norms[1], errors[0] + errors[1]
        tails = [(squared * (1 + TAIL_MARGIN) - norm).clamp(min=0).sqrt() for norm in norms]
        slacks = [error.sqrt() * a + norm.sqrt() * b for norm, error, (a, b) in zip(norms, errors, self.means)]
        tail_weight = (tails[0] * (self.tail_step / self.unit) * (1 + 1e-6)).ceil()
        slack_weight = (slacks[0] * (self.slack_step / self.unit) * (1 + 1e-6)).ceil()
        usable = (tail_weight <= 127 * TAIL_COLUMNS) & (slack_weight <= 127 * SLACK_COLUMNS) & (squared < 1e30)
        columns = spread(tail_weight, TAIL_COLUMNS), spread(slack_weight, SLACK_COLUMNS)
        return {
            "prefix": torch.cat([parts[0], *columns], -1),  # (num_features, prefix_size)
            "rest": parts[1],
            "squared": squared,
            "weights": torch.stack([slacks[1], tails[1]], -1).float() * (1 + 1e-5),  # (num_features, 2)
            "usable": usable,
        }

    def thresholds(self, query: dict, distance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the first product and the bound of the score must reach for a code to be within squared `distance`."""
        score = (query["squared"] - distance) / 2 - 1e-9 * (query["squared"] + distance)
        offset = 128 * query["prefix"][:, self.lead :].long().sum(-1)  # the columns of the codes are stored less 128
        units = (score / self.unit - offset - 2).clamp(NEVER, ALWAYS // 2).int()
        return units, (score - 1e-6 * score.abs() - 1e-37).float()

    def first_product(self, query: dict, row: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
        """First product and constant of features `(n,)` and their codes `(n, num_codes)`; the latter's shape."""
        product = torch.bmm(self.prefix[code].float(), query["prefix"][row].float()[..., None])[
            ..., 0
        ]  # whole, below 2**24
        return product.int() + self.constant[code]

    def all_products(self, query: dict, step: int):
        """First products of all features with `step` codes at a time: first code and int32 `(num_features, num_codes)`."""
        prefix, count = query["prefix"], len(query["prefix"])
        prefix = torch.cat([prefix, prefix.new_zeros(max(32 - count, -count % 8), prefix.shape[1])])
        for start in range(0, self.size, step):
            part = self.prefix[start : start + step]
            padded = torch.cat([part, part.new_zeros(-len(part) % 8, part.shape[1])]) if len(part) % 8 else part
            product = torch._int_mm(prefix, padded.T)[:count, : len(part)]
            yield start, product.add_(self.constant[start : start + step])

    def bound(self, query: dict, row: torch.Tensor, code: torch.Tensor, product: torch.Tensor) -> torch.Tensor:
        """At least the score of pairs of features and codes, from their first product and the second, float32 `(num_pairs,)`."""
        spent = (self.prefix[code, self.lead :].int() * query["prefix"][row, self.lead :].int()).sum(-1)
        first = product - self.constant[code] - spent
        second = (self.rest[code].float() * query["rest"][row].float()).sum(-1)
        slack = (self.slack[code].float() * query["weights"][row]).sum(-1)
        return self.unit * first.float() + self.rest_unit * second - self.half_norm[code] + slack


def products_are_exact() -> bool:
    """Whether products of float32 matrices are in float32, as by default, and not in TF32 or bfloat16."""
    try:
        return torch.get_float32_matmul_precision() == "highest" and not torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:  # set by other means
        return False


def make_basis(sample: torch.Tensor, lead: int, total: int) -> torch.Tensor:
    """About the leading principal directions of rows, `(dim, total)`, orthonormal; the first `lead` are rotated at random among
    themselves, and so are the others."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.double, generator=generator).to(sample.device)

    norm = sample.norm(dim=-1, keepdim=True)
    sample = sample * (WIDEST * typical(norm) / norm.clamp(min=1e-30)).clamp(max=1)  # far codes do not decide alone
    covariance = (sample.T @ sample / len(sample)).double()
    directions = draw(len(covariance), total)
    for _ in range(4):  # subspace iteration
        directions = torch.linalg.qr(covariance @ directions).Q
    directions = directions @ torch.linalg.eigh(directions.T @ covariance @ directions).eigenvectors.flip(-1)
    parts = directions.split((lead, total - lead), -1)
    return torch.cat([part @ torch.linalg.qr(draw(part.shape[1], part.shape[1])).Q for part in parts], -1).float()


def find_step(values: torch.Tensor) -> float:
    """Width of a grid of int8 that has room for all values of nearly all rows."""
    peak = values.abs().amax(-1)
    return peak.kthvalue(max(1, round(0.98 * len(peak)))).values.item() / 127 or peak.max().item() / 127 or 1.0


def typical(values: torch.Tensor) -> float:
    """The median, which a few large values do not move; the mean where most are zero, so that it is zero if all are."""
    return values.median().item() or values.mean().item()


def spread(weight: torch.Tensor, columns: int) -> torch.Tensor:
    """Whole numbers as sums of `columns` int8 of at most 127, `(len(weight), columns)`."""
    shares = [(weight - 127 * column).clamp(0, 127) for column in range(columns)]
    return torch.stack(shares, -1).to(torch.int8)


def relative_slack(norm: torch.Tensor, error: torch.Tensor, means: tuple[float, float]) -> torch.Tensor:
    """`s` such that `a * norm + b * error` is at most `s * (a * means[0] + b * means[1])` for all positive a and b."""
    parts = [part / mean if mean else part for part, mean in zip((norm, error), means)]
    return torch.maximum(*parts) * (1 + 1e-5)
