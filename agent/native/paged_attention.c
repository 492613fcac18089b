/* Attention of single tokens to the keys and values of their sequences, read from paged memory where they lie.

   torch's attention wants each sequence's keys and values in one piece, and a batch's padded to the longest. A token that is
   generated sees each of them once, so that to lay them out takes as long as to attend. Here blocks are read in place, once for
   all heads that share them, and made float32 on the way.

   A token's sums are taken in the same order whatever tokens stand beside it. Called by paged_attention.py, which says what is
   asked of a job. */

#include "compiled.h"

enum { FLOAT32 = 1, BFLOAT16 = 2, FLOAT16 = 4 };
enum { EIGHT = 1, SIXTEEN = 2 };

/* Tokens of a block, as KV memory is divided. */
#define BLOCK 16
/* Tokens whose scores are made before their values are read. */
#define TILE 128
/* Heads that one pass over a sequence serves, of those that share a KV head. */
#define HEADS 8
#define MOST_HEAD_DIM 512
/* Tokens whose numbers lie farther apart than so many bytes are fetched ahead: the processor does not guess across pages. */
#define NEAR 1024

/* As in paged_attention.py. */
typedef struct {
    const void *query, *layer, *bias;
    const float *sinks;
    void *out;
    const int64_t *tables, *rows, *positions;
    long tokens, heads, kv_heads, head_dim, query_stride, table_stride, bias_stride, window;
    float scale, softcap;
    int kind;
} job;

/* One pass over what a token sees, from ``first`` to ``last``, for ``heads`` heads from ``first_head`` on. */
typedef struct {
    const job *all;
    const int64_t *table;
    long token, first, last, kv_head, first_head, heads;
    float query[HEADS * MOST_HEAD_DIM], sums[HEADS * MOST_HEAD_DIM], wide[BLOCK * MOST_HEAD_DIM];
    float weights[HEADS][TILE], highest[HEADS], total[HEADS];
} pass;

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,f16c,fma")
static inline __m512 sixteen_of_bfloat16(const uint16_t *at)
{
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)at));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

/* Of four vectors: each quarter of the answer has the sums of that quarter of theirs. */
static inline __m512 sixteen_quarters(const __m512 *each)
{
    const __m512d left = _mm512_castps_pd(_mm512_unpacklo_ps(each[0], each[1]) + _mm512_unpackhi_ps(each[0], each[1]));
    const __m512d right = _mm512_castps_pd(_mm512_unpacklo_ps(each[2], each[3]) + _mm512_unpackhi_ps(each[2], each[3]));
    return _mm512_castpd_ps(_mm512_unpacklo_pd(left, right)) + _mm512_castpd_ps(_mm512_unpackhi_pd(left, right));
}

static inline __m512 sixteen_sums(const __m512 *quarters)
{
    const __m512 left =
        _mm512_shuffle_f32x4(quarters[0], quarters[1], 0x44) + _mm512_shuffle_f32x4(quarters[0], quarters[1], 0xee);
    const __m512 right =
        _mm512_shuffle_f32x4(quarters[2], quarters[3], 0x44) + _mm512_shuffle_f32x4(quarters[2], quarters[3], 0xee);
    return _mm512_shuffle_f32x4(left, right, 0x88) + _mm512_shuffle_f32x4(left, right, 0xdd);
}

#define NAME(x) x##_sixteen
#define VECTOR __m512
#define LANES 16
#define TOGETHER 4
#define ALL _mm512_set1_ps
#define LOAD _mm512_loadu_ps
#define STORE _mm512_storeu_ps
#define FMA _mm512_fmadd_ps
#define MAX _mm512_max_ps
#define MAX_OF _mm512_reduce_max_ps
#define SUM_OF _mm512_reduce_add_ps
#define NEAREST(x) _mm512_roundscale_ps(x, 0)
#define POWER(n) _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23))
#define UNLESS_LESS(x, least, y) _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, least, _CMP_NLT_UQ), y)
#define AND _mm512_and_ps
#define OR _mm512_or_ps
#define OF_BFLOAT16 sixteen_of_bfloat16
#define OF_FLOAT16(at) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(at)))
#define QUARTERS sixteen_quarters
#define SUMS sixteen_sums
#include "paged_attention_pass.h"
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
static inline __m256 eight_halves(const __m256 *each)
{
    return _mm256_hadd_ps(_mm256_hadd_ps(each[0], each[1]), _mm256_hadd_ps(each[2], each[3]));
}

static inline __m256 eight_sums(const __m256 *halves)
{
    return _mm256_permute2f128_ps(halves[0], halves[1], 0x20) + _mm256_permute2f128_ps(halves[0], halves[1], 0x31);
}

static inline float max_of_eight(__m256 each)
{
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(each), _mm256_extractf128_ps(each, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

#define NAME(x) x##_eight
#define VECTOR __m256
#define LANES 8
#define TOGETHER 2
#define ALL _mm256_set1_ps
#define LOAD _mm256_loadu_ps
#define STORE _mm256_storeu_ps
#define FMA _mm256_fmadd_ps
#define MAX _mm256_max_ps
#define MAX_OF max_of_eight
#define SUM_OF sum_of_eight
#define NEAREST(x) _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
#define POWER(n) _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23))
#define UNLESS_LESS(x, least, y) _mm256_and_ps(_mm256_cmp_ps(x, least, _CMP_NLT_UQ), y)
#define AND _mm256_and_ps
#define OR _mm256_or_ps
#define OF_BFLOAT16 eight_of_bfloat16
#define OF_FLOAT16 eight_of_float16
#define QUARTERS eight_halves
#define SUMS eight_sums
#include "paged_attention_pass.h"
#pragma GCC pop_options

/* Every ``threads``-th pass from ``first`` on: tokens of the longest sequences come first, and so are shared by all. */
static void share(const job *all, int width, long first, long threads)
{
    const long group = all->heads / all->kv_heads, parts = (group + HEADS - 1) / HEADS;
    pass one;
    one.all = all;
    for (long each = first; each < all->tokens * all->kv_heads * parts; each += threads) {
        const long part = each % parts * HEADS;
        one.token = each / parts / all->kv_heads;
        one.kv_head = each / parts % all->kv_heads;
        one.first_head = one.kv_head * group + part;
        one.heads = group - part < HEADS ? group - part : HEADS;
        one.table = all->tables + all->rows[one.token] * all->table_stride;
        one.last = all->positions[one.token];
        one.first = all->window && one.last >= all->window ? one.last + 1 - all->window : 0;
        if (width == SIXTEEN)
            attend_sixteen(&one);
        else
            attend_eight(&one);
    }
}

typedef struct {
    const job *all;
    int width;
} team;

static void share_of_thread(void *each)
{
    share(((team *)each)->all, ((team *)each)->width, omp_get_thread_num(), omp_get_num_threads());
}

int sllm_attention_widths(void)
{
    int widths = 0;
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c"))
        return 0;
    if (__builtin_cpu_supports("avx2"))
        widths |= EIGHT;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
        widths |= SIXTEEN;
    return widths;
}

void sllm_attend(const job *all, int width, int threads)
{
    team each = {all, width};
    if (threads > 1)
        GOMP_parallel(share_of_thread, &each, (unsigned)threads, 0);
    else
        share(all, width, 0, 1);
}
