// The decoder for AVX-512 with VNNI and products of bf16.

#include "lanes_avx512.hpp"

#include "decoder_rows.hpp"

namespace meiqa {
namespace {

bool runs_here() { return kAvx512.runs_here() && __builtin_cpu_supports("avx512bf16"); }

}  // namespace

const Kernel kAvx512Bf16{"avx512bf16", kTogether, kLowest, kTakesHalves, kSideBySide, runs_here,
                         row_scratch, run_row, finish_rows, multiply_rows};

}  // namespace meiqa
