// Sixteen floats side by side as vectors of the compiler's, as wide as the processor's registers.
//
// The names are those of lanes_avx512.hpp. There are no byte products: rounded inputs stay floats
// that hold whole numbers, and a byte weight is multiplied as the float it stands for.

#pragma once

#include "decoder.hpp"

#include <cstring>

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

using Code = float;  // an input, rounded, above the zero point
constexpr std::size_t kTile = 6;  // rows whose sums over half a panel stay in the registers

struct Lanes {
    Native part[kParts];
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

// a b + c: one operation where the processor has it.
inline Lanes fused(const Lanes& a, const Lanes& b, const Lanes& c) {
    return each([&](std::size_t i) { return a.part[i] * b.part[i] + c.part[i]; });
}

inline Lanes larger(const Lanes& a, const Lanes& b) {
    return each([&](std::size_t i) { return a.part[i] > b.part[i] ? a.part[i] : b.part[i]; });
}

inline Lanes smaller(const Lanes& a, const Lanes& b) {
    return each([&](std::size_t i) { return a.part[i] < b.part[i] ? a.part[i] : b.part[i]; });
}

inline float sum_of(const Lanes& x) {
    Native sum = x.part[0];
    for (std::size_t i = 1; i < kParts; ++i) sum += x.part[i];
    float whole = 0;
    for (std::size_t i = 0; i < kNative; ++i) whole += sum[i];
    return whole;
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

inline void store_codes(Code* out, const Lanes& x, const Linear& reader) {
    const Lanes least = all(-reader.zero), most = all(255.0f - reader.zero);
    store(out, nearest_whole(smaller(larger(x * all(reader.steps), least), most)));
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
            for (std::size_t i = 0; i < kParts; ++i) made[r][i] += a[r * stride + k] * columns[i];
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

// What a panel of a linear layer makes of rows.
template <std::size_t ROWS>
inline void layer_of(const Linear& w, const float* a, std::size_t stride, std::size_t panel,
                     Pair (&made)[ROWS]) {
    const std::size_t at = panel * kPanel;
    multiply<ROWS>(a, stride, w.floats + at * w.inputs, w.inputs, made);
    const Lanes low = load(w.bias + at), high = load(w.bias + at + kLanes);
    for (std::size_t r = 0; r < ROWS; ++r) made[r] = {made[r].low + low, made[r].high + high};
}

// The columns of 16 rows of 16 floats become rows.
inline void transpose(const float* const (&rows)[kLanes], float* out, std::size_t stride) {
    for (std::size_t column = 0; column < kLanes; ++column)
        for (std::size_t row = 0; row < kLanes; ++row)
            out[column * stride + row] = rows[row][column];
}

}  // namespace
}  // namespace meiqa
