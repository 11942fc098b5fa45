// The decoder for ARM64 with products of matrices of bytes, 2 x 8 by 8 x 2.

#include "lanes_vector.hpp"

#include "codes_neon.hpp"

namespace meiqa {
namespace {

constexpr std::size_t kTogether = 8;

// Two rows side by side; the last row of an odd number is taken twice.
template <std::size_t ROWS>
inline int8x16_t both(const Code* a, std::size_t stride, std::size_t pair) {
    const Code* const first = a + 2 * pair * stride;
    return vcombine_s8(vld1_s8(first), vld1_s8(2 * pair + 1 < ROWS ? first + stride : first));
}

template <std::size_t ROWS>
inline void multiply_codes(const Code* a, std::size_t stride, const Weight* panel,
                           std::size_t inputs, Ints (&sums)[ROWS][kHalves]) {
    constexpr std::size_t pairs = (ROWS + 1) / 2, columns = kLanes / 2;
    int32x4_t made[pairs][columns];  // of two columns: the first row's, then the second's
#pragma GCC unroll 4
    for (std::size_t p = 0; p < pairs; ++p)
#pragma GCC unroll 8
        for (std::size_t c = 0; c < columns; ++c) made[p][c] = vdupq_n_s32(0);
    for (std::size_t k = 0; k < inputs; k += kTogether, panel += kTogether * kPanel) {
        int8x16_t values[pairs];
#pragma GCC unroll 4
        for (std::size_t p = 0; p < pairs; ++p) values[p] = both<ROWS>(a + k, stride, p);
#pragma GCC unroll 8
        for (std::size_t c = 0; c < columns; ++c) {
            const int8x16_t column = vld1q_s8(panel + 16 * c);
#pragma GCC unroll 4
            for (std::size_t p = 0; p < pairs; ++p)
                made[p][c] = vmmlaq_s32(made[p][c], values[p], column);
        }
    }
#pragma GCC unroll 8
    for (std::size_t r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (std::size_t i = 0; i < kParts; ++i) {
            const auto low = vreinterpretq_s64_s32(made[r / 2][2 * i]);
            const auto high = vreinterpretq_s64_s32(made[r / 2][2 * i + 1]);
            const auto own = r % 2 ? vzip2q_s64(low, high) : vzip1q_s64(low, high);
            std::memcpy(&sums[r][0].part[i], &own, sizeof own);
        }
}

}  // namespace
}  // namespace meiqa

#include "decoder_rows.hpp"

#include <sys/auxv.h>

namespace meiqa {
namespace {

bool runs_here() { return getauxval(AT_HWCAP2) & HWCAP2_I8MM; }

}  // namespace

const Kernel kI8mm{"i8mm", kTogether, kLowest, kTakesHalves, kSideBySide, runs_here,
                   row_scratch, run_row, finish_rows, multiply_rows};

}  // namespace meiqa
