// The decoder for what every processor of this architecture has: NEON on ARM64, SSE2 on x86-64.

#include "lanes_vector.hpp"

#include "decoder_rows.hpp"

namespace meiqa {
namespace {

bool runs_here() { return true; }

}  // namespace

const Kernel kPortable{"portable", false, runs_here, row_scratch, attend_row, finish_rows};

}  // namespace meiqa
