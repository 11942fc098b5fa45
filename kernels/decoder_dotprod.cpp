// The decoder for ARM64 with dot products of four bytes.

#include "lanes_vector.hpp"

#include "codes_neon.hpp"

namespace meiqa {
namespace {

constexpr std::size_t kTogether = 4;

// Adds the products of four inputs, the codes' group LANE of four such.
template <int LANE, std::size_t ROWS>
inline void add_group(const int8x16_t (&codes)[ROWS], const Weight* panel,
                      int32x4_t (&made)[ROWS][kParts]) {
#pragma GCC unroll 2
    for (std::size_t i = 0; i < kParts; i += 2) {
        const Weight* const at = panel + LANE * kTogether * kPanel + 16 * i;
        const int8x16_t low = vld1q_s8(at), high = vld1q_s8(at + 16);
#pragma GCC unroll 8
        for (std::size_t r = 0; r < ROWS; ++r) {
            made[r][i] = vdotq_laneq_s32(made[r][i], low, codes[r], LANE);
            made[r][i + 1] = vdotq_laneq_s32(made[r][i + 1], high, codes[r], LANE);
        }
    }
}

template <std::size_t ROWS>
inline void multiply_codes(const Code* a, std::size_t stride, const Weight* panel,
                           std::size_t inputs, Ints (&sums)[ROWS][kHalves]) {
    int32x4_t made[ROWS][kParts];
#pragma GCC unroll 8
    for (std::size_t r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (std::size_t i = 0; i < kParts; ++i) made[r][i] = vdupq_n_s32(0);
    for (std::size_t k = 0; k < inputs; k += kLanes, panel += kLanes * kPanel) {
        int8x16_t codes[ROWS];
#pragma GCC unroll 8
        for (std::size_t r = 0; r < ROWS; ++r) codes[r] = vld1q_s8(a + r * stride + k);
        add_group<0>(codes, panel, made);
        add_group<1>(codes, panel, made);
        add_group<2>(codes, panel, made);
        add_group<3>(codes, panel, made);
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

const Kernel kDotprod{"dotprod", kTogether, kLowest, kTakesHalves, kSideBySide, runs_here,
                      row_scratch, run_row, finish_rows, multiply_rows};

}  // namespace meiqa
