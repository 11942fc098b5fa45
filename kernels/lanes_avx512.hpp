// Sixteen floats side by side in one register of AVX-512, and its byte products (VNNI). Compiled for
// products of bf16 too, attention's are of these, and those of layers that were packed so.
//
// What decoder_rows.hpp is written in. lanes_vector.hpp has the same names for other processors.

#pragma once

#include "decoder.hpp"

#include <immintrin.h>

#include <cstring>

namespace meiqa {
namespace {

using Lanes = __m512;
using Ints = __m512i;
using Code = std::uint8_t;
using Weight = std::int8_t;
using Half = std::uint16_t;
constexpr bool kTakesHalves = true;
constexpr std::size_t kTogether = 4;
constexpr int kLowest = 0;
constexpr std::size_t kHalves = 2;  // of a panel, that products of codes take at once
constexpr std::size_t kTile = 14;  // rows whose sums stay in the registers
// What products of floats multiply where bf16 will do, and how many of it lie side by side in a lane.
#ifdef __AVX512BF16__
using Factor = std::uint16_t;
#else
using Factor = float;
#endif
constexpr std::size_t kSideBySide = sizeof(float) / sizeof(Factor);
constexpr std::size_t kAhead = 48 * kPanel;  // floats of a panel that are fetched early

struct Pair {
    Lanes low, high;
};

inline Lanes load(const float* at) { return _mm512_loadu_ps(at); }
inline void store(float* at, Lanes x) { _mm512_storeu_ps(at, x); }
inline Lanes all(float x) { return _mm512_set1_ps(x); }
inline Lanes fused(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }
inline Lanes larger(Lanes a, Lanes b) { return _mm512_max_ps(a, b); }
inline Lanes smaller(Lanes a, Lanes b) { return _mm512_min_ps(a, b); }
inline float sum_of(Lanes x) { return _mm512_reduce_add_ps(x); }
inline float largest_of(Lanes x) { return _mm512_reduce_max_ps(x); }

inline Lanes nearest_whole(Lanes x) {
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// x times 2 to the power of a whole n.
inline Lanes scaled(Lanes x, Lanes n) { return _mm512_scalef_ps(x, n); }

inline __mmask16 first_of(std::size_t count) { return static_cast<__mmask16>((1u << count) - 1); }

// The first `count` (< 16) floats; `other` in the lanes behind.
inline Lanes load_some(const float* at, std::size_t count, float other) {
    return _mm512_mask_loadu_ps(all(other), first_of(count), at);
}

// Zero in all lanes but the first `count` (< 16).
inline Lanes only_first(Lanes x, std::size_t count) {
    return _mm512_maskz_mov_ps(first_of(count), x);
}

inline Lanes floats_of(Ints x, const std::int32_t* more) {
    return _mm512_cvtepi32_ps(_mm512_add_epi32(x, _mm512_loadu_si512(more)));
}

inline void store_codes(Code* out, Lanes whole) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(whole)));
}

// Sums of products of rows with one panel: `line(k)` reads the panel at some inputs, `value(r, k)` a
// row there, and `add` adds a product of both to a sum.
// The sums are arrays of this function alone: only then does GCC keep them in registers.
template <std::size_t ROWS, std::size_t TOGETHER = 1, class Line, class Value, class Add>
MEIQA_INLINE void sum_lines(std::size_t inputs, const Line& line, const Value& value,
                            const Add& add, Pair (&sums)[ROWS]) {
    __m512 lows[ROWS], highs[ROWS];
#pragma GCC unroll 16
    for (std::size_t r = 0; r < ROWS; ++r) lows[r] = highs[r] = _mm512_setzero_ps();
    for (std::size_t k = 0; k < inputs; k += TOGETHER) {
        const Pair at = line(k);
#pragma GCC unroll 16
        for (std::size_t r = 0; r < ROWS; ++r) {
            const Lanes factor = value(r, k);
            lows[r] = add(lows[r], factor, at.low);
            highs[r] = add(highs[r], factor, at.high);
        }
    }
#pragma GCC unroll 16
    for (std::size_t r = 0; r < ROWS; ++r) sums[r] = {lows[r], highs[r]};
}

template <std::size_t ROWS, class Line>
MEIQA_INLINE void sum_floats(const float* a, std::size_t stride, std::size_t inputs,
                             const Line& line, Pair (&sums)[ROWS]) {
    const auto value = [=](std::size_t r, std::size_t k) { return all(a[r * stride + k]); };
    const auto add = [](Lanes sum, Lanes factor, Lanes columns) {
        return fused(factor, columns, sum);
    };
    sum_lines<ROWS>(inputs, line, value, add, sums);
}

template <std::size_t ROWS>
inline void multiply(const float* a, std::size_t stride, const float* panel, std::size_t inputs,
                     Pair (&sums)[ROWS]) {
    const auto line = [=](std::size_t k) {
        const float* const at = panel + k * kPanel;
        _mm_prefetch(reinterpret_cast<const char*>(at + kAhead), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(at + kAhead + kLanes), _MM_HINT_T0);
        return Pair{load(at), load(at + kLanes)};
    };
    sum_floats<ROWS>(a, stride, inputs, line, sums);
}

// With one panel in half precision.
template <std::size_t ROWS>
inline void multiply_halves(const float* a, std::size_t stride, const Half* panel,
                            std::size_t inputs, Pair (&sums)[ROWS]) {
    const auto floats = [](const Half* at) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
    };
    const auto line = [=](std::size_t k) {
        const Half* const at = panel + k * kPanel;
        return Pair{floats(at), floats(at + kLanes)};
    };
    sum_floats<ROWS>(a, stride, inputs, line, sums);
}

// With one panel of bytes, whose blocks have steps of their own.
template <std::size_t ROWS>
inline void multiply_blocks(const float* a, std::size_t stride, const std::int8_t* panel,
                            const float* steps, std::size_t inputs, Pair (&sums)[ROWS]) {
    const auto floats = [](const std::int8_t* at) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
    };
    const auto line = [=](std::size_t k) {
        const std::int8_t* const at = panel + k * kPanel;
        const float* const step = steps + k / kBlock * kPanel;
        return Pair{floats(at) * load(step), floats(at + kLanes) * load(step + kLanes)};
    };
    sum_floats<ROWS>(a, stride, inputs, line, sums);
}

#ifdef __AVX512BF16__
// With one panel of bf16, two inputs of a column side by side.
template <std::size_t ROWS>
inline void multiply(const Factor* a, std::size_t stride, const Factor* panel, std::size_t inputs,
                     Pair (&sums)[ROWS]) {
    const auto line = [=](std::size_t k) {
        const auto* const at = reinterpret_cast<const float*>(panel + k * kPanel);
        return Pair{load(at), load(at + kLanes)};
    };
    const auto value = [=](std::size_t r, std::size_t k) {
        float two;
        std::memcpy(&two, a + r * stride + k, sizeof two);
        return all(two);
    };
    const auto add = [](Lanes sum, Lanes factor, Lanes columns) {
        return _mm512_dpbf16_ps(sum, (__m512bh)factor, (__m512bh)columns);
    };
    sum_lines<ROWS, kSideBySide>(inputs, line, value, add, sums);
}

inline void store_factors(Factor* out, Lanes x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), (__m256i)_mm512_cvtneps_pbh(x));
}

// The next factors of a row, those side by side in one lane.
inline Lanes load_factors(const float* at) {
    return (Lanes)_mm512_cvtne2ps_pbh(load(at + kLanes), load(at));
}

// Factors of two rows side by side.
inline void store_both(Factor* out, const float* one, const float* other) {
    const __m512i in_turns = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9,
                                              24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17,
                                              1, 16, 0);
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(load(other), load(one));
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(in_turns, both));
}
#else
inline void store_factors(Factor* out, Lanes x) { store(out, x); }
inline Lanes load_factors(const float* at) { return load(at); }
inline void store_both(Factor* out, const float* one, const float*) { store(out, load(one)); }
#endif

// Sums of products of rows of codes with one panel. Inlined, GCC would keep them in memory.
template <std::size_t ROWS>
__attribute__((noinline)) void multiply_codes(const Code* a, std::size_t stride,
                                              const Weight* panel, std::size_t inputs,
                                              Ints (&sums)[ROWS][kHalves]) {
    __m512i lows[ROWS], highs[ROWS];
#pragma GCC unroll 16
    for (std::size_t r = 0; r < ROWS; ++r) lows[r] = highs[r] = _mm512_setzero_si512();
    for (std::size_t k = 0; k < inputs; k += 4, panel += 4 * kPanel) {
        const __m512i low = _mm512_loadu_si512(panel), high = _mm512_loadu_si512(panel + 64);
#pragma GCC unroll 16
        for (std::size_t r = 0; r < ROWS; ++r) {
            std::int32_t four;
            std::memcpy(&four, a + r * stride + k, sizeof four);
            const __m512i value = _mm512_set1_epi32(four);
            lows[r] = _mm512_dpbusd_epi32(lows[r], value, low);
            highs[r] = _mm512_dpbusd_epi32(highs[r], value, high);
        }
    }
#pragma GCC unroll 16
    for (std::size_t r = 0; r < ROWS; ++r) sums[r][0] = lows[r], sums[r][1] = highs[r];
}

// The columns of 16 rows of 16 lanes of factors become rows.
void transpose(const float* const (&rows)[kLanes], float* out, std::size_t stride) {
    __m512 a[kLanes], b[kLanes];
#pragma GCC unroll 16
    for (std::size_t i = 0; i < kLanes; ++i) a[i] = load_factors(rows[i]);
#pragma GCC unroll 16
    for (std::size_t i = 0; i < kLanes; i += 2) {
        b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
#pragma GCC unroll 16
    for (std::size_t i = 0; i < kLanes; i += 4)
        for (std::size_t j = 0; j < 2; ++j) {
            const __m512d x = _mm512_castps_pd(b[i + j]), y = _mm512_castps_pd(b[i + j + 2]);
            a[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));
            a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
        }
#pragma GCC unroll 16
    for (std::size_t j = 0; j < 4; ++j) {
        b[j] = _mm512_shuffle_f32x4(a[j], a[j + 4], 0x88);
        b[j + 4] = _mm512_shuffle_f32x4(a[j], a[j + 4], 0xdd);
        b[j + 8] = _mm512_shuffle_f32x4(a[j + 8], a[j + 12], 0x88);
        b[j + 12] = _mm512_shuffle_f32x4(a[j + 8], a[j + 12], 0xdd);
    }
#pragma GCC unroll 16
    for (std::size_t j = 0; j < 4; ++j) {
        _mm512_storeu_ps(out + j * stride, _mm512_shuffle_f32x4(b[j], b[j + 8], 0x88));
        _mm512_storeu_ps(out + (j + 8) * stride, _mm512_shuffle_f32x4(b[j], b[j + 8], 0xdd));
        _mm512_storeu_ps(out + (j + 4) * stride, _mm512_shuffle_f32x4(b[j + 4], b[j + 12], 0x88));
        _mm512_storeu_ps(out + (j + 12) * stride, _mm512_shuffle_f32x4(b[j + 4], b[j + 12], 0xdd));
    }
}

}  // namespace
}  // namespace meiqa
