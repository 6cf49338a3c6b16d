"""The C source of the nearest-code search, which `kernel_unicode2.py` compiles. It travels as text with remote code."""

from .kernel_products_unicode2 import PRODUCTS

SOURCE = (
    PRODUCTS
    + r"""
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
void improve(const float *features, const float *codes, int64_t dim, int64_t count, const int64_t *rows, const int64_t *numbers,
             double *distances, int64_t *found) {
    Tables tables = {.codes = codes, .dim = dim};
    for (int64_t i = 0; i < count; i++) {
        int64_t row = rows[i];
        State state = {.feature = features + row * dim, .distance = distances[row], .found = found[row]};
        if (i + 4 < count) fetch(codes + numbers[i + 4] * dim, 4 * dim);
        consider(&tables, &state, numbers[i]);
        distances[row] = state.distance, found[row] = state.found;
    }
}

static inline float positive(float value) { return value > 0 ? value : 0; }

/* At least and at most the length whose square is known up to `spread`, of numbers known up to `error`. */
static inline float shortest(float square, float spread, float error) { return positive(sqrtf(positive(square - spread)) - error); }
static inline float longest(float square, float spread, float error) { return sqrtf(positive(square + spread)) + error; }

/* At most the squared distances of queries `begin` to `end` to all codes of a part, as in Screen.find_least. */
static void bound_part(const Tables *t, const Queries *q, int64_t part, int64_t begin, int64_t end, float *restrict least) {
    const float *squares = q->squares + part * q->count, *extents = t->extents + part, *norms = q->norms;
    int64_t step = t->num_parts;
    float norm = t->centre_norms[part], unit = t->error;
    float inner = extents[0], outer = -extents[step], low = extents[2 * step], high = -extents[3 * step];
    for (int64_t row = begin; row < end; row++) {
        float size = norm + norms[row], error = unit * size, spread = error * size;
        float distance = squares[row], inside = squares[step * q->count + row];
        float from = shortest(inside, spread, error), to = longest(inside, spread, error);
        float beside = sqrtf(positive(distance - spread - to * to)), beyond = sqrtf(positive(distance + spread - from * from));
        float gap = positive(from - outer > inner - to ? from - outer : inner - to);
        float other = positive(beside - high > low - beyond ? beside - high : low - beyond);
        least[row - begin] = (gap * gap + other * other) * (1 - 1e-5f);
    }
}

/* The bounds of a query in a part, as in Screen.bound. */
static void enter(const Tables *t, const Queries *q, State *state, int64_t row, int64_t part, Visit *visit) {
    const float *square = q->squares + part * q->count + row, *lost = q->lost + 2 * row, *largest = t->largest;
    int64_t step = t->num_parts * q->count;
    float size = t->centre_norms[part] + q->norms[row], error = t->error * size, spread = error * size;
    float known = shortest(square[2 * step], spread, error), more = shortest(square[3 * step], spread, error);
    float weight = positive(square[0] + spread) * t->above - known * known, above = 1 + 0x1p-20f;
    visit->prefix = q->prefix + row * t->prefix_size, visit->rest = q->rest + row * t->rest_size, visit->state = state;
    visit->scale = q->scales[2 * row], visit->rest_scale = q->scales[2 * row + 1], visit->low = square[0] - spread;
    visit->weight = sqrtf(positive(weight)) * above + 1e-17f;
    visit->slack = lost[0] * largest[0] + error * (2 * (largest[0] + largest[1])) + longest(square[2 * step], spread, error) * largest[1];
    visit->rest_weight = sqrtf(positive(weight - more * more)) * above + 1e-17f;
    visit->rest_slack = lost[1] * largest[2] + error * (2 * (largest[2] + largest[3]));
    visit->most = longest(square[3 * step], spread, error) * above;
    tighten(visit);
}

/* Candidates among LANES codes that passed the first product: those that pass the second as well. Returns how many. */
static int64_t refine(const Tables *t, const Visit *visits, const Pair *pairs, int64_t count, int64_t start, Candidate *kept) {
    Ints sums[TILE];
    int64_t found = 0;
    for (int64_t tile = 0; tile < count; tile += TILE) {
        int rows = count - tile < TILE ? (int)(count - tile) : TILE;
        FOR_ROWS(rows, second_product(t, visits, pairs + tile, ROWS, start, sums))
        for (int r = 0; r < rows; r++) {
            const Pair *pair = pairs + tile + r;
            const Visit *visit = visits + pair->visit;
            Floats score = FMA(__builtin_convertvector(sums[r], Floats), all(visit->rest_scale), all(visit->rest_slack));
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
                if (!block->counts[v]) fetch(t->rest + (start + v * LANES) * t->rest_size / 2, LANES * t->rest_size / 2);
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
        w->cost += t->costs[1] * block->counts[v];
    }
    for (int64_t i = 0; i < passed; i++) {
        Visit *visit = visits + w->candidates[i].visit;
        consider(t, visit->state, w->candidates[i].code);
        tighten(visit);
    }
    w->cost += t->costs[0] * count * CODES + t->costs[2] * passed;
}

/* The codes of a cell for all that visit it. Each block is decided after the next one is screened, as its tables are on the way. */
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
    w->alternative += t->costs[3] * count * (t->spans[3 * span + 1] - t->spans[3 * span]);
}

/*
 * Nearest codes of queries `begin` to `end`: among all codes, or, if `near_only`, in the cells that are near. Returns 0, or 1 with
 * nothing found as soon as it is clear that it costs more than a `share` of a scan: that of all codes, or, as in the nearest cells the
 * bounds exclude least, ten times that of the codes there. What a few queries cost says nothing.
 */
static int search_group(
        const Tables *t, const Queries *q, int64_t begin, int64_t end, int near_only, double share, void *space) {
    Workspace w;
    double budget = share * t->costs[3] * t->size * (end - begin), spare = share * t->costs[3] * FEW_PAIRS;
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
"""
)
