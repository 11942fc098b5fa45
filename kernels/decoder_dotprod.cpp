// The decoder for ARM64 with dot products of four bytes.

#include "lanes_vector.hpp"

#include "codes_neon.hpp"

namespace meiqa {
namespace {

constexpr std::size_t kTogether = 4;

template <std::size_t ROWS>
inline void multiply_codes(const Code* a, std::size_t stride, const Weight* panel,
                           std::size_t inputs, Ints (&sums)[ROWS][kHalves]) {
    int32x4_t made[ROWS][kParts];
#pragma GCC unroll 8
    for (std::size_t r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (std::size_t i = 0; i < kParts; ++i) made[r][i] = vdupq_n_s32(0);
    for (std::size_t k = 0; k < inputs; k += kTogether, panel += kTogether * kPanel) {
        int8x16_t columns[kParts];
#pragma GCC unroll 4
        for (std::size_t i = 0; i < kParts; ++i) columns[i] = vld1q_s8(panel + 16 * i);
#pragma GCC unroll 8
        for (std::size_t r = 0; r < ROWS; ++r) {
            std::int32_t four;
            std::memcpy(&four, a + r * stride + k, sizeof four);
            const int8x16_t value = vreinterpretq_s8_s32(vdupq_n_s32(four));
#pragma GCC unroll 4
            for (std::size_t i = 0; i < kParts; ++i)
                made[r][i] = vdotq_s32(made[r][i], columns[i], value);
        }
    }
    std::memcpy(sums, made, sizeof made);
}

}  // namespace
}  // namespace meiqa

#include "decoder_rows.hpp"

#include <sys/auxv.h>

namespace meiqa {
namespace {

bool runs_here() { return getauxval(AT_HWCAP) & HWCAP_ASIMDDP; }

}  // namespace

const Kernel kDotprod{"dotprod",   kTogether,  kLowest,    runs_here,
                      row_scratch, attend_row, finish_rows};

}  // namespace meiqa
