/* What the compiled code shares. It needs no headers but the compiler's own. */

#if !defined(__x86_64__) || !defined(__GNUC__) || defined(__clang__)
#error "for gcc on x86-64 alone; elsewhere torch computes"
#endif

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

/* Of what is exported. compiled.py has the same: a library that an older build has left in the tree is not called. */
#define INTERFACE 2

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

#pragma GCC push_options
#pragma GCC target("avx2,f16c")
static inline __m256 eight_of_bfloat16(const uint16_t *at)
{
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)at));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

static inline __m256 eight_of_float16(const uint16_t *at)
{
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)at));
}

static inline float sum_of_eight(__m256 each)
{
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(each), _mm256_extractf128_ps(each, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
#pragma GCC pop_options

/* The threads are torch's own: the OpenMP library that it has loaded, found by name when this is loaded. Its calls are those
   that compilers make for a parallel region. */
__attribute__((weak)) void GOMP_parallel(void (*)(void *), void *, unsigned, unsigned);
__attribute__((weak)) int omp_get_thread_num(void);
__attribute__((weak)) int omp_get_num_threads(void);
