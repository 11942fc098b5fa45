// Sixteen floats side by side in one register of AVX-512, and its byte products (VNNI).
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

// Sums of products of rows with one panel.
// The sums are arrays of this function alone: only then does GCC keep them in registers.
template <std::size_t ROWS>
inline void multiply(const float* a, std::size_t stride, const float* panel, std::size_t inputs,
                     Pair (&sums)[ROWS]) {
    __m512 lows[ROWS], highs[ROWS];
#pragma GCC unroll 16
    for (std::size_t r = 0; r < ROWS; ++r) lows[r] = highs[r] = _mm512_setzero_ps();
    for (std::size_t k = 0; k < inputs; ++k, panel += kPanel) {
        _mm_prefetch(reinterpret_cast<const char*>(panel + kAhead), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(panel + kAhead + kLanes), _MM_HINT_T0);
        const __m512 low = _mm512_loadu_ps(panel), high = _mm512_loadu_ps(panel + kLanes);
#pragma GCC unroll 16
        for (std::size_t r = 0; r < ROWS; ++r) {
            const __m512 value = _mm512_set1_ps(a[r * stride + k]);
            lows[r] = _mm512_fmadd_ps(value, low, lows[r]);
            highs[r] = _mm512_fmadd_ps(value, high, highs[r]);
        }
    }
#pragma GCC unroll 16
    for (std::size_t r = 0; r < ROWS; ++r) sums[r] = {lows[r], highs[r]};
}

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

// Sums of products of rows with one panel in half precision.
template <std::size_t ROWS>
inline void multiply_halves(const float* a, std::size_t stride, const Half* panel,
                            std::size_t inputs, Pair (&sums)[ROWS]) {
    __m512 lows[ROWS], highs[ROWS];
#pragma GCC unroll 16
    for (std::size_t r = 0; r < ROWS; ++r) lows[r] = highs[r] = _mm512_setzero_ps();
    const auto floats = [](const Half* at) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
    };
    for (std::size_t k = 0; k < inputs; ++k, panel += kPanel) {
        const __m512 low = floats(panel), high = floats(panel + kLanes);
#pragma GCC unroll 16
        for (std::size_t r = 0; r < ROWS; ++r) {
            const __m512 value = _mm512_set1_ps(a[r * stride + k]);
            lows[r] = _mm512_fmadd_ps(value, low, lows[r]);
            highs[r] = _mm512_fmadd_ps(value, high, highs[r]);
        }
    }
#pragma GCC unroll 16
    for (std::size_t r = 0; r < ROWS; ++r) sums[r] = {lows[r], highs[r]};
}

// Sums of products of rows with one panel of bytes, whose blocks have steps of their own.
template <std::size_t ROWS>
inline void multiply_blocks(const float* a, std::size_t stride, const std::int8_t* panel,
                            const float* steps, std::size_t inputs, Pair (&sums)[ROWS]) {
    __m512 lows[ROWS], highs[ROWS];
#pragma GCC unroll 16
    for (std::size_t r = 0; r < ROWS; ++r) lows[r] = highs[r] = _mm512_setzero_ps();
    const auto floats = [](const std::int8_t* at) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
    };
    for (std::size_t block = 0; block < inputs; block += kBlock, steps += kPanel) {
        const __m512 low_step = _mm512_loadu_ps(steps), high_step = _mm512_loadu_ps(steps + kLanes);
        for (std::size_t k = block; k < block + kBlock; ++k, panel += kPanel) {
            const __m512 low = floats(panel) * low_step, high = floats(panel + kLanes) * high_step;
#pragma GCC unroll 16
            for (std::size_t r = 0; r < ROWS; ++r) {
                const __m512 value = _mm512_set1_ps(a[r * stride + k]);
                lows[r] = _mm512_fmadd_ps(value, low, lows[r]);
                highs[r] = _mm512_fmadd_ps(value, high, highs[r]);
            }
        }
    }
#pragma GCC unroll 16
    for (std::size_t r = 0; r < ROWS; ++r) sums[r] = {lows[r], highs[r]};
}

// The columns of 16 rows of 16 floats become rows.
void transpose(const float* const (&rows)[kLanes], float* out, std::size_t stride) {
    __m512 a[kLanes], b[kLanes];
#pragma GCC unroll 16
    for (std::size_t i = 0; i < kLanes; ++i) a[i] = _mm512_loadu_ps(rows[i]);
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
