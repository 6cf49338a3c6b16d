"""The nearest-code search of `search_unicode2.py` as a C kernel, compiled on first use; without a C compiler there is none.

The kernel travels as text with remote code. It is compiled once per processor type into `$UNICODE2_CACHE` (by default
`~/.cache/unicode2`); `UNICODE2_KERNEL=0` leaves the search to torch. Both find the same codes.
"""

import ctypes
import functools
import hashlib
import os
import platform
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

enum { LANES = 16, TILE = 6, VECTORS = 4, CHUNK = 2048, CODES = VECTORS * LANES, SEEDS = 4 };

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
    const int8_t *prefix;   /* (count, prefix_size) */
    const int8_t *rest;     /* (count, rest_size) */
    const float *features;  /* (count, dim) */
    const double *squared;  /* (count): |feature - mean|^2 */
    const double *margin;   /* (count): bound of all rounding errors, in units of the score */
    const float *weights;   /* (count, 2): of the slack of a code */
    const int64_t *cells;   /* (count, num_probes, 2): first and last code of the cells to look at first */
    int64_t num_probes, num_seed_probes;
    double *distance;       /* out (count) */
    int64_t *found;         /* out (count) */
} Queries;

typedef struct {
    double distance;
    int64_t found;
    int32_t threshold, offset, tail_weight, slack_weight, rest_offset;
    float floor;
} State;

static inline float widen(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, 4);
    return result;
}

/* Products of `rows` queries with CODES codes plus the constants, (rows, CODES). */
static inline __attribute__((always_inline)) void multiply(
        const Tables *t, const int8_t *queries, int rows, int64_t block, int32_t *restrict out) {
    int64_t groups = t->prefix_size / 4;
    const uint8_t *codes = t->prefix + block * LANES * t->prefix_size;
#ifdef WIDE
    __m512i sums[TILE][VECTORS];
    for (int v = 0; v < VECTORS; v++) {
        __m512i start = _mm512_loadu_si512(t->constant + (block + v) * LANES);
        for (int r = 0; r < rows; r++) sums[r][v] = start;
    }
    for (int64_t g = 0; g < groups; g++) {
        __m512i part[VECTORS];
        for (int v = 0; v < VECTORS; v++)
            part[v] = _mm512_loadu_si512(codes + (v * groups + g) * 64);
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
    __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int v = 0; v < VECTORS; v++) {
        __m512i sum = _mm512_loadu_si512(sums + v * LANES);
        __mmask16 mask = _mm512_cmpge_epi32_mask(sum, _mm512_set1_epi32(threshold));
        if (mask) {
            __m512i ids = _mm512_add_epi32(lanes, _mm512_set1_epi32((int32_t)(first + v * LANES)));
            _mm512_storeu_si512(kept + count, _mm512_maskz_compress_epi32(mask, ids));
            _mm512_storeu_si512(values + count, _mm512_maskz_compress_epi32(mask, sum));
            count += __builtin_popcount(mask);
        }
    }
#else
    for (int i = 0; i < CODES; i++)
        if (sums[i] >= threshold) kept[count] = (int32_t)(first + i), values[count++] = sums[i];
#endif
    return count;
}

static inline int32_t dot(const uint8_t *codes, const int8_t *query, int64_t size) {
    int64_t i = 0;
    int32_t result = 0;
#ifdef WIDE
    __m512i sum = _mm512_setzero_si512();
    for (; i + 64 <= size; i += 64)
        sum = _mm512_dpbusd_epi32(sum, _mm512_loadu_si512(codes + i), _mm512_loadu_si512(query + i));
    if (i < size) {
        __mmask64 mask = (((uint64_t)1) << (size - i)) - 1;
        sum = _mm512_dpbusd_epi32(sum, _mm512_maskz_loadu_epi8(mask, codes + i), _mm512_maskz_loadu_epi8(mask, query + i));
    }
    result = _mm512_reduce_add_epi32(sum);
#else
    for (; i < size; i++) result += (int32_t)codes[i] * query[i];
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
    for (int j = 0; i < dim; i++, j++) parts[j] += (a[i] - b[i]) * (a[i] - b[i]);
    float result = 0;
    for (int j = 0; j < 64; j++) result += parts[j];
    return result;
}

static double exact_distance(const float *a, const float *b, int64_t dim) {
    double parts[16] = {0};
    int64_t i = 0;
    for (; i + 16 <= dim; i += 16)
        for (int j = 0; j < 16; j++) {
            double difference = (double)a[i + j] - (double)b[i + j];
            parts[j] += difference * difference;
        }
    for (int j = 0; i < dim; i++, j++) parts[j] += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
    double result = 0;
    for (int j = 0; j < 16; j++) result += parts[j];
    return result;
}

/* From a new best distance to what a code must reach to be as near. */
static void tighten(const Tables *t, const Queries *q, int64_t row, State *state) {
    double score = (q->squared[row] - state->distance) / 2 - q->margin[row];
    double units = score / t->unit + state->offset - 1;
    state->floor = (float)(score - 1e-6 * (score < 0 ? -score : score));
    state->threshold = units < -(1 << 30) ? -(1 << 30) : units > (1 << 30) ? (1 << 30) : (int32_t)units - 1;
}

static void consider(const Tables *t, const Queries *q, int64_t row, State *state, int64_t code) {
    const float *feature = q->features + row * t->dim, *candidate = t->codes + code * t->dim;
    float rough = squared_distance(feature, candidate, t->dim);
    if (rough > state->distance * 1.0001) return;
    double distance = exact_distance(feature, candidate, t->dim);
    if (distance < state->distance || (distance == state->distance && code < state->found)) {
        state->distance = distance;
        state->found = code;
        tighten(t, q, row, state);
    }
}

/* Second product on codes that passed the first one, distances of those that pass both. Returns the number of distances. */
static int64_t refine(const Tables *t, const Queries *q, int64_t row, State *state,
                      const int32_t *kept, const int32_t *values, int64_t count) {
    int64_t groups = t->prefix_size / 4, tail = t->prefix_size - t->tail_columns - t->slack_columns;
    int64_t slack = t->prefix_size - t->slack_columns, distances = 0;
    const int8_t *query = q->rest + row * t->rest_size;
    int32_t passed[CODES];
    int64_t waiting = 0;
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
                const char *place = (const char *)(t->codes + code * t->dim);
                for (int line = 0; line < 8; line++) __builtin_prefetch(place + 64 * line);
            }
        }
        if (waiting == CODES || i + 1 == count) {
            for (int64_t j = 0; j < waiting; j++) consider(t, q, row, state, passed[j]);
            distances += waiting;
            waiting = 0;
        }
    }
    (void)groups;
    return distances;
}

/* The best of a cell's codes by the first product: good candidates to begin with. */
static void seed(const Tables *t, const Queries *q, int64_t row, State *state, int64_t first, int64_t last) {
    int32_t sums[CODES], top[SEEDS];
    int64_t codes[SEEDS];
    for (int s = 0; s < SEEDS; s++) top[s] = INT32_MIN, codes[s] = -1;
    for (int64_t start = first / CODES * CODES; start < last; start += CODES) {
        multiply(t, q->prefix + row * t->prefix_size, 1, start / LANES, sums);
        for (int i = 0; i < CODES; i++) {
            int64_t code = start + i;
            if (sums[i] <= top[SEEDS - 1] || code < first || code >= last || t->half_norm[code] > 3e38f) continue;
            int s = SEEDS - 1;
            for (; s > 0 && top[s - 1] < sums[i]; s--) top[s] = top[s - 1], codes[s] = codes[s - 1];
            top[s] = sums[i], codes[s] = code;
        }
    }
    for (int s = 0; s < SEEDS && codes[s] >= 0; s++) consider(t, q, row, state, codes[s]);
}

/*
 * Nearest codes of queries `begin` to `end`: among all codes, or, if `probe_only`, in the given cells. Returns 0, or 1 as soon as it
 * has cost more than `budget`, with nothing found.
 */
int search(const Tables *t, const Queries *q, int64_t begin, int64_t end, int probe_only, double budget, void *workspace) {
    State *states = workspace;
    int32_t *kept = (int32_t *)(states + (end - begin)), *values = kept + TILE * (CHUNK + CODES);
    int32_t sums[TILE * CODES];
    int64_t blocks = (t->size + CODES - 1) / CODES * VECTORS, tail = t->prefix_size - t->tail_columns - t->slack_columns;
    double cost = 0;
    for (int64_t row = begin; row < end; row++) {
        State *state = states + (row - begin);
        memset(state, 0, sizeof *state);
        const int8_t *prefix = q->prefix + row * t->prefix_size, *rest = q->rest + row * t->rest_size;
        for (int64_t i = 0; i < tail; i++) state->offset += 128 * prefix[i];
        for (int64_t i = 0; i < t->tail_columns; i++) state->tail_weight += prefix[tail + i];
        for (int64_t i = 0; i < t->slack_columns; i++) state->slack_weight += prefix[tail + t->tail_columns + i];
        for (int64_t i = 0; i < t->rest_size; i++) state->rest_offset += 128 * rest[i];
        state->distance = 1.0 / 0.0;
        state->found = INT64_MAX;
        state->threshold = -(1 << 30);
        state->floor = -1.0f / 0.0f;
        const int64_t *cells = q->cells + row * q->num_probes * 2;
        for (int64_t p = 0; p < q->num_probes && (p < q->num_seed_probes || state->found == INT64_MAX); p++)
            seed(t, q, row, state, cells[2 * p], cells[2 * p + 1]);
        if (!probe_only) continue;
        for (int64_t p = 0; p < q->num_probes; p++) {
            int64_t first = cells[2 * p], last = cells[2 * p + 1];
            for (int64_t start = first / CODES * CODES; start < last; start += CODES) {
                multiply(t, prefix, 1, start / LANES, sums);
                int64_t count = collect(sums, state->threshold, start, kept, values);
                refine(t, q, row, state, kept, values, count);
            }
        }
    }
    for (int64_t chunk = 0; !probe_only && chunk < blocks * LANES; chunk += CHUNK) {
        int64_t stop = chunk + CHUNK < blocks * LANES ? chunk + CHUNK : blocks * LANES;
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
            if (cost > budget) return 1;
        }
    }
    for (int64_t row = begin; row < end; row++) {
        q->distance[row] = states[row - begin].distance;
        q->found[row] = states[row - begin].found;
    }
    return 0;
}

int64_t workspace_size(int64_t count) { return count * sizeof(State) + 2 * TILE * (CHUNK + CODES) * sizeof(int32_t); }
"""

BLOCK = 64  # codes that the kernel looks at together: the tables are padded to a multiple of it


class Tables(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("prefix", "constant", "rest", "half_norm", "slack", "codes")),
        *(
            (name, ctypes.c_int64)
            for name in ("size", "dim", "prefix_size", "rest_size", "tail_columns", "slack_columns")
        ),
        ("unit", ctypes.c_float),
        ("rest_unit", ctypes.c_float),
        ("costs", ctypes.c_float * 3),
    ]


class Queries(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("prefix", "rest", "features", "squared", "margin", "weights", "cells")),
        ("num_probes", ctypes.c_int64),
        ("num_seed_probes", ctypes.c_int64),
        ("distance", ctypes.c_void_p),
        ("found", ctypes.c_void_p),
    ]


@functools.cache
def load_kernel():
    """The compiled library, or `None` where there is no C compiler, or it is not wanted."""
    if os.environ.get("UNICODE2_KERNEL") == "0":
        return None
    try:
        library = ctypes.CDLL(str(compile_kernel()))
    except (OSError, subprocess.SubprocessError):
        return None
    library.search.argtypes = (
        ctypes.POINTER(Tables), ctypes.POINTER(Queries), ctypes.c_int64, ctypes.c_int64, ctypes.c_int,
        ctypes.c_double, ctypes.c_void_p,
    )  # fmt: skip
    library.workspace_size.argtypes, library.workspace_size.restype = (ctypes.c_int64,), ctypes.c_int64
    return library


def compile_kernel() -> Path:
    """Compiles the kernel unless it is in the cache already, and returns the library's path."""
    compiler = os.environ.get("CC", "cc")
    try:
        processor = [
            line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Features"))
        ]
    except OSError:
        processor = []
    key = repr((SOURCE, compiler, platform.machine(), platform.system(), processor[:1]))
    folder = Path(os.environ.get("UNICODE2_CACHE", "~/.cache/unicode2")).expanduser()
    target = folder / f"search-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if target.is_file():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        source, built = Path(work) / "search.c", Path(work) / "search.so"
        source.write_text(SOURCE)
        flags = [
            "-O3",
            "-march=native",
            "-ffp-contract=fast",
            "-fassociative-math",
            "-fno-signed-zeros",
            "-fno-trapping-math",
        ]
        subprocess.run(
            [compiler, *flags, "-shared", "-fPIC", "-o", str(built), str(source)],
            check=True,
            capture_output=True,
            timeout=300,
        )
        os.replace(built, target)  # two processes that compile at the same time end with one whole file
    return target
