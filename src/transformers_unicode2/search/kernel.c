/* The nearest-code search of nearest.py: integer products with bounds, and distances in float64. kernel.py compiles
   it. */

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
    /* (blocks, rest_size / 8, LANES, 4): two numbers of four bits, the second four of eight above. */
    const uint8_t *rest;
    const float *constant;    /* (blocks * LANES), and so the next three */
    const uint32_t *units;    /* of the prefix: tail and scale, bfloat16 */
    const uint32_t *rest_units;
    const uint32_t *more;     /* of the rest, bfloat16: its error, and what it adds to the constant */
    const float *codes;       /* (size, dim) */
    const int64_t *spans;     /* (num_spans, 3): first code, last code and part of the cells to look into */
    const float *centre_norms, *extents;  /* (num_parts) and (4, num_parts), see BoundTables.find_extents */
    int64_t size, dim, prefix_size, rest_size, num_parts, num_spans;
    /* In cycles: of a code in the first product, of LANES codes in the second, of a distance, of a code in a scan. */
    float first_cost, second_cost, distance_cost, scan_cost;
    /* Of both grids the largest norm of whole numbers, and of errors in steps. */
    float prefix_norm, prefix_error, rest_norm, rest_error;
    float above, error;       /* above one by the margin; the rounding error of a number, as a share */
} Tables;

typedef struct {
    const int8_t *prefix, *rest;  /* (count, prefix_size) and (count, rest_size) */
    const float *features;    /* (count, dim) */
    const float *scales, *lost;    /* (count, 2): of prefix and rest */
    const float *norms, *squares;  /* (count) and (4, num_parts, count), see BoundTables.prepare */
    const int64_t *near;      /* (count, num_near): spans to look into first */
    int64_t *found;           /* out (count) */
    int64_t count, num_near;
} Queries;

typedef struct {
    const float *features, *codes;  /* (num_features, dim) and (num_codes, dim) */
    const int64_t *rows, *numbers;  /* (count): of the feature and of the code of a pair */
    double *distances;        /* in and out (num_features): squared, of the nearest code so far */
    int64_t *found;           /* in and out (num_features) */
    int64_t dim, count;
} Pairs;

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
    /* In cycles: of what was done, and of a scan of the codes that were looked at first. */
    double cost, alternative;
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
    /* To L2: L1 is too small. */
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char *)from + i, 0, 2);
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
    for (int r = 0; r < rows; r++) {
        held[r][0] = (Ints){0} - visits[pairs[r].visit].state->rest_offset;
        held[r][1] = (Ints){0};
    }
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

/* In the order of `exact_distance` in search_unicode2.py, so with the same bits: halves are added until one number is
   left. */
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

/* From the best distance to what a code must reach to be as near. */
static inline void tighten(Visit *visit) {
    double distance = visit->state->distance, low = visit->low;
    double score = (low - distance) / 2 - 1e-6 * (fabs(low) + distance) - 1e-33;
    visit->threshold = score > -3e38 ? (float)score : -3e38f;
}

static void consider(const Tables *t, State *state, int64_t code) {
    const float *candidate = t->codes + code * t->dim;
    float limit = state->distance * 1.0001 + 1e-30;
    if (squared_distance(state->feature, candidate, t->dim, limit) > limit) return;
    double distance = exact_distance(state->feature, candidate, t->dim);
    if (distance < state->distance || (distance == state->distance && code < state->found))
        state->distance = distance, state->found = code;
}

/* Considers pairs of features and codes, as Best.improve does. */
void improve(const Pairs *p) {
    Tables tables = {.codes = p->codes, .dim = p->dim};
    for (int64_t i = 0; i < p->count; i++) {
        int64_t row = p->rows[i];
        State state = {.feature = p->features + row * p->dim, .distance = p->distances[row], .found = p->found[row]};
        if (i + 4 < p->count) fetch(p->codes + p->numbers[i + 4] * p->dim, 4 * p->dim);
        consider(&tables, &state, p->numbers[i]);
        p->distances[row] = state.distance, p->found[row] = state.found;
    }
}

static inline float positive(float value) { return value > 0 ? value : 0; }

/* At least and at most the length whose square is known up to `spread`, of numbers known up to `error`. */
static inline float shortest(float square, float spread, float error) {
    return positive(sqrtf(positive(square - spread)) - error);
}
static inline float longest(float square, float spread, float error) {
    return sqrtf(positive(square + spread)) + error;
}

/* At most the squared distances of queries `begin` to `end` to all codes of a part. Both the query and the codes have a
   known distance from the centre in the outline, and another outside of it. Their differences are the sides of a right
   angle. */
static void bound_part(
        const Tables *t, const Queries *q, int64_t part, int64_t begin, int64_t end, float *restrict least) {
    const float *squares = q->squares + part * q->count, *extents = t->extents + part, *norms = q->norms;
    int64_t step = t->num_parts;
    float norm = t->centre_norms[part], unit = t->error;
    float inner = extents[0], outer = -extents[step], low = extents[2 * step], high = -extents[3 * step];
    for (int64_t row = begin; row < end; row++) {
        float size = norm + norms[row], error = unit * size, spread = error * size;
        float distance = squares[row], inside = squares[step * q->count + row];
        float from = shortest(inside, spread, error), to = longest(inside, spread, error);
        float beside = sqrtf(positive(distance - spread - to * to));
        float beyond = sqrtf(positive(distance + spread - from * from));
        float gap = positive(from - outer > inner - to ? from - outer : inner - to);
        float other = positive(beside - high > low - beyond ? beside - high : low - beyond);
        least[row - begin] = (gap * gap + other * other) * (1 - 1e-5f);
    }
}

/* What bounds the scores of a query in a part: by Cauchy-Schwarz the weight of what the directions leave out, and the
   slack that rounding the codes and the query takes. */
static void enter(const Tables *t, const Queries *q, State *state, int64_t row, int64_t part, Visit *visit) {
    const float *square = q->squares + part * q->count + row, *lost = q->lost + 2 * row;
    int64_t step = t->num_parts * q->count;
    float size = t->centre_norms[part] + q->norms[row], error = t->error * size, spread = error * size;
    float known = shortest(square[2 * step], spread, error), more = shortest(square[3 * step], spread, error);
    float weight = positive(square[0] + spread) * t->above - known * known, above = 1 + 0x1p-20f;
    visit->prefix = q->prefix + row * t->prefix_size, visit->rest = q->rest + row * t->rest_size, visit->state = state;
    visit->scale = q->scales[2 * row], visit->rest_scale = q->scales[2 * row + 1], visit->low = square[0] - spread;
    visit->weight = sqrtf(positive(weight)) * above + 1e-17f;
    visit->slack = lost[0] * t->prefix_norm + error * (2 * (t->prefix_norm + t->prefix_error))
                   + longest(square[2 * step], spread, error) * t->prefix_error;
    visit->rest_weight = sqrtf(positive(weight - more * more)) * above + 1e-17f;
    visit->rest_slack = lost[1] * t->rest_norm + error * (2 * (t->rest_norm + t->rest_error));
    visit->most = longest(square[3 * step], spread, error) * above;
    tighten(visit);
}

/* Candidates among LANES codes that passed the first product: those that pass the second as well. Returns how many. */
static int64_t refine(
        const Tables *t, const Visit *visits, const Pair *pairs, int64_t count, int64_t start, Candidate *kept) {
    Ints sums[TILE];
    int64_t found = 0;
    for (int64_t tile = 0; tile < count; tile += TILE) {
        int rows = count - tile < TILE ? (int)(count - tile) : TILE;
        FOR_ROWS(rows, second_product(t, visits, pairs + tile, ROWS, start, sums))
        for (int r = 0; r < rows; r++) {
            const Pair *pair = pairs + tile + r;
            const Visit *visit = visits + pair->visit;
            Floats product = __builtin_convertvector(sums[r], Floats);
            Floats score = FMA(product, all(visit->rest_scale), all(visit->rest_slack));
            score = FMA(score, scales(t->rest_units + start), pair->score + scales(t->more + start));
            score = FMA(tails(t->rest_units + start), all(visit->rest_weight), score);
            score = FMA(tails(t->more + start), all(visit->most), score);
            for (uint32_t mask = reach(score, visit->threshold) & pair->mask; mask; mask &= mask - 1) {
                int32_t code = (int32_t)start + __builtin_ctz(mask);
                fetch(t->codes + code * t->dim, 4 * t->dim);
                kept[found++] = (Candidate){pair->visit, code};
            }
        }
    }
    return found;
}

/* Lanes of CODES codes that are in a cell. */
static inline uint64_t inside(const int64_t *span, int64_t start) {
    int64_t below = span[0] - start, above = span[1] - start;
    return (above < CODES ? (1ull << above) - 1 : ~0ull) & (below > 0 ? ~0ull << below : ~0ull);
}

/* First product of the visits with CODES codes: keeps the pairs that pass. */
static void screen(const Tables *t, const int64_t *span, Visit *visits, int64_t count, Block *block) {
    Ints sums[TILE][VECTORS];
    Floats score[VECTORS], unit[VECTORS], tail[VECTORS], constant[VECTORS];
    int64_t start = block->start;
    uint64_t valid = inside(span, start);
    for (int v = 0; v < VECTORS; v++) {
        const uint32_t *units = t->units + start + v * LANES;
        unit[v] = scales(units), tail[v] = tails(units), constant[v] = (Floats)load(t->constant + start + v * LANES);
        block->counts[v] = 0;
    }
    for (int64_t tile = 0; tile < count; tile += TILE) {
        int rows = count - tile < TILE ? (int)(count - tile) : TILE;
        FOR_ROWS(rows, first_product(t, visits + tile, ROWS, start, sums))
        for (int r = 0; r < rows; r++) {
            const Visit *visit = visits + tile + r;
            uint64_t mask = 0;
            for (int v = 0; v < VECTORS; v++) {
                score[v] = FMA(__builtin_convertvector(sums[r][v], Floats), all(visit->scale), all(visit->slack));
                score[v] = FMA(score[v], unit[v], constant[v]);
                mask |= (uint64_t)reach(FMA(tail[v], all(visit->weight), score[v]), visit->threshold) << v * LANES;
            }
            if (!(mask &= valid)) continue;
            for (int v = 0; v < VECTORS; v++, mask >>= LANES) {
                if (!(mask & 65535)) continue;
                if (!block->counts[v])
                    fetch(t->rest + (start + v * LANES) * t->rest_size / 2, LANES * t->rest_size / 2);
                block->pairs[v * count + block->counts[v]++] = (Pair){score[v], (int32_t)(tile + r), mask & 65535};
            }
        }
    }
}

/* Second product of the pairs that passed the first, and the distances of those that pass this as well. */
static void decide(const Tables *t, Visit *visits, int64_t count, const Block *block, Workspace *w) {
    int64_t passed = 0;
    for (int v = 0; v < VECTORS; v++) {
        const Pair *pairs = block->pairs + v * count;
        passed += refine(t, visits, pairs, block->counts[v], block->start + v * LANES, w->candidates + passed);
        w->cost += t->second_cost * block->counts[v];
    }
    for (int64_t i = 0; i < passed; i++) {
        Visit *visit = visits + w->candidates[i].visit;
        consider(t, visit->state, w->candidates[i].code);
        tighten(visit);
    }
    w->cost += t->first_cost * count * CODES + t->distance_cost * passed;
}

/* The codes of a cell for all that visit it. Each block is decided after the next one is screened, as its tables are on
   the way. */
static void scan(const Tables *t, const int64_t *span, Visit *visits, int64_t count, Workspace *w) {
    int64_t first = span[0] / LANES * LANES, start = first;
    if (!count) return;
    for (int turn = 0; start < span[1]; start += CODES, turn ^= 1) {
        w->blocks[turn].start = start;
        screen(t, span, visits, count, w->blocks + turn);
        if (start > first) decide(t, visits, count, w->blocks + !turn, w);
    }
    if (start > first) decide(t, visits, count, w->blocks + ((start - first) / CODES - 1) % 2, w);
}

/* The best of a cell's first codes by the first product: good candidates to begin with. */
static void seed(const Tables *t, Visit *visit, const int64_t *span) {
    float top[SEEDS];
    int64_t codes[SEEDS], last = span[1] < span[0] + SEED_CODES ? span[1] : span[0] + SEED_CODES;
    Ints sums[TILE][VECTORS];
    for (int s = 0; s < SEEDS; s++) top[s] = -3e38f, codes[s] = -1;
    for (int64_t start = span[0] / LANES * LANES; start < last; start += CODES) {
        first_product(t, visit, 1, start, sums);
        for (int v = 0; v < VECTORS; v++) {
            int64_t place = start + v * LANES;
            Floats score = __builtin_convertvector(sums[0][v], Floats) * visit->scale;
            score = FMA(score, scales(t->units + place), (Floats)load(t->constant + place));
            for (uint32_t mask = reach(score, top[SEEDS - 1]); mask; mask &= mask - 1) {
                int lane = __builtin_ctz(mask), s = SEEDS - 1;
                if (!(score[lane] > top[s]) || place + lane < span[0] || place + lane >= last) continue;
                for (; s > 0 && top[s - 1] < score[lane]; s--) top[s] = top[s - 1], codes[s] = codes[s - 1];
                top[s] = score[lane], codes[s] = place + lane;
            }
        }
    }
    for (int s = 0; s < SEEDS && codes[s] >= 0; s++) consider(t, visit->state, codes[s]);
}

/* Whether a query has a cell among those that it looks into first. */
static inline int is_near(const Queries *q, int64_t row, int64_t span) {
    for (int64_t p = 0; p < q->num_near; p++)
        if (q->near[row * q->num_near + p] == span) return 1;
    return 0;
}

static int64_t lay_out(Workspace *w, char *space, int64_t count, int64_t num_near, int64_t num_spans) {
    char *place = space;
    for (int i = 0; i < 2; i++) w->blocks[i].pairs = (Pair *)place, place += VECTORS * count * sizeof(Pair);
    w->states = (State *)place, place += count * sizeof(State);
    w->visits = (Visit *)place, place += count * sizeof(Visit);
    w->candidates = (Candidate *)place, place += CODES * count * sizeof(Candidate);
    w->heads = (int32_t *)place, place += num_spans * sizeof(int32_t);
    w->next = (int32_t *)place, place += num_near * count * sizeof(int32_t);
    w->least = (float *)place, place += count * sizeof(float);
    w->cost = w->alternative = 0;
    return place - space;
}

int64_t workspace_size(int64_t count, int64_t num_near, int64_t num_spans) {
    Workspace w;
    return (lay_out(&w, 0, count, num_near, num_spans) + 63) / 64 * 64;  /* the next one is aligned, too */
}

/* What there is to know of queries `begin` to `end`, and who looks into which cell first. */
static void prepare(const Tables *t, const Queries *q, int64_t begin, int64_t end, const Workspace *w) {
    for (int64_t s = 0; s < t->num_spans; s++) w->heads[s] = -1;
    for (int64_t row = begin; row < end; row++) {
        const int8_t *prefix = q->prefix + row * t->prefix_size, *rest = q->rest + row * t->rest_size;
        State *state = w->states + (row - begin);
        state->feature = q->features + row * t->dim, state->distance = 1.0 / 0.0, state->found = t->size;
        state->offset = state->rest_offset = 0;
        for (int64_t i = 0; i < t->prefix_size; i++) state->offset += 128 * prefix[i];
        for (int64_t i = 0; i < t->rest_size; i++) state->rest_offset += 15 * rest[i];
        for (int64_t p = 0; p < q->num_near; p++) {
            int64_t span = q->near[row * q->num_near + p], pair = (row - begin) * q->num_near + p;
            w->next[pair] = w->heads[span], w->heads[span] = (int32_t)pair;
        }
    }
}

/* A cell for those that look into it first, or `later` than into the nearest one. */
static void scan_near(const Tables *t, const Queries *q, int64_t begin, int64_t span, int later, Workspace *w) {
    int64_t count = 0;
    for (int32_t pair = w->heads[span]; pair >= 0; pair = w->next[pair]) {
        int64_t row = pair / q->num_near;
        if ((pair % q->num_near > 0) != later) continue;
        Visit *visit = w->visits + count++;
        enter(t, q, w->states + row, begin + row, t->spans[3 * span + 2], visit);
        if (later) continue;
        seed(t, visit, t->spans + 3 * span);
        tighten(visit);
    }
    scan(t, t->spans + 3 * span, w->visits, count, w);
    w->alternative += t->scan_cost * count * (t->spans[3 * span + 1] - t->spans[3 * span]);
}

/*
 * Nearest codes of queries `begin` to `end`: among all codes, or, if `near_only`, in near cells. Returns 0,
 * or 1 with nothing found as soon as it is clear that it costs more than a `share` of a scan: that of all codes, or ten
 * times that of the codes in the nearest cells, where the bounds exclude least. What a few queries cost says nothing.
 */
static int search_group(
        const Tables *t, const Queries *q, int64_t begin, int64_t end, int near_only, double share, void *space) {
    Workspace w;
    double budget = share * t->scan_cost * t->size * (end - begin), spare = share * t->scan_cost * FEW_PAIRS;
    lay_out(&w, space, end - begin, q->num_near, t->num_spans);
    prepare(t, q, begin, end, &w);
    for (int later = 0; later < 2; later++)
        for (int64_t s = 0; s < t->num_spans; s++) {
            scan_near(t, q, begin, s, later, &w);
            if (!near_only && (w.cost > budget * 0.3 || w.cost > 10 * share * w.alternative + spare)) return 1;
        }
    for (int64_t s = 0; s < t->num_spans && !near_only; s++) {
        const int64_t *span = t->spans + 3 * s;
        int64_t count = 0;
        bound_part(t, q, span[2], begin, end, w.least);
        for (int64_t row = begin; row < end; row++) {
            State *state = w.states + (row - begin);
            if (w.least[row - begin] > state->distance || is_near(q, row, s)) continue;
            enter(t, q, state, row, span[2], w.visits + count++);
        }
        scan(t, span, w.visits, count, &w);
        if (w.cost > budget * (0.3 + 0.7 * span[1] / t->size)) return 1;
    }
    for (int64_t row = begin; row < end; row++) q->found[row] = w.states[row - begin].found;
    return 0;
}

/* The same for all queries, `group` at a time; `space` has `workspace_size` bytes for each group. */
void search(const Tables *t, const Queries *q, int64_t group, int near_only, double share, char *space) {
    int64_t num_groups = (q->count + group - 1) / group, size = workspace_size(group, q->num_near, t->num_spans);
    #pragma omp parallel for schedule(dynamic)
    for (int64_t g = 0; g < num_groups; g++) {
        int64_t begin = g * group, end = begin + group < q->count ? begin + group : q->count;
        search_group(t, q, begin, end, near_only, share, space + g * size);
    }
}
