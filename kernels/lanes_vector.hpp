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

inline Native native(const float* at) {
    Native made;
    std::memcpy(&made, at, sizeof made);
    return made;
}

// What `make` gives for each part's index.
template <class Make>
inline Lanes each(const Make& make) {
    Lanes made;
#pragma GCC unroll 4
    for (std::size_t i = 0; i < kParts; ++i) made.part[i] = make(i);
    return made;
}

inline Lanes load(const float* at) {
    return each([=](std::size_t i) { return native(at + i * kNative); });
}

inline void store(float* at, const Lanes& x) { std::memcpy(at, x.part, sizeof x.part); }

inline Lanes all(float x) {
    return each([=](std::size_t) { return x - Native{}; });
}

inline Lanes operator+(const Lanes& a, const Lanes& b) {
    return each([&](std::size_t i) { return a.part[i] + b.part[i]; });
}

inline Lanes operator-(const Lanes& a, const Lanes& b) {
    return each([&](std::size_t i) { return a.part[i] - b.part[i]; });
}

inline Lanes operator*(const Lanes& a, const Lanes& b) {
    return each([&](std::size_t i) { return a.part[i] * b.part[i]; });
}

inline Lanes operator/(const Lanes& a, const Lanes& b) {
    return each([&](std::size_t i) { return a.part[i] / b.part[i]; });
}

// a b + c: one operation where the processor has it. The compiler fuses none by itself, so that every
// kernel that has it rounds alike.
inline Native fused(Native a, Native b, Native c) {
#if defined(__FMA__)
    return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
    return (Native)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

inline Lanes fused(const Lanes& a, const Lanes& b, const Lanes& c) {
    return each([&](std::size_t i) { return fused(a.part[i], b.part[i], c.part[i]); });
}

inline Lanes larger(const Lanes& a, const Lanes& b) {
    return each([&](std::size_t i) { return a.part[i] > b.part[i] ? a.part[i] : b.part[i]; });
}

inline Lanes smaller(const Lanes& a, const Lanes& b) {
    return each([&](std::size_t i) { return a.part[i] < b.part[i] ? a.part[i] : b.part[i]; });
}

// Halves are added until one is left, as AVX-512's own reduction does: sums have one order everywhere.
inline float sum_of(Lanes x) {
    for (std::size_t half = kParts / 2; half > 0; half /= 2)
        for (std::size_t i = 0; i < half; ++i) x.part[i] += x.part[i + half];
    Native sum = x.part[0];
    for (std::size_t half = kNative / 2; half > 0; half /= 2)
        for (std::size_t i = 0; i < half; ++i) sum[i] += sum[i + half];
    return sum[0];
}

inline float largest_of(const Lanes& x) {
    float largest = x.part[0][0];
    for (const Native& part : x.part)
        for (std::size_t i = 0; i < kNative; ++i) largest = part[i] > largest ? part[i] : largest;
    return largest;
}

// The nearest whole number, of two the even one, of |x| < 2^22: behind so large a number a float
// has no fraction.
inline Lanes nearest_whole(const Lanes& x) {
    const Lanes large = all(12582912.0f);
    return x + large - large;
}

// x times 2 to the power of a whole n from -126 on.
inline Lanes scaled(const Lanes& x, const Lanes& n) {
    return each([&](std::size_t i) {
        const NativeInts exponent = (__builtin_convertvector(n.part[i], NativeInts) + 127) << 23;
        Native power;
        std::memcpy(&power, &exponent, sizeof power);
        return x.part[i] * power;
    });
}

// The first `count` (< 16) floats; `other` in the lanes behind.
inline Lanes load_some(const float* at, std::size_t count, float other) {
    Lanes made = all(other);
    std::memcpy(&made, at, count * sizeof(float));
    return made;
}

// Zero in all lanes but the first `count` (< 16).
inline Lanes only_first(const Lanes& x, std::size_t count) {
    Lanes made = all(0.0f);
    std::memcpy(&made, &x, count * sizeof(float));
    return made;
}

// Floats of whole numbers, to which others are added before.
inline Lanes floats_of(const Ints& x, const std::int32_t* more) {
    Ints added;
    std::memcpy(&added, more, sizeof added);
    return each([&](std::size_t i) {
        return __builtin_convertvector(x.part[i] + added.part[i], Native);
    });
}

// Sums of products of rows with 16 columns of a panel. They are an array of this function alone:
// only then does GCC keep them in registers.
template <std::size_t ROWS>
inline void multiply_half(const float* a, std::size_t stride, const float* panel,
                          std::size_t inputs, Lanes (&sums)[ROWS]) {
    Native made[ROWS][kParts];
#pragma GCC unroll 8
    for (std::size_t r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (std::size_t i = 0; i < kParts; ++i) made[r][i] = Native{};
    for (std::size_t k = 0; k < inputs; ++k, panel += kPanel) {
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
inline void multiply(const float* a, std::size_t stride, const float* panel, std::size_t inputs,
                     Pair (&sums)[ROWS]) {
    Lanes lows[ROWS], highs[ROWS];
    multiply_half<ROWS>(a, stride, panel, inputs, lows);
    multiply_half<ROWS>(a, stride, panel + kLanes, inputs, highs);
    for (std::size_t r = 0; r < ROWS; ++r) sums[r] = {lows[r], highs[r]};
}

// The columns of 16 rows of 16 floats become rows.
inline void transpose(const float* const (&rows)[kLanes], float* out, std::size_t stride) {
    for (std::size_t column = 0; column < kLanes; ++column)
        for (std::size_t row = 0; row < kLanes; ++row)
            out[column * stride + row] = rows[row][column];
}

}  // namespace
}  // namespace meiqa
