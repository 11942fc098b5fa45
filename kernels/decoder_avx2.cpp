// The decoder for AVX2 with FMA.
//
// Products of bytes that are summed in 16 bits can overflow; those of 16 bits are summed in 32.

#include "lanes_vector.hpp"

#include <immintrin.h>

namespace meiqa {
namespace {

using Code = std::int16_t;
using Weight = std::int8_t;
constexpr std::size_t kTogether = 2;
constexpr int kLowest = 0;

inline void store_codes(Code* out, const Lanes& whole) {
    const __m256i low = _mm256_cvtps_epi32(whole.part[0]), high = _mm256_cvtps_epi32(whole.part[1]);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), packed);
}

template <std::size_t ROWS>
inline void multiply_codes(const Code* a, std::size_t stride, const Weight* panel,
                           std::size_t inputs, Ints (&sums)[ROWS][kHalves]) {
    __m256i made[ROWS][kParts];
#pragma GCC unroll 8
    for (std::size_t r = 0; r < ROWS; ++r) made[r][0] = made[r][1] = _mm256_setzero_si256();
    for (std::size_t k = 0; k < inputs; k += kTogether, panel += kTogether * kPanel) {
        const auto* const bytes = reinterpret_cast<const __m128i*>(panel);
        const __m256i low = _mm256_cvtepi8_epi16(_mm_loadu_si128(bytes));
        const __m256i high = _mm256_cvtepi8_epi16(_mm_loadu_si128(bytes + 1));
#pragma GCC unroll 8
        for (std::size_t r = 0; r < ROWS; ++r) {
            std::int32_t two;
            std::memcpy(&two, a + r * stride + k, sizeof two);
            const __m256i value = _mm256_set1_epi32(two);
            made[r][0] = _mm256_add_epi32(made[r][0], _mm256_madd_epi16(value, low));
            made[r][1] = _mm256_add_epi32(made[r][1], _mm256_madd_epi16(value, high));
        }
    }
    std::memcpy(sums, made, sizeof made);
}

}  // namespace
}  // namespace meiqa

#include "decoder_rows.hpp"

namespace meiqa {
namespace {

bool runs_here() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
}

}  // namespace

const Kernel kAvx2{"avx2", kTogether, kLowest, kTakesHalves, kSideBySide, runs_here,
                   row_scratch, run_row, finish_rows, multiply_rows};

}  // namespace meiqa
