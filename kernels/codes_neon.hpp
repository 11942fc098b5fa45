// Rounded inputs as signed bytes, which both kinds of byte products of ARM64 take.

#pragma once

#include "lanes_vector.hpp"

#include <arm_neon.h>

namespace meiqa {
namespace {

using Code = std::int8_t;
using Weight = std::int8_t;
constexpr int kLowest = -128;

inline void store_codes(Code* out, const Lanes& whole) {
    const auto narrow = [&](std::size_t i) {
        return vqmovn_s32(vcvtq_s32_f32((float32x4_t)whole.part[i]));
    };
    vst1q_s8(out, vcombine_s8(vqmovn_s16(vcombine_s16(narrow(0), narrow(1))),
                              vqmovn_s16(vcombine_s16(narrow(2), narrow(3)))));
}

}  // namespace
}  // namespace meiqa
