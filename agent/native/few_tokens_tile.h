/* One way to multiply, for few_tokens.c, which includes this once for each after it has defined

     INPUT                        what tokens are made of
     SUMS, PART                   sums side by side; what is multiplied in one go
     STEP                         how many inputs that are
     ROWS(tokens)                 how many rows of weights share their loads of tokens: as many as the registers hold
     ZERO, LOAD_TOKENS, MULTIPLY_ADD, SUM_OF

   and for each kind of weights, which is forgotten at the end of this,

     NAME(x)                      x with an ending of its own
     LOAD_WEIGHTS, FROM_16, TO_16
*/

/* ``rows`` outputs of each of ``tokens`` tokens. Both are constants where this is called, so that all sums stay in registers. */
static inline __attribute__((always_inline)) void NAME(tile)(const int tokens, const int rows, const job *all,
                                                             const uint16_t *weights, const INPUT *x, uint16_t *out)
{
    const long inputs = all->inputs;
    SUMS sums[4][8];
#pragma GCC unroll 4
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 8
        for (int token = 0; token < tokens; token++)
            sums[row][token] = ZERO();
    for (long at = 0; at < inputs; at += STEP) {
        PART part[4];
#pragma GCC unroll 4
        for (int row = 0; row < rows; row++) {
            part[row] = LOAD_WEIGHTS(weights + row * inputs + at);
            if (tokens > 1) /* the rows that come next: with one token, the processor's own guess is the better one */
                _mm_prefetch((const char *)(weights + (row + rows) * inputs + at), _MM_HINT_T0);
        }
#pragma GCC unroll 8
        for (int token = 0; token < tokens; token++) {
            const PART ahead = LOAD_TOKENS(x + token * inputs + at);
#pragma GCC unroll 4
            for (int row = 0; row < rows; row++)
                sums[row][token] = MULTIPLY_ADD(sums[row][token], part[row], ahead);
        }
    }
#pragma GCC unroll 4
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 8
        for (int token = 0; token < tokens; token++) {
            uint16_t *to = out + token * all->stride + row;
            const float sum = SUM_OF(sums[row][token]);
            *to = TO_16(all->adds ? FROM_16(*to) + sum : sum);
        }
}

/* Outputs ``first`` to ``end`` of up to eight tokens. */
static inline __attribute__((always_inline)) void NAME(panel)(const int tokens, const job *all, long first, long end,
                                                              const INPUT *x, uint16_t *out)
{
    const int rows = ROWS(tokens);
    for (; first + rows <= end; first += rows)
        NAME(tile)(tokens, rows, all, all->weights + first * all->inputs, x, out + first);
    for (; first < end; first++)
        NAME(tile)(tokens, 1, all, all->weights + first * all->inputs, x, out + first);
}

/* A thread's outputs of all tokens: eight tokens at a time, by weights that are in the cache after the first eight. */
static void NAME(share)(const job *all, long first, long end)
{
    long height = PANEL_BYTES / (2 * all->inputs) / 12 * 12;
    if (height < 12)
        height = 12;
    for (; first < end; first += height) {
        const long last = first + height < end ? first + height : end;
        for (long token = 0; token < all->tokens; token += 8) {
            const INPUT *x = (const INPUT *)all->x + token * all->inputs;
            uint16_t *out = all->out + token * all->stride;
            switch (all->tokens - token) {
            case 1: NAME(panel)(1, all, first, last, x, out); break;
            case 2: NAME(panel)(2, all, first, last, x, out); break;
            case 3: NAME(panel)(3, all, first, last, x, out); break;
            case 4: NAME(panel)(4, all, first, last, x, out); break;
            case 5: NAME(panel)(5, all, first, last, x, out); break;
            case 6: NAME(panel)(6, all, first, last, x, out); break;
            case 7: NAME(panel)(7, all, first, last, x, out); break;
            default: NAME(panel)(8, all, first, last, x, out);
            }
        }
    }
}

#undef NAME
#undef LOAD_WEIGHTS
#undef FROM_16
#undef TO_16
