// The decoder for AVX2 with byte products of eight lanes (AVX-VNNI).

#include "lanes_vector.hpp"

#include <cpuid.h>
#include <immintrin.h>

namespace meiqa {
namespace {

using Code = std::uint8_t;
using Weight = std::int8_t;
constexpr std::size_t kTogether = 4;
constexpr int kLowest = 0;

inline void store_codes(Code* out, const Lanes& whole) {
    const __m256i low = _mm256_cvtps_epi32(whole.part[0]), high = _mm256_cvtps_epi32(whole.part[1]);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                     _mm_packus_epi16(_mm256_castsi256_si128(packed),
                                      _mm256_extracti128_si256(packed, 1)));
}

template <std::size_t ROWS>
inline void multiply_codes(const Code* a, std::size_t stride, const Weight* panel,
                           std::size_t inputs, Ints (&sums)[ROWS][kHalves]) {
    __m256i made[ROWS][kParts];
#pragma GCC unroll 8
    for (std::size_t r = 0; r < ROWS; ++r) made[r][0] = made[r][1] = _mm256_setzero_si256();
    for (std::size_t k = 0; k < inputs; k += kTogether, panel += kTogether * kPanel) {
        const auto* const bytes = reinterpret_cast<const __m256i*>(panel);
        const __m256i low = _mm256_loadu_si256(bytes), high = _mm256_loadu_si256(bytes + 1);
#pragma GCC unroll 8
        for (std::size_t r = 0; r < ROWS; ++r) {
            std::int32_t four;
            std::memcpy(&four, a + r * stride + k, sizeof four);
            const __m256i value = _mm256_set1_epi32(four);
            made[r][0] = _mm256_dpbusd_epi32(made[r][0], value, low);
            made[r][1] = _mm256_dpbusd_epi32(made[r][1], value, high);
        }
    }
    std::memcpy(sums, made, sizeof made);
}

}  // namespace
}  // namespace meiqa

#include "decoder_rows.hpp"

namespace meiqa {
namespace {

// GCC 12's __builtin_cpu_supports doesn't know AVX-VNNI: leaf 7.1, EAX, bit 4.
bool runs_here() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c") &&
           __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

}  // namespace

const Kernel kAvxVnni{"avxvnni", kTogether, kLowest, kTakesHalves, kSideBySide, runs_here,
                      row_scratch, run_row, finish_rows, multiply_rows};

}  // namespace meiqa
