"""The nearest-code search of `search_unicode2.py` as a C kernel, compiled on first use; without a C compiler there is none.

The kernel travels as text with remote code. It is compiled once for a processor type into `$UNICODE2_CACHE`, by default
`~/.cache/unicode2`, or, where that cannot be written to, for each process. `UNICODE2_KERNEL=0` leaves the search to torch. Both find
the same codes.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
from pathlib import Path

SOURCE = r"""
#include <stdint.h>
#include <string.h>
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include <immintrin.h>
#define WIDE 1
#endif

enum { LANES = 16, TILE = 6, VECTORS = 4, CHUNK = 2048, CODES = VECTORS * LANES, SEEDS = 4, SEED_CODES = 1024,
       WIDE_CODE = 1 << 28 };  /* sums of codes that the first product cannot bound are larger, thresholds are not */

typedef struct {
    const uint8_t *prefix;    /* (blocks, prefix_size / 4, LANES, 4), unsigned by an offset of 128 */
    const int32_t *constant;  /* (blocks * LANES): -|code|^2 / 2 in units of the first product, rounded up */
    const uint8_t *rest;      /* (size, rest_size), unsigned by an offset of 128 */
    const float *half_norm;   /* (size): |code|^2 / 2; infinite for a code that equals an earlier one */
    const uint16_t *slack;    /* (size, 2): bfloat16, rounded up */
    const float *codes;       /* (size, dim) */
    int64_t size, dim, prefix_size, rest_size, tail_columns, slack_columns;
    float unit, rest_unit;    /* value of one unit of the products */
    float costs[3];           /* of a pair in the first product, the second, the distance */
} Tables;

typedef struct {
    const int8_t *prefix, *rest;  /* (count, prefix_size) and (count, rest_size) */
    const float *features;  /* (count, dim) */
    const double *squared;  /* (count): |feature - mean|^2 */
    const float *weights;   /* (count, 2): of the slack of a code */
    const int64_t *cells;   /* (count, num_probes, 2): first and last code of the cells to look at first */
    int64_t num_probes;
    int64_t *found;         /* out (count) */
} Queries;

typedef struct {
    double distance;
    int64_t found;
    int32_t threshold, offset, tail_weight, slack_weight, rest_offset;
    float floor;
} State;

static inline float widen(uint16_t value) {
    union { uint32_t bits; float number; } both = {(uint32_t)value << 16};
    return both.number;
}

/* Products of `rows` queries with CODES codes plus the constants, (rows, CODES). */
static inline __attribute__((always_inline)) void multiply(
        const Tables *t, const int8_t *queries, int rows, int64_t block, int32_t *restrict out) {
    int64_t groups = t->prefix_size / 4;
    const uint8_t *codes = t->prefix + block * LANES * t->prefix_size;
#ifdef WIDE
    __m512i sums[TILE][VECTORS], part[VECTORS];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < VECTORS; v++) sums[r][v] = _mm512_loadu_si512(t->constant + (block + v) * LANES);
    for (int64_t g = 0; g < groups; g++) {
        for (int v = 0; v < VECTORS; v++) part[v] = _mm512_loadu_si512(codes + (v * groups + g) * 64);
        for (int r = 0; r < rows; r++) {
            int32_t four;
            memcpy(&four, queries + r * t->prefix_size + g * 4, 4);
            __m512i query = _mm512_set1_epi32(four);
            for (int v = 0; v < VECTORS; v++) sums[r][v] = _mm512_dpbusd_epi32(sums[r][v], part[v], query);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < VECTORS; v++) _mm512_storeu_si512(out + r * CODES + v * LANES, sums[r][v]);
#else
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < VECTORS; v++) {
            int32_t sums[LANES];
            memcpy(sums, t->constant + (block + v) * LANES, sizeof sums);
            for (int64_t g = 0; g < groups; g++) {
                const uint8_t *part = codes + (v * groups + g) * 64;
                const int8_t *query = queries + r * t->prefix_size + g * 4;
                for (int lane = 0; lane < LANES; lane++)
                    for (int i = 0; i < 4; i++) sums[lane] += (int32_t)part[lane * 4 + i] * query[i];
            }
            memcpy(out + r * CODES + v * LANES, sums, sizeof sums);
        }
#endif
}

/* Appends what reaches the threshold to `kept` (codes) and `values`; both hold CODES more than needed. Returns how many. */
static inline int64_t collect(const int32_t *sums, int32_t threshold, int64_t first, int32_t *kept, int32_t *values) {
    int64_t count = 0;
#ifdef WIDE
    __m512i sum, lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int v = 0; v < VECTORS; v++) {
        __mmask16 mask = _mm512_cmpge_epi32_mask(sum = _mm512_loadu_si512(sums + v * LANES), _mm512_set1_epi32(threshold));
        if (!mask) continue;
        __m512i ids = _mm512_add_epi32(lanes, _mm512_set1_epi32((int32_t)(first + v * LANES)));
        _mm512_storeu_si512(kept + count, _mm512_maskz_compress_epi32(mask, ids));
        _mm512_storeu_si512(values + count, _mm512_maskz_compress_epi32(mask, sum));
        count += __builtin_popcount(mask);
    }
#else
    for (int i = 0; i < CODES; i++)
        if (sums[i] >= threshold) kept[count] = (int32_t)(first + i), values[count++] = sums[i];
#endif
    return count;
}

static inline int32_t dot(const uint8_t *codes, const int8_t *query, int64_t size) {
    int32_t result = 0;
#ifdef WIDE
    int64_t i = 0;
    __m512i sum = _mm512_setzero_si512();
    for (; i + 64 <= size; i += 64)
        sum = _mm512_dpbusd_epi32(sum, _mm512_loadu_si512(codes + i), _mm512_loadu_si512(query + i));
    if (i < size) {
        __mmask64 mask = (((uint64_t)1) << (size - i)) - 1;
        sum = _mm512_dpbusd_epi32(sum, _mm512_maskz_loadu_epi8(mask, codes + i), _mm512_maskz_loadu_epi8(mask, query + i));
    }
    result = _mm512_reduce_add_epi32(sum);
#else
    for (int64_t i = 0; i < size; i++) result += (int32_t)codes[i] * query[i];
#endif
    return result;
}

static float squared_distance(const float *a, const float *b, int64_t dim) {
    float parts[64] = {0};
    int64_t i = 0;
    for (; i + 64 <= dim; i += 64)
        for (int j = 0; j < 64; j++) {
            float difference = a[i + j] - b[i + j];
            parts[j] += difference * difference;
        }
    for (; i < dim; i++) parts[0] += (a[i] - b[i]) * (a[i] - b[i]);
    for (int j = 1; j < 64; j++) parts[0] += parts[j];
    return parts[0];
}

/* In the order of `exact_distance` in search_unicode2.py, so with the same bits: halves are added until one number is left. */
static double exact_distance(const float *a, const float *b, int64_t dim) {
    double parts[dim];
    int64_t half = 1;
    for (int64_t i = 0; i < dim; i++) {
        double difference = (double)a[i] - (double)b[i];
        parts[i] = difference * difference;
    }
    while (2 * half < dim) half *= 2;
    for (; dim > 1; dim = half, half /= 2)
        for (int64_t i = 0; i < dim - half; i++) parts[i] += parts[half + i];
    return parts[0];
}

/* From a new best distance to what a code must reach to be as near. */
static void tighten(const Tables *t, const Queries *q, int64_t row, State *state) {
    double squared = q->squared[row], score = (squared - state->distance) / 2 - 1e-9 * (squared + state->distance);
    double units = score / t->unit + state->offset - 2;
    state->floor = (float)(score - 1e-6 * (score < 0 ? -score : score) - 1e-37);
    state->threshold = units < -(1 << 30) ? -(1 << 30) : units > WIDE_CODE ? WIDE_CODE : (int32_t)units;
}

static void consider(const Tables *t, const Queries *q, int64_t row, State *state, int64_t code) {
    const float *feature = q->features + row * t->dim, *candidate = t->codes + code * t->dim;
    float rough = squared_distance(feature, candidate, t->dim);
    if (rough > state->distance * 1.0001 + 1e-30) return;
    double distance = exact_distance(feature, candidate, t->dim);
    if (distance < state->distance || (distance == state->distance && code < state->found)) {
        state->distance = distance, state->found = code;
        tighten(t, q, row, state);
    }
}

/* Second product on codes that passed the first one, distances of those that pass both. Returns the number of distances. */
static int64_t refine(const Tables *t, const Queries *q, int64_t row, State *state,
                      const int32_t *kept, const int32_t *values, int64_t count) {
    int64_t slack = t->prefix_size - t->slack_columns, tail = slack - t->tail_columns, distances = 0, waiting = 0;
    const int8_t *query = q->rest + row * t->rest_size;
    int32_t passed[CODES];
    for (int64_t i = 0; i < count; i++) {
        int64_t code = kept[i];
        if (code < t->size) {
            if (i + 4 < count && kept[i + 4] < t->size) __builtin_prefetch(t->rest + kept[i + 4] * t->rest_size);
            const uint8_t *block = t->prefix + (code / LANES) * LANES * t->prefix_size + (code % LANES) * 4;
            int32_t first = values[i] - t->constant[code] - state->offset
                - block[tail / 4 * 64 + tail % 4] * state->tail_weight
                - block[slack / 4 * 64 + slack % 4] * state->slack_weight;
            int32_t second = dot(t->rest + code * t->rest_size, query, t->rest_size) - state->rest_offset;
            float score = t->unit * first + t->rest_unit * second - t->half_norm[code]
                + widen(t->slack[2 * code]) * q->weights[2 * row] + widen(t->slack[2 * code + 1]) * q->weights[2 * row + 1];
            if (score >= state->floor) {
                passed[waiting++] = (int32_t)code;
                for (int line = 0; line < 8; line++) __builtin_prefetch(t->codes + code * t->dim + 16 * line);
            }
        }
        if (waiting == CODES || i + 1 == count)
            for (distances += waiting; waiting > 0;) consider(t, q, row, state, passed[--waiting]);
    }
    return distances;
}

/* The best of a cell's first codes by the first product: good candidates to begin with. */
static void seed(const Tables *t, const Queries *q, int64_t row, State *state, int64_t first, int64_t last) {
    int32_t sums[CODES], top[SEEDS];
    int64_t codes[SEEDS], limit = first + SEED_CODES;
    for (int s = 0; s < SEEDS; s++) top[s] = INT32_MIN, codes[s] = -1;
    last = last < limit ? last : limit;
    for (int64_t start = first / CODES * CODES; start < last; start += CODES) {
        multiply(t, q->prefix + row * t->prefix_size, 1, start / LANES, sums);
        for (int i = 0; i < CODES; i++) {
            int64_t code = start + i;
            if (sums[i] <= top[SEEDS - 1] || sums[i] > WIDE_CODE || code < first || code >= last || t->half_norm[code] > 3e38f) continue;
            int s = SEEDS - 1;
            for (; s > 0 && top[s - 1] < sums[i]; s--) top[s] = top[s - 1], codes[s] = codes[s - 1];
            top[s] = sums[i], codes[s] = code;
        }
    }
    for (int s = 0; s < SEEDS && codes[s] >= 0; s++) consider(t, q, row, state, codes[s]);
}

static void reset(const Tables *t, const Queries *q, int64_t row, State *state) {
    const int8_t *prefix = q->prefix + row * t->prefix_size, *rest = q->rest + row * t->rest_size;
    int64_t slack = t->prefix_size - t->slack_columns, tail = slack - t->tail_columns;
    memset(state, 0, sizeof *state);
    for (int64_t i = 0; i < tail; i++) state->offset += 128 * prefix[i];
    for (int64_t i = tail; i < slack; i++) state->tail_weight += prefix[i];
    for (int64_t i = slack; i < t->prefix_size; i++) state->slack_weight += prefix[i];
    for (int64_t i = 0; i < t->rest_size; i++) state->rest_offset += 128 * rest[i];
    state->distance = 1.0 / 0.0, state->found = t->size;
    state->threshold = -(1 << 30), state->floor = -1.0f / 0.0f;
}

/* All codes of one query's cells. */
static void probe(const Tables *t, const Queries *q, int64_t row, State *state, int32_t *kept, int32_t *values) {
    const int64_t *cells = q->cells + row * q->num_probes * 2;
    int32_t sums[CODES];
    for (int64_t p = 0; p < q->num_probes; p++)
        for (int64_t start = cells[2 * p]; start < cells[2 * p + 1]; start = (start / CODES + 1) * CODES) {
            multiply(t, q->prefix + row * t->prefix_size, 1, start / CODES * VECTORS, sums);
            for (int64_t i = 0; i < CODES; i++) {
                int64_t code = start / CODES * CODES + i;
                if (code < cells[2 * p] || code >= cells[2 * p + 1]) sums[i] = INT32_MIN;
            }
            int64_t count = collect(sums, state->threshold, start / CODES * CODES, kept, values);
            refine(t, q, row, state, kept, values, count);
        }
}

/*
 * Nearest codes of queries `begin` to `end`: among all codes, or, if `probe_only`, in the given cells. Returns 0, or 1 with nothing
 * found as soon as it is clear that it costs more than `budget`.
 */
int search(const Tables *t, const Queries *q, int64_t begin, int64_t end, int probe_only, double budget, void *workspace) {
    State *states = workspace;
    int32_t *kept = (int32_t *)(states + (end - begin)), *values = kept + TILE * (CHUNK + CODES);
    int32_t sums[TILE * CODES];
    int64_t codes = (t->size + CODES - 1) / CODES * CODES;
    double cost = 0;
    for (int64_t row = begin; row < end; row++) {
        const int64_t *cells = q->cells + row * q->num_probes * 2;
        State *state = states + (row - begin);
        reset(t, q, row, state);
        for (int64_t p = 0; p < q->num_probes && p < 2; p++) seed(t, q, row, state, cells[2 * p], cells[2 * p + 1]);
        if (probe_only) probe(t, q, row, state, kept, values);
    }
    for (int64_t chunk = 0; !probe_only && chunk < codes; chunk += CHUNK) {
        int64_t stop = chunk + CHUNK < codes ? chunk + CHUNK : codes;
        for (int64_t tile = begin; tile < end; tile += TILE) {
            int rows = end - tile < TILE ? (int)(end - tile) : TILE;
            int64_t counts[TILE] = {0};
            const int8_t *prefix = q->prefix + tile * t->prefix_size;
            State *state = states + (tile - begin);
            for (int64_t start = chunk; start < stop; start += CODES) {
                if (rows == TILE) multiply(t, prefix, TILE, start / LANES, sums);
                else multiply(t, prefix, rows, start / LANES, sums);
                for (int r = 0; r < rows; r++) {
                    int64_t place = r * (CHUNK + CODES) + counts[r];
                    counts[r] += collect(sums + r * CODES, state[r].threshold, start, kept + place, values + place);
                }
            }
            cost += t->costs[0] * rows * (stop - chunk);
            for (int r = 0; r < rows; r++) {
                int64_t place = r * (CHUNK + CODES);
                int64_t distances = refine(t, q, tile + r, state + r, kept + place, values + place, counts[r]);
                cost += t->costs[1] * counts[r] + t->costs[2] * distances;
            }
            if (cost > budget * (0.1 + 0.9 * stop / codes)) return 1;
        }
    }
    for (int64_t row = begin; row < end; row++) q->found[row] = states[row - begin].found;
    return 0;
}

int64_t workspace_size(int64_t count) { return count * sizeof(State) + 2 * TILE * (CHUNK + CODES) * sizeof(int32_t); }
"""

BLOCK = 64  # codes that the kernel looks at together: the tables are padded to a multiple of it
FLAGS = "-O3 -march=native -ffp-contract=off -shared -fPIC".split()  # no contraction: the same distances as torch has
POINTERS = ("prefix", "constant", "rest", "half_norm", "slack", "codes")
SIZES = ("size", "dim", "prefix_size", "rest_size", "tail_columns", "slack_columns")


class Tables(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int64) for name in SIZES),
        *((name, ctypes.c_float) for name in ("unit", "rest_unit")),
        ("costs", ctypes.c_float * 3),
    ]


class Queries(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("prefix", "rest", "features", "squared", "weights", "cells")),
        ("num_probes", ctypes.c_int64),
        ("found", ctypes.c_void_p),
    ]


@functools.cache
def load_kernel():
    """The compiled library, or `None` where it cannot be compiled or is not wanted."""
    if os.environ.get("UNICODE2_KERNEL") == "0":
        return None
    library = load_cached()
    try:
        library = library or load_private()
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    structures, numbers = (
        (ctypes.POINTER(Tables), ctypes.POINTER(Queries)),
        (ctypes.c_int64, ctypes.c_int64, ctypes.c_int),
    )
    library.search.argtypes = (*structures, *numbers, ctypes.c_double, ctypes.c_void_p)
    library.workspace_size.argtypes, library.workspace_size.restype = (ctypes.c_int64,), ctypes.c_int64
    return library


def load_cached() -> ctypes.CDLL | None:
    """The library from the cache, compiled if it is not there or damaged; `None` without a folder that only this user writes to."""
    try:
        folder = Path(os.environ.get("UNICODE2_CACHE") or Path.home() / ".cache" / "unicode2")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        key = fingerprint()
        if not is_private(folder):
            return None
        for file in folder.glob(f"{key}-*.so"):
            if (
                is_private(file) and file.stem == f"{key}-{digest(file.read_bytes())}"
            ):  # a damaged one would end the process
                return ctypes.CDLL(str(file))
        with tempfile.TemporaryDirectory(dir=folder) as work:
            built = compile_kernel(Path(work))
            built.chmod(0o700)
            target = folder / f"{key}-{digest(built.read_bytes())}.so"
            os.replace(built, target)  # whole, whoever else compiles at the same time
        return ctypes.CDLL(str(target))
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError):
        return None


def load_private() -> ctypes.CDLL:
    """The library, compiled in a folder of its own that is gone afterwards."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
        return ctypes.CDLL(str(compile_kernel(Path(work))))


def is_private(path: Path) -> bool:
    """Whether nobody but this user, or root, can write to a file or folder."""
    status = path.stat()
    return os.name != "posix" or (status.st_uid in (0, os.getuid()) and not status.st_mode & 0o022)


def fingerprint() -> str:
    """Of the source, the compiler and the processor."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    processor = [line for line in lines if line.startswith(("flags", "Features"))][:1]
    return digest(repr((SOURCE, FLAGS, os.environ.get("CC"), platform.platform(), processor)).encode())


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def compile_kernel(work: Path) -> Path:
    """Compiles the kernel in a folder and returns the library's path."""
    built = work / "search.so"
    command = [*shlex.split(os.environ.get("CC") or "cc"), *FLAGS, "-o", str(built), "-x", "c", "-"]
    subprocess.run(command, input=SOURCE.encode(), check=True, capture_output=True, timeout=300)
    return built
