"""Tables that exclude most codes from a nearest-code search by small integer products, and the bounds behind them.

The codes are cut into parts, which are cells of the codebook. Let x be a feature and c a code, both less the centre
of the code's part. The nearest code has the smallest |x|² - 2 (x·c - |c|²/2). Two sums bound the score x·c - |c|²/2
from above; the second is for codes that pass the first:

1. The products in the leading principal directions, of codes and features rounded to int8.
2. The same, and the products in further directions, of codes rounded to four bits.

Each code and each feature is on a grid of its own. Cauchy-Schwarz bounds what the directions leave out by its norms:
the `tail` of a code and the `weight` of a feature. The width of the code's grid, its `scale`, times the `slack` of
the feature bounds what the rounding leaves out. The feature is rounded once for all parts: its products with the
centres are constants of the codes. Tails, weights and slack are enlarged by what float32 may round off. `kernel.c`
computes the bounds and compares them.
"""

from dataclasses import dataclass

import torch

from ..search_unicode2 import products_are_exact
from .kernel import BLOCK

# Of the memory of the codes in float32: what all tables may take.
AUXILIARY_SHARE = 0.1
# Of a code: constants, scales, tails and what NearestCodeSearch keeps.
BYTES_BESIDE = 21
# Leading directions in which the extent of a part is known apart from the others.
OUTLINE = 16
# Codes of a part: smaller cells are put together.
LEAST_PART = 128
# Codes to find the directions from.
SAMPLE_SIZE = 8192
# In medians: codes farther than that have no say in a centre, and little in the directions.
WIDEST = 4
# Directions of the second product: more of them cost more than they exclude.
MOST_REST = 352
# Of the four-bit grid, in standard deviations.
HALF_STEP = 0.168
# Of a norm: what squares in float32 may not hold.
TINY = 1e-17
UNIT = 2**-23
# Of the squared norm: what float32 may lose, and more than that.
NORM_MARGIN = 1e-5


@dataclass
class Query:
    r"""
    Features as the kernel reads them.

    Args:
        usable (`torch.BoolTensor` of shape `(num_features,)`): false for a feature that is too far from the codes for
            float32.
        norms (`torch.FloatTensor` of shape `(num_features,)`): the norms, 0 for those that are not usable.
        squares (`torch.FloatTensor` of shape `(4, num_parts, num_features)`): squared distances to the centres. They
            are those in all, in the outline, and in the directions of the first product and of the second.
        prefix, rest (`torch.CharTensor` of shape `(num_features, lead)` and `(num_features, rest_size)`): rounded to
            whole numbers.
        scales, lost (`torch.FloatTensor` of shape `(num_features, 2)`): their grids, and the norm of what rounding
            takes.
    """

    usable: torch.BoolTensor
    norms: torch.Tensor
    squares: torch.Tensor
    prefix: torch.Tensor
    rest: torch.Tensor
    scales: torch.Tensor
    lost: torch.Tensor


class BoundTables:
    r"""
    Tables of a codebook on a CPU, as the kernel reads them.

    Args:
        codes (`torch.FloatTensor` of shape `(codebook_size, codebook_dim)`): the codes, finite.
        mean (`torch.FloatTensor` of shape `(codebook_dim,)`): what to subtract from codes and features.
        half_norm (`torch.FloatTensor` of shape `(codebook_size,)`): half the squared norm of each code less the mean,
            infinite for codes that no search may find.
        offsets (`torch.LongTensor` of shape `(num_cells + 1,)`): where the cells of the codebook begin and end.
    """

    def __init__(self, codes, mean, half_norm, offsets):
        self.size, self.dim = codes.shape
        self.mean = mean
        self.ends = torch.tensor(cut_into_parts(offsets.tolist(), self.size), device=codes.device)  # (num_parts + 1,)
        self.lead, self.rest_size = choose_sizes(self.size, self.dim, len(self.ends) - 1)
        sample = codes[:: max(1, self.size // SAMPLE_SIZE)].float() - mean
        directions = find_directions(sample, self.lead + self.rest_size)
        self.basis = turn(directions, self.lead).half()
        skew = find_skew(self.basis)
        outline = self.basis[:, : self.lead].double().T @ directions[:, :OUTLINE]
        # Lengthens nothing, so that all but the outline has a norm, too.
        self.outline = (outline * (1 - skew)).float()
        self.margin = 2 * skew + 4 * (self.dim + 64) * UNIT
        unused = half_norm.isinf()
        self.find_centres(codes, half_norm.masked_fill(unused, 0))
        self.measure(codes, unused)
        self.lay_out()

    def find_centres(self, codes: torch.Tensor, half_norm: torch.Tensor) -> None:
        """Of each part: `centres` less the mean, and the same in the directions of the basis."""
        centres = torch.empty(len(self.ends) - 1, self.dim, dtype=torch.float32, device=codes.device)
        for part, (first, last) in enumerate(zip(self.ends[:-1].tolist(), self.ends[1:].tolist())):
            norm = half_norm[first:last].float().sqrt()
            near = (norm <= WIDEST * norm.median()).float()
            centres[part] = near @ codes[first:last].float() / near.sum()
        self.origins = centres
        self.centres = (centres.double() - self.mean).float()
        self.projected, self.centre_norms = self.project(self.centres), self.centres.norm(dim=-1)

    def project(self, centred: torch.Tensor) -> torch.Tensor:
        """Rows `(num_rows, dim)` in the directions of the basis, `(num_rows, lead + rest_size)`."""
        return multiply(centred, self.basis)

    def measure(self, codes: torch.Tensor, unused: torch.Tensor) -> None:
        """Rounds the codes, and measures what that and the directions leave out."""
        size, device = self.size, codes.device
        self.prefix = torch.empty(size, self.lead, dtype=torch.int8, device=device)
        self.rest = torch.empty(size, self.rest_size // 2, dtype=torch.uint8, device=device)
        self.constant = torch.empty(size, dtype=torch.float32, device=device)
        self.units, self.rest_units = (torch.empty(size, 2, dtype=torch.bfloat16, device=device) for _ in range(2))
        self.more = torch.empty(size, 2, dtype=torch.bfloat16, device=device)
        # See `find_extents`.
        self.extents = torch.full_like(self.centre_norms, torch.inf).repeat(4, 1)
        # The norms of whole numbers and of errors in steps, of both grids.
        self.largest = torch.zeros_like(self.mean[:4])
        rows = max(1, 2**20 // self.dim)
        for part, (first, last) in enumerate(self.spans().tolist()):
            for start in range(first, last, rows):
                self.measure_rows(codes, part, slice(start, min(start + rows, last)))
        self.constant.masked_fill_(unused, -torch.inf)
        self.largest = (self.largest * (1 + NORM_MARGIN)).tolist()
        del self.origins

    def measure_rows(self, codes: torch.Tensor, part: int, place: slice) -> None:
        centred = codes[place].float() - self.origins[part]
        squared = centred.square().sum(-1)
        values, centres = (
            x.split((self.lead, self.rest_size), -1) for x in (self.project(centred), self.projected[part])
        )
        extents = self.find_extents(multiply(values[0], self.outline), squared).amin(-1)
        self.extents[:, part] = torch.minimum(self.extents[:, part], extents)
        tail = squared * (1 + self.margin)
        units, constants, largest = [], [], []
        for grid, value, centre in zip((round_to_bytes, round_to_nibbles), values, centres):
            scale, whole = grid(value)
            tail = tail - value.square().sum(-1)
            units.append(torch.stack([round_up(tail.clamp(min=0).sqrt() + TINY), scale], -1))
            scale = scale.float()
            constants.append(-(whole * centre).sum(-1) * scale)
            error = torch.addcmul(value, whole, scale[:, None], value=-1).norm(dim=-1)
            largest += [whole.norm(dim=-1).max(), (error / scale).max()]
            if grid is round_to_bytes:
                self.prefix[place] = whole.to(torch.int8)
            else:
                self.rest[place] = pack(whole)
        self.units[place], self.rest_units[place] = units
        self.constant[place] = constants[0] - squared * ((1 - NORM_MARGIN) / 2)
        self.more[place] = round_up(torch.stack([error + TINY, constants[1]], -1))
        self.largest = torch.maximum(self.largest, torch.stack(largest))

    def spans(self) -> torch.LongTensor:
        """First code of each part, and that after the last, `(num_parts, 2)`."""
        return torch.stack([self.ends[:-1], self.ends[1:]], -1)

    def find(self, query: Query, count: int) -> torch.LongTensor:
        """The parts with the nearest centres, `(num_features, count)`, the nearest first."""
        distance = query.squares[0]
        return distance.topk(min(count, len(distance)), dim=0, largest=False).indices.T

    def find_extents(self, outlined: torch.Tensor, squared: torch.Tensor) -> torch.Tensor:
        """Bounds of the norms of rows less a centre, from `outlined`, in the outline, and from their squared norms.

        Returns `(4, num_rows)`: the least norm in the outline and less the largest one, then the same outside of it.
        Minima of these over rows hold for all of them.
        """
        inside, spread = outlined.square().sum(-1), self.margin * squared
        values = [
            part.clamp(min=0).sqrt()
            for part in (inside - spread, inside + spread, squared - inside - spread, squared - inside + spread)
        ]
        return torch.stack([values[0], -values[1] - TINY, values[2], -values[3] - TINY])

    def find_parts(self, code: torch.LongTensor) -> torch.LongTensor:
        """The part of each code."""
        return torch.searchsorted(self.ends, code, right=True).sub_(1).clamp_(max=len(self.ends) - 2)

    def lay_out(self) -> None:
        """The tables in the order in which the kernel reads them."""
        padding = BLOCK - self.size % -BLOCK
        # Unsigned.
        self.prefix.view(torch.uint8).bitwise_xor_(128)
        for name in ("prefix", "rest"):
            table = getattr(self, name)
            table = torch.cat([table, table.new_zeros(padding, table.shape[1])]).view(torch.int32)
            setattr(self, name, table.view(-1, 16, table.shape[1]).transpose(1, 2).contiguous())
        for name in ("constant", "units", "rest_units", "more"):
            table = getattr(self, name)
            setattr(self, name, torch.cat([table, table.new_zeros(padding, *table.shape[1:])]))

    def prepare(self, centred: torch.Tensor) -> Query:
        """Rounds features less the mean, float32 `(num_features, dim)`, and measures what the bounds need to know of
        them."""
        norm = centred.norm(dim=-1)
        usable = norm < 1e15
        if not usable.all():
            centred = centred.masked_fill(~usable[:, None], 0)
        values, centres = (x.split((self.lead, self.rest_size), -1) for x in (self.project(centred), self.projected))
        outlined = (multiply(part[0], self.outline) for part in (centres, values))
        pairs = ((self.centres, centred), outlined, *zip(centres, values))
        (prefix, *first), (rest, *second) = map(round_features, values)
        scales, lost = (torch.stack(pair, -1) for pair in zip(first, second))
        return Query(
            usable=usable,
            norms=norm.masked_fill(~usable, 0),
            squares=torch.stack([square_distances(*pair) for pair in pairs]),
            prefix=prefix,
            rest=rest,
            scales=scales,
            lost=lost,
        )

    def auxiliary_bytes(self) -> int:
        """Bytes of all tables."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, torch.Tensor))


def round_features(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows as whole numbers, int8, times scales, float32 `(num_rows,)`, and the norms of what that takes,
    `(num_rows,)`."""
    scale = torch.maximum(values.amax(-1), -values.amin(-1)).clamp(min=1e-30) / 127
    rounded = (values / scale[:, None]).round_()
    whole = rounded.to(torch.int8)
    error = torch.addcmul(values, rounded, scale[:, None], value=-1, out=rounded)
    return whole, scale, error.norm(dim=-1) * (1 + NORM_MARGIN)


def multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The product of two matrices with the accuracy of float32, whatever is set for faster ones."""
    dtype = torch.float32 if products_are_exact() else torch.float64
    return (a.to(dtype) @ b.to(dtype)).float()


def square_distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Of rows `(m, dim)` and `(n, dim)`, by products, `(m, n)`."""
    if not products_are_exact():
        a, b = a.double(), b.double()
    norms = a.square().sum(-1)[:, None] + b.square().sum(-1)
    return torch.addmm(norms, a, b.T, alpha=-2).float()


def cut_into_parts(offsets: list[int], size: int) -> list[int]:
    """Where parts of at least `LEAST_PART` codes end, each of them whole cells; 0 comes first."""
    ends = [0]
    for offset in offsets:
        if ends[-1] + LEAST_PART <= offset <= size - LEAST_PART:
            ends.append(offset)
    return [*ends, size]


def choose_sizes(size: int, dim: int, num_parts: int) -> tuple[int, int]:
    """Numbers of directions of the two products, so that the tables take their share of memory."""
    lead = max(16, (dim + 64) // 128 * 16)
    rows = size + 2 * BLOCK
    room = AUXILIARY_SHARE * 4 * dim * size - rows * BYTES_BESIDE - 4 * num_parts * (dim + 24) - 4 * dim * (OUTLINE + 2)
    room -= lead * (rows + 2 * dim + 4 * num_parts)
    rest = int(room / (rows / 2 + 2 * dim + 4 * num_parts)) // 8 * 8
    return lead, max(8, min(rest, dim - lead, MOST_REST) // 8 * 8)


def find_directions(sample: torch.Tensor, count: int) -> torch.Tensor:
    """About the leading principal directions of rows, float64 `(dim, count)`, orthonormal."""
    norm = sample.norm(dim=-1, keepdim=True)
    typical = norm.median() or norm.mean()
    # Far codes do not decide alone.
    sample = sample * (WIDEST * typical / norm.clamp(min=1e-30)).clamp(max=1)
    covariance = (sample.T @ sample / len(sample)).double()
    directions = draw(len(covariance), count, sample.device)
    # Subspace iteration.
    for _ in range(4):
        directions = torch.linalg.qr(covariance @ directions).Q
    return directions @ torch.linalg.eigh(directions.T @ covariance @ directions).eigenvectors.flip(-1)


def turn(directions: torch.Tensor, lead: int) -> torch.Tensor:
    """The first `lead` directions rotated at random among themselves, and so the others: none needs a finer grid than
    another."""
    parts = directions.split((lead, directions.shape[1] - lead), -1)
    return torch.cat([part @ torch.linalg.qr(draw(part.shape[1], part.shape[1], part.device)).Q for part in parts], -1)


def draw(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """Normal numbers, float64, always the same."""
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randn(rows, columns, dtype=torch.double, generator=generator, device="cpu").to(device)


def find_skew(basis: torch.Tensor) -> float:
    """How far the squared length of a combination of the directions may be from that of its coefficients, as a
    share."""
    basis = basis.double()
    return (torch.linalg.eigvalsh(basis.T @ basis) - 1).abs().max().item()


def round_to_bytes(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as a scale, bfloat16 `(num_rows,)`, times whole numbers from -127 to 127."""
    scale = round_up((values.abs().amax(-1) / 127).clamp(min=1e-30))
    return scale, (values / scale.float()[:, None]).round_()


def round_to_nibbles(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as a scale, bfloat16 `(num_rows,)`, times odd numbers from -15 to 15."""
    scale = round_up((values.square().mean(-1).sqrt() * HALF_STEP).clamp(min=1e-30))
    return scale, (values / (2 * scale.float()[:, None]) - 0.5).round_().clamp_(-8, 7).mul_(2).add_(1)


def round_up(values: torch.Tensor) -> torch.Tensor:
    """To bfloat16, never below."""
    return (values + values.abs() * 2**-8).bfloat16()


def pack(odd: torch.Tensor) -> torch.Tensor:
    """Odd numbers `(num_rows, n)`, n a multiple of 8, two to a byte: of eight the first four in the lower halves."""
    low, high = ((odd + 15) / 2).to(torch.uint8).unflatten(-1, (-1, 2, 4)).unbind(-2)
    return (low | high << 4).flatten(-2)
