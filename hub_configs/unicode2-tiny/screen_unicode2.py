"""Tables that exclude most codes from a nearest-code search by small integer products, and the bounds behind them.

The codes are cut into parts, the cells of the codebook. With x a feature and c a code, both less the centre of the code's part, the
nearest code has the smallest |x|² - 2 (x·c - |c|²/2). The score x·c - |c|²/2 is bounded from above by two sums, of which the second
is for codes that pass the first:

1. The products in the leading principal directions, of codes and features rounded to int8.
2. The same, and the products in further directions, of codes rounded to four bits.

Each code and each feature is on a grid of its own. What the directions leave out is bounded by Cauchy-Schwarz from its norms, the
`tail` of a code and the `weight` of a feature, and what the rounding leaves out from the width of the code's grid, its `scale`, times
the `slack` of the feature. The feature is rounded once for all parts: the products with the centres are constants of the codes.
Rounding in float32 is covered by enlarging tails, weights and slack.
"""

import os

import torch

from .kernel_unicode2 import BLOCK

AUXILIARY_SHARE = 0.1  # of the memory of the codes in float32, for all tables
BYTES_BESIDE = 21  # a code: constants, scales, tails and what NearestCodeSearch keeps
OUTLINE = 16  # leading directions in which the extent of a part is known apart from the others
LEAST_PART = 128  # codes; smaller cells are put together
SAMPLE_SIZE = 8192  # codes to find the directions from
WIDEST = 4  # in medians: codes farther than that have no say in a centre, and little in the directions
MOST_REST = 352  # directions of the second product: more of them cost more than they exclude
HALF_STEP = 0.168  # of the four-bit grid, in standard deviations
TINY = 1e-17  # of a norm: what squares in float32 may not hold, see `moderate` of NearestCodeSearch
UNIT = 2**-23
NORM_MARGIN = 1e-5  # of the squared norm: what float32 may lose, and more than that
FPMATH_MODES = ("DNNL_DEFAULT_FPMATH_MODE", "ONEDNN_DEFAULT_FPMATH_MODE")  # environment variables of oneDNN


class Screen:
    r"""
    Tables of a codebook and the bounds in them.

    Args:
        codes (`torch.FloatTensor` of shape `(codebook_size, codebook_dim)`): the codes, finite.
        mean (`torch.FloatTensor` of shape `(codebook_dim,)`): what to subtract from codes and features.
        half_norm (`torch.FloatTensor` of shape `(codebook_size,)`): half the squared norm of each code less the mean.
        unused (`torch.BoolTensor` of shape `(codebook_size,)`): codes that no search may find.
        offsets (`torch.LongTensor` of shape `(num_cells + 1,)`): where the cells of the codebook begin and end.
        kernel (`ctypes.CDLL`, *optional*): what `load_kernel` gave, to lay the tables out for.
    """

    def __init__(self, codes, mean, half_norm, unused, offsets, kernel=None):
        self.size, self.dim = codes.shape
        self.mean, self.kernel = mean, kernel
        self.ends = torch.tensor(cut_into_parts(offsets.tolist(), self.size), device=codes.device)  # (num_parts + 1,)
        self.lead, self.rest_size = choose_sizes(self.size, self.dim, len(self.ends) - 1)
        sample = codes[:: max(1, self.size // SAMPLE_SIZE)].float() - mean
        directions = find_directions(sample, self.lead + self.rest_size)
        self.basis = turn(directions, self.lead).half()
        skew = find_skew(self.basis)
        outline = self.basis[:, : self.lead].double().T @ directions[:, :OUTLINE]
        self.outline = (outline * (1 - skew)).float()  # lengthens nothing, so that all but the outline has a norm too
        self.margin = 2 * skew + 4 * (self.dim + 64) * UNIT
        self.find_centres(codes, half_norm)
        self.measure(codes, unused)
        if kernel:
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
        self.extents = torch.full_like(self.centre_norms, torch.inf).repeat(4, 1)  # see `find_extents`
        self.largest = torch.zeros_like(self.mean[:4])  # norm of whole numbers and of errors in steps, of both grids
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

    def find(self, query: dict, count: int) -> torch.LongTensor:
        """The parts with the nearest centres, `(num_features, count)`, the nearest first."""
        distance = query["squares"][0]
        return distance.topk(min(count, len(distance)), dim=0, largest=False).indices.T

    def find_extents(self, outlined: torch.Tensor, squared: torch.Tensor) -> torch.Tensor:
        """Of rows less a centre, `outlined` in the outline, and their squared norms: least norm in the outline and less the largest one,
        the same outside of it, `(4, num_rows)`. Minima of these over rows hold for all of them."""
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
        self.prefix.view(torch.uint8).bitwise_xor_(128)  # unsigned
        for name in ("prefix", "rest"):
            table = getattr(self, name)
            table = torch.cat([table, table.new_zeros(padding, table.shape[1])]).view(torch.int32)
            setattr(self, name, table.view(-1, 16, table.shape[1]).transpose(1, 2).contiguous())
        for name in ("constant", "units", "rest_units", "more"):
            table = getattr(self, name)
            setattr(self, name, torch.cat([table, table.new_zeros(padding, *table.shape[1:])]))

    def prepare(self, centred: torch.Tensor) -> dict[str, torch.Tensor]:
        """Features less the mean, float32 `(num_features, dim)`, rounded, and what the bounds need to know of them.

        `usable` is false for a feature that is too far from the codes for float32. `squares`, `(4, num_parts, num_features)`, has the
        squared distances to the centres: in all, in the outline, in the directions of the first product and of the second. `norm` is
        that of the features, `lost` `(num_features, 2)` what rounding them for the products takes.
        """
        norm = centred.norm(dim=-1)
        usable = norm < 1e15
        if not usable.all():
            centred = centred.masked_fill(~usable[:, None], 0)
        query = {"usable": usable, "norm": norm.masked_fill(~usable, 0)}
        values, centres = (x.split((self.lead, self.rest_size), -1) for x in (self.project(centred), self.projected))
        outlined = (multiply(part[0], self.outline) for part in (centres, values))
        pairs = ((self.centres, centred), outlined, *zip(centres, values))
        query["squares"] = torch.stack([square_distances(*pair) for pair in pairs])
        scales, lost = [], []
        for name, value in zip(("prefix", "rest"), values):
            scale = torch.maximum(value.amax(-1), -value.amin(-1)).clamp(min=1e-30) / 127
            rounded = (value / scale[:, None]).round_()
            query[name] = rounded.to(torch.int8)
            error = torch.addcmul(value, rounded, scale[:, None], value=-1, out=rounded)
            lost.append(error.norm(dim=-1) * (1 + NORM_MARGIN))
            scales.append(scale)
        return {**query, "scales": torch.stack(scales, -1), "lost": torch.stack(lost, -1)}

    def bound(self, query: dict) -> torch.Tensor:
        """What depends on feature and part, `(7, num_parts, num_features)`, which the kernel finds by itself: at most the squared
        distances to all of the part's codes and to its centre; weight and slack of both bounds, the slack of the second in two parts."""
        distance, inside = query["squares"][:2]
        size = self.centre_norms[:, None] + query["norm"]
        error = (self.dim + 64) * UNIT * size  # of a projection
        spread = error * size  # of a squared distance
        bounds = [self.find_least(inside, distance, error, spread), distance - spread]
        weight = (distance + spread).clamp_(min=0) * (1 + self.margin)
        grids = zip(query["squares"][2:], query["lost"].T, self.largest[::2], self.largest[1::2])
        for grid, (part, lost, whole, rest) in enumerate(grids):
            most = (part + spread).clamp_(min=0).sqrt_() + error
            weight = weight - ((part - spread).clamp_(min=0).sqrt_() - error).clamp_(min=0).square_()
            slack = lost * whole + error * (2 * (whole + rest))
            bounds += [weight.clamp(min=0).sqrt_() * (1 + 8 * UNIT) + TINY]
            bounds += [slack, most * (1 + 8 * UNIT)] if grid else [slack + most * rest]
        return torch.stack(bounds)

    def find_least(self, inside, distance, error, spread) -> torch.Tensor:
        """At most the squared distances of features to all codes of parts, from those to their centres, in the outline and in all."""
        inside = torch.stack([(inside + side * spread).clamp(min=0).sqrt() + side * error for side in (-1, 1)]).clamp_(
            min=0
        )
        outside = torch.stack([distance - spread - inside[1].square(), distance + spread - inside[0].square()])
        outside = outside.clamp_(min=0).sqrt_()
        gaps = []
        for (low, high), least, most in zip((inside, outside), self.extents[::2, :, None], self.extents[1::2, :, None]):
            gaps.append(torch.maximum(low + most, least - high).clamp_(min=0).square_())
        return (gaps[0] + gaps[1]) * (1 - NORM_MARGIN)

    def thresholds(self, query: dict, distance: torch.Tensor) -> torch.Tensor:
        """What a bound of the score must reach for a code to be within squared `distance`, float32 `(num_parts, num_features)`."""
        low = query["bounds"][1].double()
        score = (low - distance) / 2 - 1e-6 * (low.abs() + distance) - 1e-33
        return score.clamp(min=-3e38).float()

    def first_bounds(self, query: dict, row: torch.Tensor, code: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Of features `(n,)` and their codes `(n, num_codes)`: parts, scores in the leading directions and their bounds."""
        product = torch.bmm(self.prefix[code].float(), query["prefix"][row].float()[..., None])[
            ..., 0
        ]  # whole, below 2**24
        part, row = self.find_parts(code), row[:, None]
        return part, *self.bound_first(product, query["scales"][row, 0], query["bounds"][2:4, part, row], code)

    def all_bounds(self, query: dict, step: int):
        """The same for all features and `step` codes at a time: their places, parts `(num_codes,)`, scores and bounds."""
        prefix, count = query["prefix"], len(query["prefix"])
        prefix = torch.cat([prefix, prefix.new_zeros(max(32 - count, -count % 8), prefix.shape[1])])
        for start in range(0, self.size, step):
            code = torch.arange(start, min(start + step, self.size), device=prefix.device)
            part, table = self.find_parts(code), self.prefix[start : start + step]
            table = torch.cat([table, table.new_zeros(-len(table) % 8, table.shape[1])]) if len(table) % 8 else table
            product = torch._int_mm(prefix, table.T)[:count, : len(code)]
            bounds = query["bounds"][2:4, part].transpose(1, 2)  # (2, num_features, num_codes)
            yield code, part, *self.bound_first(product, query["scales"][:, :1], bounds, code)

    def bound_first(self, product: torch.Tensor, scale: torch.Tensor, bounds: torch.Tensor, code: torch.Tensor):
        tail, unit = self.units[code].float().unbind(-1)
        score = torch.addcmul(self.constant[code], torch.addcmul(bounds[1], product, scale), unit)
        return score, torch.addcmul(score, bounds[0], tail)

    def second_bound(self, query: dict, row: torch.Tensor, code: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
        """At least the score of pairs of features and codes, from that in the leading directions and the rest, `(num_pairs,)`."""
        part = self.find_parts(code)
        product = (unpack(self.rest[code]) * query["rest"][row]).sum(-1)  # whole, below 2**24
        (tail, unit), (error, more) = (x[code].float().unbind(-1) for x in (self.rest_units, self.more))
        weight, slack, most = query["bounds"][4:, part, row]
        return score + (product * query["scales"][row, 1] + slack) * unit + more + weight * tail + most * error


def products_are_exact() -> bool:
    """Whether products of float32 matrices are in float32, as by default, and not in TF32 or bfloat16."""
    if os.environ.get("NVIDIA_TF32_OVERRIDE") == "1" or any(
        os.environ.get(name, "STRICT").upper() != "STRICT" for name in FPMATH_MODES
    ):
        return False
    try:
        return torch.get_float32_matmul_precision() == "highest" and not torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:  # set by other means
        return False


def multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The product of two matrices with the accuracy of float32, whatever is set for faster ones."""
    dtype = torch.float32 if products_are_exact() else torch.float64
    return (a.to(dtype) @ b.to(dtype)).float()


def integer_products_work(device: torch.device) -> bool:
    """Whether a device multiplies int8 matrices, as some GPUs do not."""
    try:
        ones = torch.ones(32, 32, dtype=torch.int8, device=device)
        return torch._int_mm(ones, ones)[0, 0].item() == 32
    except RuntimeError:
        return False


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
    sample = sample * (WIDEST * typical / norm.clamp(min=1e-30)).clamp(max=1)  # far codes do not decide alone
    covariance = (sample.T @ sample / len(sample)).double()
    directions = draw(len(covariance), count, sample.device)
    for _ in range(4):  # subspace iteration
        directions = torch.linalg.qr(covariance @ directions).Q
    return directions @ torch.linalg.eigh(directions.T @ covariance @ directions).eigenvectors.flip(-1)


def turn(directions: torch.Tensor, lead: int) -> torch.Tensor:
    """The first `lead` directions rotated at random among themselves, and so the others: none needs a finer grid than another."""
    parts = directions.split((lead, directions.shape[1] - lead), -1)
    return torch.cat([part @ torch.linalg.qr(draw(part.shape[1], part.shape[1], part.device)).Q for part in parts], -1)


def draw(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """Normal numbers, float64, always the same."""
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randn(rows, columns, dtype=torch.double, generator=generator, device="cpu").to(device)


def find_skew(basis: torch.Tensor) -> float:
    """How far the squared length of a combination of the directions may be from that of its coefficients, as a share."""
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


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """The odd numbers again, int32 `(num_rows, n)`."""
    parts = packed.int().unflatten(-1, (-1, 4))
    return torch.stack([parts & 15, parts >> 4], -2).flatten(-3) * 2 - 15
