/* Attention of one pass by vectors of one width, for paged_attention.c, which includes this once for each after it has defined

     NAME(x)                      x with an ending of its own
     VECTOR, LANES                floats side by side, and how many they are
     TOGETHER                     how many heads share their loads of keys and values: as many as the registers hold
     ALL, LOAD, STORE, FMA, MAX, AND, OR, MAX_OF, SUM_OF
     NEAREST, POWER               the nearest whole numbers; 2 to the power of whole numbers
     UNLESS_LESS(x, least, y)     y, and 0 where x is less than least
     OF_BFLOAT16, OF_FLOAT16      as many floats, of 16-bit ones
     QUARTERS(vectors)            of four vectors, sums of four numbers each, four beside one another
     SUMS(quarters)               of LANES / 4 of these, the sums of LANES vectors

   all of which are forgotten at its end. */

/* e^x to the last bits of a float, by Cephes' polynomial: 0 below -87; what is not a number stays none. */
static inline VECTOR NAME(exp_of)(VECTOR x)
{
    const VECTOR n = NEAREST(x * ALL(1.44269504f));
    const VECTOR r = FMA(n, ALL(2.12194440e-4f), FMA(n, ALL(-0.693359375f), x));
    VECTOR y = FMA(ALL(1.9875691500e-4f), r, ALL(1.3981999507e-3f));
    y = FMA(y, r, ALL(8.3334519073e-3f));
    y = FMA(y, r, ALL(4.1665795894e-2f));
    y = FMA(y, r, ALL(1.6666665459e-1f));
    y = FMA(y, r, ALL(5.0000001201e-1f));
    y = FMA(y, r * r, r + ALL(1.0f));
    return UNLESS_LESS(x, ALL(-87.0f), y * POWER(n));
}

/* cap * tanh(x / cap) */
static inline VECTOR NAME(capped)(VECTOR x, float cap)
{
    const VECTOR e = NAME(exp_of)(OR(x, ALL(-0.0f)) * ALL(2.0f / cap));
    return OR(AND(x, ALL(-0.0f)), (ALL(1.0f) - e) / (ALL(1.0f) + e) * ALL(cap));
}

/* Numbers of one kind as floats. */
static inline VECTOR NAME(floats)(int kind, const void *numbers, long at)
{
    switch (kind) {
    case FLOAT32: return LOAD((const float *)numbers + at);
    case BFLOAT16: return OF_BFLOAT16((const uint16_t *)numbers + at);
    default: return OF_FLOAT16((const uint16_t *)numbers + at);
    }
}

/* Floats as numbers of one kind. */
static inline void NAME(put)(int kind, void *numbers, long at, const float *floats, long count)
{
    uint16_t *halves = (uint16_t *)numbers + at;
    switch (kind) {
    case FLOAT32: memcpy((float *)numbers + at, floats, count * sizeof(float)); break;
    case BFLOAT16:
        for (long each = 0; each < count; each++)
            halves[each] = bfloat16_of(floats[each]);
        break;
    default:
        for (long each = 0; each < count; each++)
            halves[each] = _cvtss_sh(floats[each], _MM_FROUND_TO_NEAREST_INT);
    }
}

/* A block's tokens ``from`` to ``end``, as floats side by side; zeros for the others. */
static inline const float *NAME(widen)(int kind, const void *numbers, long at, long apart, long dim, long from, long end,
                                        float *wide)
{
    for (long token = 0; token < BLOCK; token++)
        for (long d = 0; d < dim; d += LANES) {
            const int seen = token >= from && token < end;
            STORE(wide + token * dim + d, seen ? NAME(floats)(kind, numbers, at + token * apart + d) : ALL(0.0f));
        }
    return wide;
}

/* A block's keys, or values (``part`` 1), as floats that lie ``stride`` apart from token to token. Those that are not seen are
   zeros: what lies there need not be a number. Those of the next block are fetched meanwhile. */
static inline const float *NAME(block_of)(pass *one, long token, int part, long *stride)
{
    const job *all = one->all;
    const long dim = all->head_dim, apart = 2 * all->kv_heads * dim, block = BLOCK * apart, size = all->kind == FLOAT32 ? 4 : 2;
    const long within = (part * all->kv_heads + one->kv_head) * dim, at = one->table[token / BLOCK] * block + within;
    const long from = one->first - token, end = one->last + 1 - token;
    if (apart * size >= NEAR && end > BLOCK) {
        const char *next = (const char *)all->layer + (one->table[token / BLOCK + 1] * block + within) * size;
        for (long each = 0; each < BLOCK; each++)
            for (long byte = 0; byte < dim * size; byte += 64)
                _mm_prefetch(next + each * apart * size + byte, _MM_HINT_T0);
    }
    *stride = dim;
    switch (all->kind) {
    case FLOAT32:
        if (from > 0 || end < BLOCK)
            return NAME(widen)(FLOAT32, all->layer, at, apart, dim, from, end, one->wide);
        *stride = apart;
        return (const float *)all->layer + at;
    case BFLOAT16: return NAME(widen)(BFLOAT16, all->layer, at, apart, dim, from, end, one->wide);
    default: return NAME(widen)(FLOAT16, all->layer, at, apart, dim, from, end, one->wide);
    }
}

/* Scores of a block's tokens for ``heads`` heads from ``head`` on; how many is a constant where this is called. */
static inline __attribute__((always_inline)) void NAME(score)(const int heads, pass *one, long head, long column,
                                                               const float *keys, long stride)
{
    const long dim = one->all->head_dim;
#pragma GCC unroll 1
    for (int part = 0; part < BLOCK; part += LANES) {
        VECTOR quarters[TOGETHER][LANES / 4];
#pragma GCC unroll 1
        for (int quarter = 0; quarter < LANES / 4; quarter++, keys += 4 * stride) {
            VECTOR sums[TOGETHER][4];
#pragma GCC unroll 4
            for (int each = 0; each < heads; each++)
#pragma GCC unroll 4
                for (int token = 0; token < 4; token++)
                    sums[each][token] = ALL(0.0f);
            for (long d = 0; d < dim; d += LANES) {
                VECTOR key[4];
#pragma GCC unroll 4
                for (int token = 0; token < 4; token++)
                    key[token] = LOAD(keys + token * stride + d);
#pragma GCC unroll 4
                for (int each = 0; each < heads; each++) {
                    const VECTOR query = LOAD(one->query + (head + each) * dim + d);
#pragma GCC unroll 4
                    for (int token = 0; token < 4; token++)
                        sums[each][token] = FMA(query, key[token], sums[each][token]);
                }
            }
#pragma GCC unroll 4
            for (int each = 0; each < heads; each++)
                quarters[each][quarter] = QUARTERS(sums[each]);
        }
#pragma GCC unroll 4
        for (int each = 0; each < heads; each++)
            STORE(one->weights[head + each] + column + part, SUMS(quarters[each]));
    }
}

/* Adds a block's values, weighed, to the sums of ``heads`` heads, of which it takes ``chunks`` vectors from ``d`` on; both are
   constants. So that sums need not wait for each other, there are at least four at once for each head. */
static inline __attribute__((always_inline)) void NAME(weigh)(const int heads, const int chunks, pass *one, long head,
                                                               long column, const float *values, long stride, long d)
{
    const int ahead = 4 / chunks;
    const long dim = one->all->head_dim;
    VECTOR sums[4][TOGETHER][4];
#pragma GCC unroll 4
    for (int each = 0; each < heads; each++)
#pragma GCC unroll 4
        for (int chunk = 0; chunk < chunks; chunk++) {
            sums[0][each][chunk] = LOAD(one->sums + (head + each) * dim + d + chunk * LANES);
#pragma GCC unroll 4
            for (int token = 1; token < ahead; token++)
                sums[token][each][chunk] = ALL(0.0f);
        }
#pragma GCC unroll 1
    for (int begin = 0; begin < BLOCK; begin += ahead)
#pragma GCC unroll 4
        for (int token = 0; token < ahead; token++, values += stride) {
            VECTOR value[4];
#pragma GCC unroll 4
            for (int chunk = 0; chunk < chunks; chunk++)
                value[chunk] = LOAD(values + d + chunk * LANES);
#pragma GCC unroll 4
            for (int each = 0; each < heads; each++) {
                const VECTOR weight = ALL(one->weights[head + each][column + begin + token]);
#pragma GCC unroll 4
                for (int chunk = 0; chunk < chunks; chunk++)
                    sums[token][each][chunk] = FMA(weight, value[chunk], sums[token][each][chunk]);
            }
        }
#pragma GCC unroll 4
    for (int each = 0; each < heads; each++)
#pragma GCC unroll 4
        for (int chunk = 0; chunk < chunks; chunk++) {
#pragma GCC unroll 4
            for (int token = 1; token < ahead; token++)
                sums[0][each][chunk] += sums[token][each][chunk];
            STORE(one->sums + (head + each) * dim + d + chunk * LANES, sums[0][each][chunk]);
        }
}

static inline __attribute__((always_inline)) void NAME(weigh_all)(const int heads, pass *one, long head, long column,
                                                                   const float *values, long stride)
{
    const long dim = one->all->head_dim;
    long d = 0;
    for (; d + 4 * LANES <= dim; d += 4 * LANES)
        NAME(weigh)(heads, 4, one, head, column, values, stride, d);
    for (; d + 2 * LANES <= dim; d += 2 * LANES)
        NAME(weigh)(heads, 2, one, head, column, values, stride, d);
    for (; d < dim; d += LANES)
        NAME(weigh)(heads, 1, one, head, column, values, stride, d);
}

/* Scores of a tile's tokens become weights; what was summed before is made less where a higher score has come. */
static inline void NAME(soften)(pass *one, long head, long tile, long columns)
{
    const job *all = one->all;
    float *weights = one->weights[head], *sums = one->sums + head * all->head_dim;
    if (all->softcap > 0)
        for (long column = 0; column < columns; column += LANES)
            STORE(weights + column, NAME(capped)(LOAD(weights + column), all->softcap));
    if (all->bias)
        for (long column = 0; column < columns; column += LANES) {
            const long at = (one->first_head + head) * all->bias_stride + tile + column;
            STORE(weights + column, LOAD(weights + column) + NAME(floats)(all->kind, all->bias, at));
        }
    for (long token = tile; token < one->first; token++)
        weights[token - tile] = -__builtin_inff();
    for (long token = one->last + 1; token < tile + columns; token++)
        weights[token - tile] = -__builtin_inff();
    VECTOR top = ALL(one->highest[head]);
    for (long column = 0; column < columns; column += LANES)
        top = MAX(LOAD(weights + column), top); /* of two, the second where one is no number */
    const float highest = MAX_OF(top);
    if (highest > one->highest[head]) {
        const VECTOR less = NAME(exp_of)(ALL(one->highest[head] - highest));
        for (long d = 0; d < all->head_dim; d += LANES)
            STORE(sums + d, LOAD(sums + d) * less);
        one->total[head] *= less[0];
        one->highest[head] = highest;
    }
    /* Where all scores so far are minus infinity, they weigh nothing: less itself, that would be no number. */
    const VECTOR measure = ALL(highest == -__builtin_inff() ? 0.0f : highest);
    VECTOR total = ALL(0.0f);
    for (long column = 0; column < columns; column += LANES) {
        const VECTOR weight = NAME(exp_of)(LOAD(weights + column) - measure);
        STORE(weights + column, weight);
        total += weight;
    }
    one->total[head] += SUM_OF(total);
}

/* How many of the heads that are left share their loads: a constant for each case of a switch. */
static inline int NAME(together)(long left)
{
    return left >= TOGETHER ? TOGETHER : left >= 2 ? 2 : 1;
}

static void NAME(attend)(pass *one)
{
    const job *all = one->all;
    const long dim = all->head_dim, heads = one->heads, from = one->token * all->query_stride + one->first_head * dim;
    for (long head = 0; head < heads; head++) {
        one->highest[head] = all->sinks ? all->sinks[one->first_head + head] : -__builtin_inff();
        one->total[head] = all->sinks ? 1 : 0;
    }
    for (long d = 0; d < heads * dim; d += LANES) {
        STORE(one->query + d, NAME(floats)(all->kind, all->query, from + d) * ALL(all->scale));
        STORE(one->sums + d, ALL(0.0f));
    }
    for (long tile = one->first / BLOCK * BLOCK; tile <= one->last; tile += TILE) {
        const long end = tile + TILE <= one->last ? tile + TILE : one->last / BLOCK * BLOCK + BLOCK;
        long stride, head, count;
        for (long block = tile; block < end; block += BLOCK) {
            const float *keys = NAME(block_of)(one, block, 0, &stride);
            for (head = 0; head < heads; head += count)
                switch (count = NAME(together)(heads - head)) {
                case 1: NAME(score)(1, one, head, block - tile, keys, stride); break;
                case 2: NAME(score)(2, one, head, block - tile, keys, stride); break;
                default: NAME(score)(TOGETHER, one, head, block - tile, keys, stride);
                }
        }
        for (head = 0; head < heads; head++)
            NAME(soften)(one, head, tile, end - tile);
        for (long block = tile; block < end; block += BLOCK) {
            const float *values = NAME(block_of)(one, block, 1, &stride);
            for (head = 0; head < heads; head += count)
                switch (count = NAME(together)(heads - head)) {
                case 1: NAME(weigh_all)(1, one, head, block - tile, values, stride); break;
                case 2: NAME(weigh_all)(2, one, head, block - tile, values, stride); break;
                default: NAME(weigh_all)(TOGETHER, one, head, block - tile, values, stride);
                }
        }
    }
    for (long head = 0; head < heads; head++) {
        const VECTOR total = ALL(one->total[head]);
        for (long d = head * dim; d < (head + 1) * dim; d += LANES)
            STORE(one->sums + d, LOAD(one->sums + d) / total);
    }
    NAME(put)(all->kind, all->out, (one->token * all->heads + one->first_head) * dim, one->sums, heads * dim);
}

#undef NAME
#undef VECTOR
#undef LANES
#undef TOGETHER
#undef ALL
#undef LOAD
#undef STORE
#undef FMA
#undef MAX
#undef AND
#undef OR
#undef MAX_OF
#undef SUM_OF
#undef NEAREST
#undef POWER
#undef UNLESS_LESS
#undef OF_BFLOAT16
#undef OF_FLOAT16
#undef QUARTERS
#undef SUMS
