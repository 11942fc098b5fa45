// A row of the decoder with AVX-512 and its byte products (VNNI).
//
// Everything between two products happens on the way: a product's tile is turned to floats, biased,
// gated and rounded to bytes before it leaves the registers. All sums run over their inputs in
// order, however many rows a tile has: a row's result depends on nothing but the row.

#include "decoder.hpp"

#include <immintrin.h>

#include <cstring>

namespace meiqa {
namespace {

constexpr std::size_t kLanes = 16, kTile = 14;
constexpr std::size_t kAhead = 48 * kPanel;  // floats of a panel that are fetched early
constexpr float kUnseen = -1e30f;

std::size_t rounded_up(std::size_t count, std::size_t step) {
    return (count + step - 1) / step * step;
}

std::size_t least(std::size_t a, std::size_t b) { return a < b ? a : b; }

struct Pair {
    __m512 low, high;
};

// ---- products ----------------------------------------------------------------------------------

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

struct Sums {
    __m512i low, high;
};

template <std::size_t ROWS>
inline void multiply(const std::uint8_t* a, std::size_t stride, const std::int8_t* panel,
                     std::size_t inputs, Sums (&sums)[ROWS]) {
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
    for (std::size_t r = 0; r < ROWS; ++r) sums[r] = {lows[r], highs[r]};
}

// Calls take(row, panel, sums) for a tile of ROWS rows and one panel.
template <std::size_t ROWS, class Take>
inline void tile(const Linear& w, const float* a, std::size_t stride, std::size_t first,
                 std::size_t panel, const Take& take) {
    Pair sums[ROWS];
    multiply<ROWS>(a + first * stride, stride, w.floats + panel * kPanel * w.inputs, w.inputs,
                   sums);
    const __m512 low = _mm512_loadu_ps(w.bias + panel * kPanel);
    const __m512 high = _mm512_loadu_ps(w.bias + panel * kPanel + kLanes);
    for (std::size_t r = 0; r < ROWS; ++r)
        take(first + r, panel,
             Pair{_mm512_add_ps(sums[r].low, low), _mm512_add_ps(sums[r].high, high)});
}

template <std::size_t ROWS, class Take>
inline void tile(const Linear& w, const std::uint8_t* a, std::size_t stride, std::size_t first,
                 std::size_t panel, const Take& take) {
    Sums sums[ROWS];
    multiply<ROWS>(a + first * stride, stride, w.bytes + panel * kPanel * w.inputs, w.inputs,
                   sums);
    const std::size_t at = panel * kPanel;
    const auto dequantised = [&](__m512i sum, std::size_t from) {
        const __m512i centred = _mm512_sub_epi32(sum, _mm512_loadu_si512(w.centre + from));
        return _mm512_fmadd_ps(_mm512_cvtepi32_ps(centred), _mm512_loadu_ps(w.scale + from),
                               _mm512_loadu_ps(w.bias + from));
    };
    for (std::size_t r = 0; r < ROWS; ++r)
        take(first + r, panel,
             Pair{dequantised(sums[r].low, at), dequantised(sums[r].high, at + kLanes)});
}

// Calls run.operator()<ROWS>() with a number of rows that is only known now.
template <class Run, std::size_t ROWS = kTile>
inline void with_rows(std::size_t rows, const Run& run) {
    if (rows == ROWS) run.template operator()<ROWS>();
    else if constexpr (ROWS > 1) with_rows<Run, ROWS - 1>(rows, run);
}

template <class Take>
struct Tiles {
    const Linear& w;
    const void* a;
    std::size_t stride, first, panel;
    const Take& take;

    template <std::size_t ROWS>
    void operator()() const {
        if (w.bytes) tile<ROWS>(w, static_cast<const std::uint8_t*>(a), stride, first, panel, take);
        else tile<ROWS>(w, static_cast<const float*>(a), stride, first, panel, take);
    }
};

// What a linear layer may be given: rows of `width` values as floats or as bytes.
struct Input {
    float* floats;
    std::uint8_t* bytes;
    std::size_t width;

    Input from(std::size_t row) const {
        return {floats + row * width, bytes + row * width, width};
    }
};

template <class Take>
void product(const Linear& w, const Input& input, std::size_t rows, const Take& take) {
    const void* const a = w.bytes ? static_cast<const void*>(input.bytes) : input.floats;
    for (std::size_t first = 0; first < rows; first += kTile)
        for (std::size_t panel = 0; panel < w.panels; ++panel)
            with_rows(least(kTile, rows - first),
                      Tiles<Take>{w, a, input.width, first, panel, take});
}

void stored(const Linear& w, const Input& input, std::size_t rows, float* out, std::size_t width) {
    product(w, input, rows, [=](std::size_t row, std::size_t panel, const Pair& made) {
        float* const at = out + row * width + panel * kPanel;
        _mm512_storeu_ps(at, made.low);
        _mm512_storeu_ps(at + kLanes, made.high);
    });
}

void added(const Linear& w, const Input& input, std::size_t rows, float* out, std::size_t width) {
    product(w, input, rows, [=](std::size_t row, std::size_t panel, const Pair& made) {
        float* const at = out + row * width + panel * kPanel;
        _mm512_storeu_ps(at, _mm512_add_ps(_mm512_loadu_ps(at), made.low));
        _mm512_storeu_ps(at + kLanes, _mm512_add_ps(_mm512_loadu_ps(at + kLanes), made.high));
    });
}

// ---- between products --------------------------------------------------------------------------

// Cephes' expf: the remainder of a division by ln 2 in a polynomial, the quotient as exponent.
__m512 exponential(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-87.0f));
    x = _mm512_min_ps(x, _mm512_set1_ps(88.0f));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)),
                                          _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    const __m512 one = _mm512_set1_ps(1.0f);
    return _mm512_scalef_ps(_mm512_fmadd_ps(_mm512_mul_ps(p, r), r, _mm512_add_ps(r, one)), n);
}

__m512 silu(__m512 x) {
    const __m512 negative = _mm512_sub_ps(_mm512_setzero_ps(), x);
    return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), exponential(negative)));
}

void store_bytes(std::uint8_t* out, __m512 x, const Linear& reader) {
    const __m512i code = _mm512_cvtps_epi32(_mm512_mul_ps(x, _mm512_set1_ps(reader.steps)));
    const __m512i zero = _mm512_set1_epi32(static_cast<int>(reader.zero));
    const __m512i above = _mm512_max_epi32(_mm512_add_epi32(code, zero), _mm512_setzero_si512());
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtusepi32_epi8(above));
}

void to_bytes(const float* x, std::uint8_t* out, std::size_t count, const Linear& reader) {
    for (std::size_t i = 0; i < count; i += kLanes)
        store_bytes(out + i, _mm512_loadu_ps(x + i), reader);
}

void normalise(const Model& model, const float* x, const float* weight, std::size_t rows,
               float* out) {
    for (std::size_t row = 0; row < rows; ++row, x += model.width, out += model.width) {
        __m512 squares = _mm512_setzero_ps();
        for (std::size_t i = 0; i < model.width; i += kLanes) {
            const __m512 value = _mm512_loadu_ps(x + i);
            squares = _mm512_fmadd_ps(value, value, squares);
        }
        const float mean = _mm512_reduce_add_ps(squares) / static_cast<float>(model.width);
        const __m512 wide = _mm512_set1_ps(mean + model.epsilon);
        const __m512 factor = _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_sqrt_ps(wide));
        for (std::size_t i = 0; i < model.width; i += kLanes) {
            const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(x + i), factor);
            _mm512_storeu_ps(out + i, _mm512_mul_ps(_mm512_loadu_ps(weight + i), scaled));
        }
    }
}

void rotate(const Model& model, const float* cosines, const float* sines, std::size_t steps,
            std::size_t heads, float factor, float* x) {
    const std::size_t half = model.head_width / 2;
    const __m512 scale = _mm512_set1_ps(factor);
    for (std::size_t step = 0; step < steps; ++step, cosines += half, sines += half)
        for (std::size_t head = 0; head < heads; ++head, x += model.head_width)
            for (std::size_t i = 0; i < half; i += kLanes) {
                const __m512 low = _mm512_loadu_ps(x + i), high = _mm512_loadu_ps(x + half + i);
                const __m512 c = _mm512_mul_ps(_mm512_loadu_ps(cosines + i), scale);
                const __m512 s = _mm512_mul_ps(_mm512_loadu_ps(sines + i), scale);
                _mm512_storeu_ps(x + i, _mm512_fmsub_ps(low, c, _mm512_mul_ps(high, s)));
                _mm512_storeu_ps(x + half + i, _mm512_fmadd_ps(high, c, _mm512_mul_ps(low, s)));
            }
}

// ---- attention ---------------------------------------------------------------------------------

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

// Keys or values of one head: those of the prefix, then the row's own.
struct Seen {
    const float* prefix;
    std::size_t prefix_steps;
    const float* own;
    std::size_t own_stride, steps;

    std::size_t count() const { return prefix_steps + steps; }

    const float* at(std::size_t index, std::size_t width) const {
        return index < prefix_steps ? prefix + index * width
                                    : own + (index - prefix_steps) * own_stride;
    }
};

// Panels of 32 keys, channel after channel; the last key fills the last panel.
void pack_keys(const Seen& seen, std::size_t width, float* out) {
    for (std::size_t first = 0; first < seen.count(); first += kLanes) {
        const float* rows[kLanes];
        for (std::size_t i = 0; i < kLanes; ++i)
            rows[i] = seen.at(least(first + i, seen.count() - 1), width);
        float* const panel = out + first / kPanel * kPanel * width + first % kPanel;
        for (std::size_t channel = 0; channel < width; channel += kLanes) {
            transpose(rows, panel + channel * kPanel, kPanel);
            for (auto& row : rows) row += kLanes;
        }
    }
}

// Panels of 32 channels, value after value.
void pack_values(const Seen& seen, std::size_t width, float* out) {
    for (std::size_t index = 0; index < seen.count(); ++index) {
        const float* const value = seen.at(index, width);
        for (std::size_t channel = 0; channel < width; channel += kPanel)
            std::memcpy(out + (channel * seen.count() + index * kPanel), value + channel,
                        kPanel * sizeof(float));
    }
}

// Exponentials of `seen` scores above their largest, then zeros up to `count`; gives one over
// their sum.
float soften(float* scores, std::size_t seen, std::size_t count) {
    const std::size_t whole = seen / kLanes * kLanes;
    const __mmask16 some = static_cast<__mmask16>((1u << (seen - whole)) - 1);
    const __m512 unseen = _mm512_set1_ps(kUnseen);
    __m512 top = _mm512_mask_loadu_ps(unseen, some, scores + whole);
    for (std::size_t i = 0; i < whole; i += kLanes)
        top = _mm512_max_ps(top, _mm512_loadu_ps(scores + i));
    const __m512 largest = _mm512_set1_ps(_mm512_reduce_max_ps(top));
    __m512 sum = _mm512_setzero_ps();
    for (std::size_t i = 0; i < whole; i += kLanes) {
        const __m512 value = exponential(_mm512_sub_ps(_mm512_loadu_ps(scores + i), largest));
        _mm512_storeu_ps(scores + i, value);
        sum = _mm512_add_ps(sum, value);
    }
    if (whole < count) {
        const __m512 rest = _mm512_mask_loadu_ps(unseen, some, scores + whole);
        const __m512 value = _mm512_maskz_mov_ps(some, exponential(_mm512_sub_ps(rest, largest)));
        _mm512_storeu_ps(scores + whole, value);
        sum = _mm512_add_ps(sum, value);
    }
    for (std::size_t i = whole + kLanes; i < count; i += kLanes)
        _mm512_storeu_ps(scores + i, _mm512_setzero_ps());
    return 1.0f / _mm512_reduce_add_ps(sum);
}

struct Attending {
    std::size_t width;                     // of a head
    std::size_t prefix_steps, count;       // keys before the first query, all keys
    const float *keys, *values;            // in panels
    const float* queries;                  // of the first query of the tile
    std::size_t first, stride;             // first query's step; from one query to the next
    float* scores;                         // kTile rows of all keys, padded
    float* out;                            // of the first query

    template <std::size_t ROWS>
    void operator()() const {
        const std::size_t visible = prefix_steps + first + ROWS;
        const std::size_t padded = rounded_up(count, kPanel);
        for (std::size_t panel = 0; panel * kPanel < visible; ++panel) {
            Pair sums[ROWS];
            multiply<ROWS>(queries, stride, keys + panel * kPanel * width, width, sums);
            for (std::size_t r = 0; r < ROWS; ++r) {
                float* const at = scores + r * padded + panel * kPanel;
                _mm512_storeu_ps(at, sums[r].low);
                _mm512_storeu_ps(at + kLanes, sums[r].high);
            }
        }
        float share[ROWS];
        for (std::size_t r = 0; r < ROWS; ++r)
            share[r] = soften(scores + r * padded, visible - ROWS + r + 1,
                              rounded_up(visible, kLanes));
        for (std::size_t channel = 0; channel < width; channel += kPanel) {
            Pair sums[ROWS];
            multiply<ROWS>(scores, padded, values + channel * count, visible, sums);
            for (std::size_t r = 0; r < ROWS; ++r) {
                const __m512 factor = _mm512_set1_ps(share[r]);
                float* const at = out + r * stride + channel;
                _mm512_storeu_ps(at, _mm512_mul_ps(sums[r].low, factor));
                _mm512_storeu_ps(at + kLanes, _mm512_mul_ps(sums[r].high, factor));
            }
        }
    }
};

// ---- a row -------------------------------------------------------------------------------------

// Hands out parts of a scratch, each beginning on a cache line.
struct Arena {
    float* next;

    float* take(std::size_t floats) {
        float* const part = next;
        next += rounded_up(floats, kLanes);
        return part;
    }
};

struct Work {
    float *hidden, *cosines, *sines, *queries, *keys, *values, *packed_keys, *packed_values,
        *scores;
    Input normed, attended, gated;

    Work(const Model& model, std::size_t steps, std::size_t prefix_steps, Arena arena) {
        const std::size_t seen = rounded_up(prefix_steps + steps, kPanel);
        hidden = arena.take(steps * model.width);
        cosines = arena.take(steps * model.head_width / 2);
        sines = arena.take(steps * model.head_width / 2);
        queries = arena.take(steps * model.queries());
        keys = arena.take(steps * model.keys());
        values = arena.take(steps * model.keys());
        packed_keys = arena.take(seen * model.head_width);
        packed_values = arena.take(seen * model.head_width);
        scores = arena.take(kTile * seen);
        normed = input(arena, steps, model.width);
        attended = input(arena, steps, model.queries());
        gated = input(arena, steps, model.inner);
        end = arena.next;
    }

    float* end;

  private:
    static Input input(Arena& arena, std::size_t rows, std::size_t width) {
        float* const floats = arena.take(rows * width);
        return {floats, reinterpret_cast<std::uint8_t*>(arena.take(rows * width / 4)), width};
    }
};

// Gives a linear layer its input in bytes, where it wants bytes.
void prepare(const Linear& reader, const Input& input, std::size_t rows) {
    if (reader.bytes) to_bytes(input.floats, input.bytes, rows * input.width, reader);
}

void mlp(const Model& model, const Layer& layer, std::size_t rows, const Work& work,
         float* hidden) {
    normalise(model, hidden, layer.mlp_norm, rows, work.normed.floats);
    prepare(layer.gate_up, work.normed, rows);
    const Input gated = work.gated;
    const Linear& down = layer.down;
    product(layer.gate_up, work.normed, rows,
            [&](std::size_t row, std::size_t panel, const Pair& made) {
                const __m512 value = _mm512_mul_ps(silu(made.low), made.high);
                const std::size_t at = row * gated.width + panel * kLanes;
                if (down.bytes) store_bytes(gated.bytes + at, value, down);
                else _mm512_storeu_ps(gated.floats + at, value);
            });
    added(down, gated, rows, hidden, model.width);
}

// Mixes values for the queries from step `first` on.
void attend(const Model& model, const Row& row, std::size_t layer, std::size_t first,
            const Work& work) {
    const std::size_t d = model.head_width, head_floats = row.prefix_capacity * d;
    for (std::size_t head = 0; head < model.kv_heads; ++head) {
        const float* const prefix =
            row.prefix + (2 * layer * model.kv_heads + head) * head_floats;
        const Seen keys{prefix, row.prefix_steps, work.keys + head * d, model.keys(), row.steps};
        const Seen values{prefix + model.kv_heads * head_floats, row.prefix_steps,
                          work.values + head * d, model.keys(), row.steps};
        pack_keys(keys, d, work.packed_keys);
        pack_values(values, d, work.packed_values);
        for (std::size_t g = 0; g < model.group; ++g)
            for (std::size_t step = first; step < row.steps; step += kTile) {
                const std::size_t at =
                    step * model.queries() + (head * model.group + g) * d;
                with_rows(least(kTile, row.steps - step),
                          Attending{d, row.prefix_steps, keys.count(), work.packed_keys,
                                    work.packed_values, work.queries + at, step,
                                    model.queries(), work.scores, work.attended.floats + at});
            }
    }
}

// Lays what all heads made of a token side by side head by head; gives the end of what it wrote.
float* keep(const Model& model, std::size_t steps, const float* made, float* out) {
    const std::size_t d = model.head_width;
    for (std::size_t head = 0; head < model.kv_heads; ++head)
        for (std::size_t step = 0; step < steps; ++step, out += d)
            std::memcpy(out, made + step * model.keys() + head * d, d * sizeof(float));
    return out;
}

void turn_tables(const Model& model, const Rotary& rotary, const Row& row, const Work& work) {
    const std::size_t half = model.head_width / 2;
    for (std::size_t step = 0; step < row.steps; ++step)
        for (std::size_t i = 0; i < half; ++i) {
            const auto position = static_cast<std::size_t>(row.positions[model.axes[i]][step]);
            work.cosines[step * half + i] = rotary.cosines[position * half + i];
            work.sines[step * half + i] = rotary.sines[position * half + i];
        }
}

}  // namespace

std::size_t row_scratch(const Model& model, std::size_t steps, std::size_t prefix_steps) {
    float* const nothing = nullptr;
    return static_cast<std::size_t>(Work(model, steps, prefix_steps, Arena{nothing}).end - nothing);
}

void attend_avx512(const Model& model, const Rotary& rotary, const Row& row, float* scratch,
                   float* hidden, float* attended, float* kept) {
    const Work work(model, row.steps, row.prefix_steps, Arena{scratch});
    const std::size_t heads = model.kv_heads * model.group, half = model.head_width / 2;
    const __m512 width = _mm512_set1_ps(static_cast<float>(model.head_width));
    const float root = _mm512_cvtss_f32(_mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_sqrt_ps(width)));
    std::memcpy(work.hidden, row.embeds, row.steps * model.width * sizeof(float));
    turn_tables(model, rotary, row, work);
    for (std::size_t index = 0; index < model.layer_count; ++index) {
        const Layer& layer = model.layers[index];
        const bool last = index + 1 == model.layer_count;
        const std::size_t first = last ? row.steps - 1 : 0, wanted = row.steps - first;
        normalise(model, work.hidden, layer.attention_norm, row.steps, work.normed.floats);
        // Layers that want bytes want the same ones: an activation has one range.
        const Linear* const readers[] = {&layer.query, &layer.key, &layer.value};
        for (const Linear* const reader : readers)
            if (reader->bytes) {
                prepare(*reader, work.normed, row.steps);
                break;
            }
        stored(layer.key, work.normed, row.steps, work.keys, model.keys());
        stored(layer.value, work.normed, row.steps, work.values, model.keys());
        rotate(model, work.cosines, work.sines, row.steps, model.kv_heads, 1.0f, work.keys);
        if (kept) {
            kept = keep(model, row.steps, work.keys, kept);
            kept = keep(model, row.steps, work.values, kept);
            if (last) return;
        }
        stored(layer.query, work.normed.from(first), wanted,
               work.queries + first * model.queries(), model.queries());
        rotate(model, work.cosines + first * half, work.sines + first * half, wanted, heads, root,
               work.queries + first * model.queries());
        attend(model, row, index, first, work);
        if (last) break;
        prepare(layer.mix, work.attended, row.steps);
        added(layer.mix, work.attended, row.steps, work.hidden, model.width);
        mlp(model, layer, row.steps, work, work.hidden);
    }
    const std::size_t end = row.steps - 1;
    std::memcpy(hidden, work.hidden + end * model.width, model.width * sizeof(float));
    std::memcpy(attended, work.attended.floats + end * model.queries(),
                model.queries() * sizeof(float));
}

void finish_avx512(const Model& model, std::size_t rows, const float* attended, float* scratch,
                   float* hidden) {
    const Work work(model, rows, 0, Arena{scratch});
    const Layer& layer = model.layers[model.layer_count - 1];
    std::memcpy(work.attended.floats, attended, rows * model.queries() * sizeof(float));
    prepare(layer.mix, work.attended, rows);
    added(layer.mix, work.attended, rows, hidden, model.width);
    mlp(model, layer, rows, work, hidden);
    normalise(model, hidden, model.last_norm, rows, hidden);
}

}  // namespace meiqa
