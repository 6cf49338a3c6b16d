"""The first half of the C source of the nearest-code search: its tables, products and distances."""

PRODUCTS = r"""
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include <immintrin.h>
#define WIDE 1
#endif

enum { LANES = 16, VECTORS = 4, CODES = VECTORS * LANES, TILE = 6, SEEDS = 4, SEED_CODES = 512, FEW_PAIRS = 1 << 17 };

typedef int32_t Ints __attribute__((vector_size(64)));
typedef float Floats __attribute__((vector_size(64)));

typedef struct {
    const uint8_t *prefix;    /* (blocks, prefix_size / 4, LANES, 4), unsigned by an offset of 128 */
    const uint8_t *rest;      /* (blocks, rest_size / 8, LANES, 4): two numbers of four bits, the second four of eight above */
    const float *constant;    /* (blocks * LANES), and so the next three */
    const uint32_t *units;    /* of the prefix: tail and scale, bfloat16 */
    const uint32_t *rest_units;
    const uint32_t *more;     /* of the rest, bfloat16: its error, and what it adds to the constant */
    const float *codes;       /* (size, dim) */
    const int64_t *spans;     /* (num_spans, 3): first code, last code and part of the cells to look into */
    const float *centre_norms, *extents;  /* (num_parts) and (4, num_parts), see Screen.find_extents */
    int64_t size, dim, prefix_size, rest_size, num_parts, num_spans;
    float costs[4];           /* in cycles: of a code in the first product, of LANES codes in the second, of a distance, of a code in a scan */
    float largest[4], above, error;  /* see Screen.bound: above one by the margin, and the rounding error of a number */
} Tables;

typedef struct {
    const int8_t *prefix, *rest;  /* (count, prefix_size) and (count, rest_size) */
    const float *features;    /* (count, dim) */
    const float *scales, *lost;    /* (count, 2): of prefix and rest */
    const float *norms, *squares;  /* (count) and (4, num_parts, count), see Screen.prepare */
    const int64_t *near;      /* (count, num_near): spans to look into first */
    int64_t count, num_near;
    int64_t *found;           /* out (count) */
} Queries;

typedef struct {  /* of a query */
    const float *feature;
    double distance;
    int64_t found;
    int32_t offset, rest_offset;
} State;

typedef struct {  /* of a query to a cell */
    const int8_t *prefix, *rest;
    State *state;
    float scale, rest_scale, low, weight, slack, rest_weight, rest_slack, most, threshold;
} Visit;

typedef struct {  /* a visit and LANES codes, some of which passed the first product */
    Floats score;
    int32_t visit;
    uint32_t mask;
} Pair;

typedef struct { int32_t visit, code; } Candidate;

typedef struct {  /* CODES codes, and for each LANES of them the pairs that passed the first product */
    Pair *pairs;
    int64_t start, counts[VECTORS];
} Block;

typedef struct {
    State *states;
    Visit *visits;
    Block blocks[2];
    Candidate *candidates;
    int32_t *heads, *next;
    float *least;  /* squared distance of each query to all codes of a part */
    double cost, alternative;  /* in cycles: of what was done, and what a scan of the codes that were looked at first would cost */
} Workspace;

#ifdef WIDE
#define FMA(a, b, c) ((Floats)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#else
#define FMA(a, b, c) ((a) * (b) + (c))
#endif

static inline float widen(uint32_t half) { half <<= 16; float value; memcpy(&value, &half, 4); return value; }
static inline Ints load(const void *from) { Ints value; memcpy(&value, from, sizeof value); return value; }
static inline Floats tails(const uint32_t *units) { return (Floats)(load(units) << 16); }
static inline Floats scales(const uint32_t *units) { return (Floats)(load(units) & -65536); }
static inline Floats all(float value) { return value - (Floats){0}; }

static inline void fetch(const void *from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char *)from + i, 0, 2);  /* to L2: L1 is too small */
}

/* Adds the products of four bytes of each lane, unsigned, with four of a query. */
static inline Ints multiply(Ints sums, Ints codes, const int8_t *query) {
#ifdef WIDE
    int32_t four;
    memcpy(&four, query, 4);
    return (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)codes, _mm512_set1_epi32(four));
#else
    for (int i = 0; i < 4; i++) sums += (codes >> 8 * i & 255) * query[i];
    return sums;
#endif
}

/* Lanes that are not below a threshold. */
static inline uint32_t reach(Floats value, float threshold) {
#ifdef WIDE
    return _mm512_cmp_ps_mask((__m512)value, _mm512_set1_ps(threshold), _CMP_NLT_UQ);
#else
    uint32_t mask = 0;
    for (int i = 0; i < LANES; i++) mask |= (uint32_t)!(value[i] < threshold) << i;
    return mask;
#endif
}

/* First products of `rows` visits with CODES codes. */
static inline __attribute__((always_inline)) void first_product(
        const Tables *t, const Visit *visits, int rows, int64_t start, Ints sums[TILE][VECTORS]) {
    int64_t groups = t->prefix_size / 4;
    const uint8_t *codes = t->prefix + start * t->prefix_size;
    Ints part[VECTORS], held[TILE][VECTORS];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < VECTORS; v++) held[r][v] = (Ints){0} - visits[r].state->offset;
    for (int64_t g = 0; g < groups; g++) {
        for (int v = 0; v < VECTORS; v++) part[v] = load(codes + (v * groups + g) * 64);
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < VECTORS; v++) held[r][v] = multiply(held[r][v], part[v], visits[r].prefix + 4 * g);
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < VECTORS; v++) sums[r][v] = held[r][v];
}

/* Second products of the visits of `rows` pairs with LANES codes. */
static inline __attribute__((always_inline)) void second_product(
        const Tables *t, const Visit *visits, const Pair *pairs, int rows, int64_t start, Ints sums[TILE]) {
    const uint8_t *codes = t->rest + start * t->rest_size / 2;
    Ints held[TILE][2];
    for (int r = 0; r < rows; r++) held[r][0] = (Ints){0} - visits[pairs[r].visit].state->rest_offset, held[r][1] = (Ints){0};
    for (int64_t g = 0; g < t->rest_size / 8; g++) {
        Ints both = load(codes + g * 64), lower = both << 1 & 0x1e1e1e1e, upper = both >> 3 & 0x1e1e1e1e;
        for (int r = 0; r < rows; r++) {
            const int8_t *query = visits[pairs[r].visit].rest + 8 * g;
            held[r][0] = multiply(held[r][0], lower, query), held[r][1] = multiply(held[r][1], upper, query + 4);
        }
    }
    for (int r = 0; r < rows; r++) sums[r] = held[r][0] + held[r][1];
}

#define FOR_ROWS(rows, call) /* loops of a fixed length stay in registers */ \
    switch (rows) { \
        case 1: { enum { ROWS = 1 }; call; break; } case 2: { enum { ROWS = 2 }; call; break; } \
        case 3: { enum { ROWS = 3 }; call; break; } case 4: { enum { ROWS = 4 }; call; break; } \
        case 5: { enum { ROWS = 5 }; call; break; } default: { enum { ROWS = TILE }; call; break; } \
    }

static inline float sum(Floats values) {
#ifdef WIDE
    return _mm512_reduce_add_ps((__m512)values);
#else
    float parts[LANES];
    memcpy(parts, &values, sizeof parts);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) parts[i] += parts[i + half];
    return parts[0];
#endif
}

/* Squared distance, or a number above `limit` if it is above it. */
static float squared_distance(const float *a, const float *b, int64_t dim, float limit) {
    float total = 0;
    int64_t i = 0;
    while (i + 64 <= dim && total <= limit) {
        Floats parts[4] = {{0}};
        for (int64_t last = i + 256; i < last && i + 64 <= dim; i += 64)
            for (int j = 0; j < 4; j++) {
                Floats difference = (Floats)load(a + i + 16 * j) - (Floats)load(b + i + 16 * j);
                parts[j] = FMA(difference, difference, parts[j]);
            }
        total += sum((parts[0] + parts[1]) + (parts[2] + parts[3]));
    }
    for (; i < dim && total <= limit; i++) total += (a[i] - b[i]) * (a[i] - b[i]);
    return total;
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
"""
