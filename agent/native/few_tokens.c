/* Products of few tokens with 16-bit weights that stay as they lie: out[token][output] = sum over inputs of x * weights.

   A processor reads weights from memory faster than the libraries that torch multiplies with can take them in: those are made for
   many tokens, and lay weights out anew for every product. Here each weight is read once and multiplied where it lies.

   Every sum is taken in the same order whatever tokens stand beside it. Called by few_tokens.py, which says what is asked of
   arguments. Needs no headers but the compiler's own. */

#if !defined(__x86_64__) || !defined(__GNUC__) || defined(__clang__)
#error "for gcc on x86-64 alone; elsewhere torch multiplies"
#endif

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

enum { BY_DOT = 1, BFLOAT16 = 2, FLOAT16 = 4 };

/* Of what is exported here. few_tokens.py has the same: a library that an older build has left in the tree is not called. */
#define INTERFACE 1

typedef struct {
    const uint16_t *weights;
    const void *x;
    uint16_t *out;
    long outputs, inputs, tokens, stride;
    int way, adds;
} job;

/* Of weights that eight tokens after eight are multiplied by: they stay in a core's own cache. */
#define PANEL_BYTES (256 << 10)

static inline float wide_of_bfloat16(uint16_t value)
{
    const uint32_t bits = (uint32_t)value << 16;
    float wide;
    memcpy(&wide, &bits, sizeof wide);
    return wide;
}

/* To the nearest, ties to even; what is not a number stays none. */
static inline uint16_t bfloat16_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffff) > 0x7f800000)
        return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

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
static inline float sum_of_eight(__m256 sums)
{
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

static inline __m256 wide_of_eight_bfloat16(const uint16_t *at)
{
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)at));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

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
#define LOAD_WEIGHTS wide_of_eight_bfloat16
#define FROM_16 wide_of_bfloat16
#define TO_16 bfloat16_of
#include "few_tokens_tile.h"

#define NAME(x) x##_float16
#define LOAD_WEIGHTS(at) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(at)))
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

/* The threads are torch's own: the OpenMP library that it has loaded, found by name when this is loaded. Its calls are those that
   compilers make for a parallel region. */
__attribute__((weak)) void GOMP_parallel(void (*)(void *), void *, unsigned, unsigned);
__attribute__((weak)) int omp_get_thread_num(void);
__attribute__((weak)) int omp_get_num_threads(void);

static void share_of_thread(void *all)
{
    const job *each = all;
    const long thread = omp_get_thread_num(), threads = omp_get_num_threads();
    share(each, each->outputs * thread / threads, each->outputs * (thread + 1) / threads);
}

/* None without those threads: of many cores, one would be slower than all of torch's. */
int sllm_few_tokens_ways(int interface)
{
    int ways = 0;
    if (interface != INTERFACE || !GOMP_parallel || !omp_get_thread_num || !omp_get_num_threads)
        return 0;
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
