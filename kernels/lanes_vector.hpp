// Sixteen floats side by side as vectors of the compiler's, as wide as the processor's registers.
//
// The names are those of lanes_avx512.hpp. What is rounded, and its products, are each kernel's own:
//     Code            a whole number from kLowest to kLowest + 255
//     Weight          of a panel, kTogether of a column side by side
//     store_codes     of sixteen whole numbers in floats
//     multiply_codes  sums of products of rows with half a panel

#pragma once

#include "decoder.hpp"

#include <cstring>

#if defined(__FMA__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace meiqa {
namespace {

#ifdef __AVX__
constexpr std::size_t kNative = 8;
#else
constexpr std::size_t kNative = 4;
#endif
constexpr std::size_t kParts = kLanes / kNative;
typedef float Native __attribute__((vector_size(4 * kNative)));
typedef std::int32_t NativeInts __attribute__((vector_size(4 * kNative)));

using Factor = float;  // no bf16 here
constexpr std::size_t kSideBySide = sizeof(float) / sizeof(Factor);
constexpr std::size_t kHalves = 1;
constexpr std::size_t kTile = 6;  // rows whose sums over half a panel stay in the registers

struct Lanes {
    Native part[kParts];
};

struct Ints {
    NativeInts part[kParts];
};

struct Pair {
    Lanes low, high;
};

MEIQA_INLINE Native native(const float* at) {
    Native made;
    std::memcpy(&made, at, sizeof made);
    return made;
}

// What `make` gives for each part's index.
template <class Make>
MEIQA_INLINE Lanes each(const Make& make) {
    Lanes made;
#pragma GCC unroll 4
    for (std::size_t i = 0; i < kParts; ++i) made.part[i] = make(i);
    return made;
}

MEIQA_INLINE Lanes load(const float* at) {
    return each([=](std::size_t i) { return native(at + i * kNative); });
}

MEIQA_INLINE void store(float* at, const Lanes& x) { std::memcpy(at, x.part, sizeof x.part); }

MEIQA_INLINE void store_factors(Factor* out, const Lanes& x) { store(out, x); }

MEIQA_INLINE void store_both(Factor* out, const float* one, const float*) { store(out, load(one)); }

MEIQA_INLINE Lanes all(float x) {
    return each([=](std::size_t) { return x - Native{}; });
}

MEIQA_INLINE Lanes operator+(const Lanes& a, const Lanes& b) {
    return each([&](std::size_t i) { return a.part[i] + b.part[i]; });
}

MEIQA_INLINE Lanes operator-(const Lanes& a, const Lanes& b) {
    return each([&](std::size_t i) { return a.part[i] - b.part[i]; });
}

MEIQA_INLINE Lanes operator*(const Lanes& a, const Lanes& b) {
    return each([&](std::size_t i) { return a.part[i] * b.part[i]; });
}

MEIQA_INLINE Lanes operator/(const Lanes& a, const Lanes& b) {
    return each([&](std::size_t i) { return a.part[i] / b.part[i]; });
}

// What processors have one operation for. a b + c is fused where they can and the compiler fuses none
// by itself, so that every kernel that fuses rounds alike. Of a maximum, or a minimum, with what is
// not a number the second is taken. The nearest whole number is of two the even one, of |x| < 2^22:
// behind so large a number a float has no fraction.
#if defined(__FMA__)
MEIQA_INLINE Native fused(Native a, Native b, Native c) { return _mm256_fmadd_ps(a, b, c); }
MEIQA_INLINE Native larger(Native a, Native b) { return _mm256_max_ps(a, b); }
MEIQA_INLINE Native smaller(Native a, Native b) { return _mm256_min_ps(a, b); }
MEIQA_INLINE Native nearest_whole(Native x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__aarch64__)
MEIQA_INLINE Native fused(Native a, Native b, Native c) { return vfmaq_f32(c, a, b); }
MEIQA_INLINE Native larger(Native a, Native b) { return vmaxnmq_f32(a, b); }
MEIQA_INLINE Native smaller(Native a, Native b) { return vminnmq_f32(a, b); }
MEIQA_INLINE Native nearest_whole(Native x) { return vrndnq_f32(x); }
#else
MEIQA_INLINE Native fused(Native a, Native b, Native c) { return a * b + c; }
MEIQA_INLINE Native larger(Native a, Native b) { return a > b ? a : b; }
MEIQA_INLINE Native smaller(Native a, Native b) { return a < b ? a : b; }
MEIQA_INLINE Native nearest_whole(Native x) { return x + 12582912.0f - 12582912.0f; }
#endif

MEIQA_INLINE Lanes fused(const Lanes& a, const Lanes& b, const Lanes& c) {
    return each([&](std::size_t i) { return fused(a.part[i], b.part[i], c.part[i]); });
}

MEIQA_INLINE Lanes larger(const Lanes& a, const Lanes& b) {
    return each([&](std::size_t i) { return larger(a.part[i], b.part[i]); });
}

MEIQA_INLINE Lanes smaller(const Lanes& a, const Lanes& b) {
    return each([&](std::size_t i) { return smaller(a.part[i], b.part[i]); });
}

MEIQA_INLINE Lanes nearest_whole(const Lanes& x) {
    return each([&](std::size_t i) { return nearest_whole(x.part[i]); });
}

// Halves are added until one is left, as AVX-512's own reduction does: sums have one order everywhere.
MEIQA_INLINE float sum_of(Lanes x) {
    for (std::size_t half = kParts / 2; half > 0; half /= 2)
        for (std::size_t i = 0; i < half; ++i) x.part[i] += x.part[i + half];
    Native sum = x.part[0];
    for (std::size_t half = kNative / 2; half > 0; half /= 2)
        for (std::size_t i = 0; i < half; ++i) sum[i] += sum[i + half];
    return sum[0];
}

MEIQA_INLINE float largest_of(const Lanes& x) {
    float largest = x.part[0][0];
    for (const Native& part : x.part)
        for (std::size_t i = 0; i < kNative; ++i) largest = part[i] > largest ? part[i] : largest;
    return largest;
}

// x times 2 to the power of a whole n from -126 on.
MEIQA_INLINE Lanes scaled(const Lanes& x, const Lanes& n) {
    return each([&](std::size_t i) {
        const NativeInts exponent = (__builtin_convertvector(n.part[i], NativeInts) + 127) << 23;
        Native power;
        std::memcpy(&power, &exponent, sizeof power);
        return x.part[i] * power;
    });
}

// The first `count` (< 16) floats; `other` in the lanes behind.
MEIQA_INLINE Lanes load_some(const float* at, std::size_t count, float other) {
    Lanes made = all(other);
    std::memcpy(&made, at, count * sizeof(float));
    return made;
}

// Zero in all lanes but the first `count` (< 16).
MEIQA_INLINE Lanes only_first(const Lanes& x, std::size_t count) {
    Lanes made = all(0.0f);
    std::memcpy(&made, &x, count * sizeof(float));
    return made;
}

// Floats of whole numbers, to which others are added before.
MEIQA_INLINE Lanes floats_of(const Ints& x, const std::int32_t* more) {
    return each([&](std::size_t i) {
        NativeInts part;
        std::memcpy(&part, more + i * kNative, sizeof part);
        return __builtin_convertvector(x.part[i] + part, Native);
    });
}

#ifdef __aarch64__
// Adds the products of a line of 16 columns with one lane of each row's values.
template <int LANE, std::size_t ROWS>
MEIQA_INLINE void add_line(const float* line, const float32x4_t (&values)[ROWS],
                     Native (&made)[ROWS][kParts]) {
#pragma GCC unroll 4
    for (std::size_t i = 0; i < kParts; ++i) {
        const float32x4_t columns = vld1q_f32(line + i * kNative);
#pragma GCC unroll 8
        for (std::size_t r = 0; r < ROWS; ++r)
            made[r][i] =
                (Native)vfmaq_laneq_f32((float32x4_t)made[r][i], columns, values[r], LANE);
    }
}
#endif

// Sums of products of rows with 16 columns of a panel. They are an array of this function alone:
// only then does GCC keep them in registers.
template <std::size_t ROWS>
MEIQA_INLINE void multiply_half(const float* a, std::size_t stride, const float* panel,
                          std::size_t inputs, Lanes (&sums)[ROWS]) {
    Native made[ROWS][kParts];
#pragma GCC unroll 8
    for (std::size_t r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (std::size_t i = 0; i < kParts; ++i) made[r][i] = Native{};
    std::size_t k = 0;
#ifdef __aarch64__
    // Here a product takes its factor from any lane: one load brings four.
    for (; k + 4 <= inputs; k += 4, panel += 4 * kPanel) {
        float32x4_t values[ROWS];
#pragma GCC unroll 8
        for (std::size_t r = 0; r < ROWS; ++r) values[r] = vld1q_f32(a + r * stride + k);
        add_line<0>(panel, values, made);
        add_line<1>(panel + kPanel, values, made);
        add_line<2>(panel + 2 * kPanel, values, made);
        add_line<3>(panel + 3 * kPanel, values, made);
    }
#endif
    for (; k < inputs; ++k, panel += kPanel) {
        Native columns[kParts];
#pragma GCC unroll 4
        for (std::size_t i = 0; i < kParts; ++i) columns[i] = native(panel + i * kNative);
#pragma GCC unroll 8
        for (std::size_t r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
            for (std::size_t i = 0; i < kParts; ++i)
                made[r][i] = fused(a[r * stride + k] - Native{}, columns[i], made[r][i]);
    }
#pragma GCC unroll 8
    for (std::size_t r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (std::size_t i = 0; i < kParts; ++i) sums[r].part[i] = made[r][i];
}

// Sums of products of rows with one panel.
template <std::size_t ROWS>
MEIQA_INLINE void multiply(const float* a, std::size_t stride, const float* panel, std::size_t inputs,
                     Pair (&sums)[ROWS]) {
    Lanes lows[ROWS], highs[ROWS];
    multiply_half<ROWS>(a, stride, panel, inputs, lows);
    multiply_half<ROWS>(a, stride, panel + kLanes, inputs, highs);
    for (std::size_t r = 0; r < ROWS; ++r) sums[r] = {lows[r], highs[r]};
}

using Half = std::uint16_t;

// Floats in half precision; of processors that have no operation for it there are none.
#if defined(__F16C__)
constexpr bool kTakesHalves = true;
MEIQA_INLINE Native floats_of(const Half* at) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
}
#elif defined(__aarch64__)
constexpr bool kTakesHalves = true;
MEIQA_INLINE Native floats_of(const Half* at) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(at)));
}
#else
constexpr bool kTakesHalves = false;
MEIQA_INLINE Native floats_of(const Half*) { return Native{}; }
#endif

MEIQA_INLINE Native floats_of(const std::int8_t* at) {
    typedef std::int8_t NativeBytes __attribute__((vector_size(kNative)));
    NativeBytes bytes;
    std::memcpy(&bytes, at, sizeof bytes);
    return __builtin_convertvector(bytes, Native);
}

// Sums of products of rows with 16 columns of a panel of which `part_of(k, i)` reads a part of a line.
template <std::size_t ROWS, class PartOf>
MEIQA_INLINE void multiply_read(const float* a, std::size_t stride, std::size_t inputs,
                                const PartOf& part_of, Lanes (&sums)[ROWS]) {
    Native made[ROWS][kParts];
#pragma GCC unroll 8
    for (std::size_t r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (std::size_t i = 0; i < kParts; ++i) made[r][i] = Native{};
    for (std::size_t k = 0; k < inputs; ++k) {
        Native columns[kParts];
#pragma GCC unroll 4
        for (std::size_t i = 0; i < kParts; ++i) columns[i] = part_of(k, i);
#pragma GCC unroll 8
        for (std::size_t r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
            for (std::size_t i = 0; i < kParts; ++i)
                made[r][i] = fused(a[r * stride + k] - Native{}, columns[i], made[r][i]);
    }
#pragma GCC unroll 8
    for (std::size_t r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (std::size_t i = 0; i < kParts; ++i) sums[r].part[i] = made[r][i];
}

// Sums of products of rows with one panel, half by half.
template <std::size_t ROWS, class PartOf>
MEIQA_INLINE void multiply_both(const float* a, std::size_t stride, std::size_t inputs,
                                const PartOf& part_of, Pair (&sums)[ROWS]) {
    Lanes lows[ROWS], highs[ROWS];
    multiply_read<ROWS>(a, stride, inputs, part_of, lows);
    const auto behind = [&](std::size_t k, std::size_t i) { return part_of(k, i + kParts); };
    multiply_read<ROWS>(a, stride, inputs, behind, highs);
    for (std::size_t r = 0; r < ROWS; ++r) sums[r] = {lows[r], highs[r]};
}

// Sums of products of rows with one panel in half precision.
template <std::size_t ROWS>
MEIQA_INLINE void multiply_halves(const float* a, std::size_t stride, const Half* panel,
                                  std::size_t inputs, Pair (&sums)[ROWS]) {
    const auto part_of = [=](std::size_t k, std::size_t i) {
        return floats_of(panel + k * kPanel + i * kNative);
    };
    multiply_both<ROWS>(a, stride, inputs, part_of, sums);
}

// Sums of products of rows with one panel of bytes, whose blocks have steps of their own.
template <std::size_t ROWS>
MEIQA_INLINE void multiply_blocks(const float* a, std::size_t stride, const std::int8_t* panel,
                                  const float* steps, std::size_t inputs, Pair (&sums)[ROWS]) {
    const auto part_of = [=](std::size_t k, std::size_t i) {
        const std::size_t at = i * kNative;
        return floats_of(panel + k * kPanel + at) * native(steps + k / kBlock * kPanel + at);
    };
    multiply_both<ROWS>(a, stride, inputs, part_of, sums);
}

// The columns of 16 rows of 16 floats become rows.
inline void transpose(const float* const (&rows)[kLanes], float* out, std::size_t stride) {
    for (std::size_t column = 0; column < kLanes; ++column)
        for (std::size_t row = 0; row < kLanes; ++row)
            out[column * stride + row] = rows[row][column];
}

}  // namespace
}  // namespace meiqa
