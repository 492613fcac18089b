/* Products of few tokens with 16-bit weights that stay as they lie: out[token][output] = sum over inputs of x * weights.

   A processor reads weights from memory faster than the libraries that torch multiplies with can take them in: those are made for
   many tokens, and lay weights out anew for every product. Here each weight is read once and multiplied where it lies.

   Every sum is taken in the same order whatever tokens stand beside it. Called by few_tokens.py, which says what is asked of
   arguments. */

#include "compiled.h"

enum { BY_DOT = 1, BFLOAT16 = 2, FLOAT16 = 4 };

typedef struct {
    const uint16_t *weights;
    const void *x;
    uint16_t *out;
    long outputs, inputs, tokens, stride;
    int way, adds;
} job;

/* Of weights that eight tokens after eight are multiplied by: they stay in a core's own cache. */
#define PANEL_BYTES (256 << 10)

/* bfloat16 by the instruction that multiplies pairs of them. */
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512bf16")
#define INPUT uint16_t
#define SUMS __m512
#define PART __m512bh
#define STEP 32
#define ROWS(tokens) ((tokens) < 7 ? 4 : 3)
#define ZERO() _mm512_setzero_ps()
#define LOAD_TOKENS(at) ((__m512bh)_mm512_loadu_si512(at))
#define MULTIPLY_ADD(sums, a, b) _mm512_dpbf16_ps(sums, a, b)
#define SUM_OF(sums) _mm512_reduce_add_ps(sums)

#define NAME(x) x##_dot
#define LOAD_WEIGHTS LOAD_TOKENS
#define FROM_16 wide_of_bfloat16
#define TO_16 bfloat16_of
#include "few_tokens_tile.h"

#undef INPUT
#undef SUMS
#undef PART
#undef STEP
#undef ROWS
#undef ZERO
#undef LOAD_TOKENS
#undef MULTIPLY_ADD
#undef SUM_OF
#pragma GCC pop_options

/* The others make weights float32 in registers, and multiply float32 tokens. */
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define INPUT float
#define SUMS __m256
#define PART __m256
#define STEP 8
#define ROWS(tokens) ((tokens) < 3 ? 4 : (tokens) < 5 ? 2 : 1)
#define ZERO() _mm256_setzero_ps()
#define LOAD_TOKENS(at) _mm256_loadu_ps(at)
#define MULTIPLY_ADD(sums, a, b) _mm256_fmadd_ps(a, b, sums)
#define SUM_OF(sums) sum_of_eight(sums)

#define NAME(x) x##_bfloat16
#define LOAD_WEIGHTS eight_of_bfloat16
#define FROM_16 wide_of_bfloat16
#define TO_16 bfloat16_of
#include "few_tokens_tile.h"

#define NAME(x) x##_float16
#define LOAD_WEIGHTS eight_of_float16
#define FROM_16(value) _cvtsh_ss(value)
#define TO_16(value) _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT)
#include "few_tokens_tile.h"
#pragma GCC pop_options

static void share(const job *all, long first, long end)
{
    switch (all->way) {
    case BY_DOT: share_dot(all, first, end); break;
    case BFLOAT16: share_bfloat16(all, first, end); break;
    case FLOAT16: share_float16(all, first, end); break;
    }
}

static void share_of_thread(void *all)
{
    const job *each = all;
    const long thread = omp_get_thread_num(), threads = omp_get_num_threads();
    share(each, each->outputs * thread / threads, each->outputs * (thread + 1) / threads);
}

int sllm_few_tokens_ways(void)
{
    int ways = 0;
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
        ways |= BY_DOT;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        ways |= BFLOAT16 | FLOAT16;
    return ways;
}

void sllm_few_tokens(int way, const uint16_t *weights, long outputs, long inputs, const void *x, long tokens, uint16_t *out,
                     long stride, int adds, int threads)
{
    job all = {weights, x, out, outputs, inputs, tokens, stride, way, adds};
    if (threads > 1)
        GOMP_parallel(share_of_thread, &all, (unsigned)threads, 0);
    else
        share(&all, 0, outputs);
}
