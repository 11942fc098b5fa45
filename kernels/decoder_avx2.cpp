// The decoder for AVX2 with FMA.

#include "lanes_vector.hpp"

#include "decoder_rows.hpp"

namespace meiqa {
namespace {

bool runs_here() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

}  // namespace

const Kernel kAvx2{"avx2", false, runs_here, row_scratch, attend_row, finish_rows};

}  // namespace meiqa
