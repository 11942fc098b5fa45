// The decoder for what every processor of this architecture has: NEON on ARM64, SSE2 on x86-64.

#include "lanes_vector.hpp"

namespace meiqa {
namespace {

// A whole number in a float; a type beside that of inputs which are not rounded.
struct Code {
    float value;
};
using Weight = float;
constexpr std::size_t kTogether = 1;
constexpr int kLowest = 0;
// Sums of so many products of a code and a byte are below 2^24: floats hold them exactly.
constexpr std::size_t kExact = 512;

inline void store_codes(Code* out, const Lanes& whole) { store(&out->value, whole); }

template <std::size_t ROWS>
inline void multiply_codes(const Code* a, std::size_t stride, const Weight* panel,
                           std::size_t inputs, Ints (&sums)[ROWS][kHalves]) {
    std::memset(sums, 0, sizeof sums);
    for (std::size_t from = 0; from < inputs; from += kExact) {
        Lanes part[ROWS];
        const std::size_t count = inputs - from < kExact ? inputs - from : kExact;
        multiply_half<ROWS>(&a->value + from, stride, panel + from * kPanel, count, part);
        for (std::size_t r = 0; r < ROWS; ++r)
            for (std::size_t i = 0; i < kParts; ++i)
                sums[r][0].part[i] += __builtin_convertvector(part[r].part[i], NativeInts);
    }
}

}  // namespace
}  // namespace meiqa

#include "decoder_rows.hpp"

namespace meiqa {
namespace {

bool runs_here() { return true; }

}  // namespace

const Kernel kPortable{"portable", 0, kLowest, kTakesHalves, kSideBySide, runs_here,
                       row_scratch, run_row, finish_rows, multiply_rows};

}  // namespace meiqa
