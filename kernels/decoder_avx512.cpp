// The decoder for AVX-512 with VNNI.

#include "lanes_avx512.hpp"

#include "decoder_rows.hpp"

namespace meiqa {
namespace {

bool runs_here() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
}

}  // namespace

const Kernel kAvx512{"avx512", kTogether, kLowest, kTakesHalves, kSideBySide, runs_here,
                     row_scratch, run_row, finish_rows, multiply_rows};

}  // namespace meiqa
