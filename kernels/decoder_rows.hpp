// A row of the decoder, written in the sixteen lanes of lanes_avx512.hpp, or in those of
// lanes_vector.hpp with a kernel's own products of codes. Who includes this has included them.
//
// Everything between two products happens on the way: a product's tile is turned to floats, biased,
// gated and rounded before it leaves the registers. All sums run over their inputs in order, however
// many rows a tile has: a row's result depends on nothing but the row.

#pragma once

namespace meiqa {
namespace {

constexpr float kUnseen = -1e30f;
// A row's largest value, and the largest code, where each row is rounded by itself.
constexpr float kLeastLargest = 1e-30f, kLargestCode = 127.0f;

// No call into a library: what the linker shares must not be of one processor's instructions.
inline float root(float x) { return __builtin_sqrtf(x); }

std::size_t rounded_up(std::size_t count, std::size_t step) {
    return (count + step - 1) / step * step;
}

std::size_t least(std::size_t a, std::size_t b) { return a < b ? a : b; }

// ---- products ----------------------------------------------------------------------------------

// What a panel of a linear layer makes of rows.
template <std::size_t ROWS>
void layer_of(const Linear& w, const float* a, const float*, std::size_t stride, std::size_t panel,
              Pair (&made)[ROWS]) {
    const std::size_t at = panel * kPanel;
    const float* const weights = static_cast<const float*>(w.weights) + at * w.inputs;
    multiply<ROWS>(a, stride, weights, w.inputs, made);
    const Lanes low = load(w.bias + at), high = load(w.bias + at + kLanes);
    for (std::size_t r = 0; r < ROWS; ++r) made[r] = {made[r].low + low, made[r].high + high};
}

template <std::size_t ROWS>
void layer_of(const Linear& w, const Code* a, const float* step, std::size_t stride,
              std::size_t panel, Pair (&made)[ROWS]) {
    const bool own_step = each_row_by_itself(w);
    const Weight* const weights =
        static_cast<const Weight*>(w.weights) + panel * kPanel * w.inputs;
    for (std::size_t half = 0; half < kPanel / kLanes; half += kHalves) {
        Ints sums[ROWS][kHalves];
        multiply_codes<ROWS>(a, stride, weights + half * kLanes * kTogether, w.inputs, sums);
        for (std::size_t h = half; h < half + kHalves; ++h) {
            const std::size_t at = panel * kPanel + h * kLanes;
            const Lanes scale = load(w.scale + at), bias = load(w.bias + at);
            for (std::size_t r = 0; r < ROWS; ++r) {
                const Lanes sum = floats_of(sums[r][h - half], w.start + at);
                const Lanes by = own_step ? scale * all(step[r]) : scale;
                (h == 0 ? made[r].low : made[r].high) = fused(sum, by, bias);
            }
        }
    }
}

// Calls run.operator()<ROWS>() with a number of rows that is only known now.
template <class Run, std::size_t ROWS = kTile>
inline void with_rows(std::size_t rows, const Run& run) {
    if (rows == ROWS) run.template operator()<ROWS>();
    else if constexpr (ROWS > 1) with_rows<Run, ROWS - 1>(rows, run);
}

// Calls take(row, panel, made) for a tile of rows and one panel.
template <class Value, class Take>
struct Tile {
    const Linear& w;
    const Value* a;
    const float* step;  // of each row's codes, where they have their own
    std::size_t stride, first, panel;
    const Take& take;

    template <std::size_t ROWS>
    void operator()() const {
        Pair made[ROWS];
        layer_of<ROWS>(w, a + first * stride, step + first, stride, panel, made);
        for (std::size_t r = 0; r < ROWS; ++r) take(first + r, panel, made[r]);
    }
};

// What a linear layer may be given: rows of `width` values as floats or rounded.
struct Input {
    float* floats;
    Code* codes;
    float* step;  // value of a row's codes, where each has its own
    std::size_t width;

    Input from(std::size_t row) const {
        return {floats + row * width, codes + row * width, step + row, width};
    }
};

template <class Value, class Take>
void product_of(const Linear& w, const Value* a, const Input& input, std::size_t rows,
                const Take& take) {
    for (std::size_t first = 0; first < rows; first += kTile)
        for (std::size_t panel = 0; panel < w.panels; ++panel)
            with_rows(least(kTile, rows - first),
                      Tile<Value, Take>{w, a, input.step, input.width, first, panel, take});
}

template <class Take>
void product(const Linear& w, const Input& input, std::size_t rows, const Take& take) {
    if (rounds(w)) product_of(w, input.codes, input, rows, take);
    else product_of(w, input.floats, input, rows, take);
}

void stored(const Linear& w, const Input& input, std::size_t rows, float* out, std::size_t width) {
    product(w, input, rows, [=](std::size_t row, std::size_t panel, const Pair& made) {
        float* const at = out + row * width + panel * kPanel;
        store(at, made.low);
        store(at + kLanes, made.high);
    });
}

void added(const Linear& w, const Input& input, std::size_t rows, float* out, std::size_t width) {
    product(w, input, rows, [=](std::size_t row, std::size_t panel, const Pair& made) {
        float* const at = out + row * width + panel * kPanel;
        store(at, load(at) + made.low);
        store(at + kLanes, load(at + kLanes) + made.high);
    });
}

// ---- between products --------------------------------------------------------------------------

// Cephes' expf: the remainder of a division by ln 2 in a polynomial, the quotient as exponent.
MEIQA_INLINE Lanes exponential(Lanes x) {
    x = smaller(larger(x, all(-87.0f)), all(88.0f));
    const Lanes n = nearest_whole(x * all(1.44269504f));
    Lanes r = fused(n, all(-0.693359375f), x);
    r = fused(n, all(2.12194440e-4f), r);
    Lanes p = all(1.9875691500e-4f);
    p = fused(p, r, all(1.3981999507e-3f));
    p = fused(p, r, all(8.3334519073e-3f));
    p = fused(p, r, all(4.1665795894e-2f));
    p = fused(p, r, all(1.6666665459e-1f));
    p = fused(p, r, all(5.0000001201e-1f));
    return scaled(fused(p * r, r, r + all(1.0f)), n);
}

MEIQA_INLINE Lanes silu(Lanes x) {
    return x / (all(1.0f) + exponential(all(0.0f) - x));
}

// Rounds to the codes that a linear layer reads.
MEIQA_INLINE void round_to_codes(Lanes x, Code* out, const Linear& reader) {
    const Lanes least = all(-reader.zero), most = all(255.0f - reader.zero);
    const Lanes steps = nearest_whole(smaller(larger(x * all(reader.steps), least), most));
    store_codes(out, steps + all(reader.zero + kLowest));
}

void normalise(const Model& model, const float* x, const float* weight, std::size_t rows,
               float* out) {
    for (std::size_t row = 0; row < rows; ++row, x += model.width, out += model.width) {
        Lanes squares = all(0.0f);
        for (std::size_t i = 0; i < model.width; i += kLanes) {
            const Lanes value = load(x + i);
            squares = fused(value, value, squares);
        }
        const float mean = sum_of(squares) / static_cast<float>(model.width);
        const Lanes factor = all(1.0f / root(mean + model.epsilon));
        for (std::size_t i = 0; i < model.width; i += kLanes)
            store(out + i, load(weight + i) * (load(x + i) * factor));
    }
}

void rotate(const Model& model, const float* cosines, const float* sines, std::size_t steps,
            std::size_t heads, float factor, float* x) {
    const std::size_t half = model.head_width / 2;
    const Lanes scale = all(factor);
    for (std::size_t step = 0; step < steps; ++step, cosines += half, sines += half)
        for (std::size_t head = 0; head < heads; ++head, x += model.head_width)
            for (std::size_t i = 0; i < half; i += kLanes) {
                const Lanes low = load(x + i), high = load(x + half + i);
                const Lanes c = load(cosines + i) * scale;
                const Lanes s = load(sines + i) * scale;
                store(x + i, fused(low, c, all(0.0f) - high * s));
                store(x + half + i, fused(high, c, low * s));
            }
}

// ---- attention ---------------------------------------------------------------------------------

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

// Panels of 32 keys, channel after channel. The last key fills its half of a panel; what lies behind
// is not set, and its scores are not read.
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
    const std::size_t whole = seen / kLanes * kLanes, some = seen - whole;
    Lanes top = load_some(scores + whole, some, kUnseen);
    for (std::size_t i = 0; i < whole; i += kLanes) top = larger(top, load(scores + i));
    const Lanes largest = all(largest_of(top));
    Lanes sum = all(0.0f);
    for (std::size_t i = 0; i < whole; i += kLanes) {
        const Lanes value = exponential(load(scores + i) - largest);
        store(scores + i, value);
        sum = sum + value;
    }
    if (whole < count) {
        const Lanes rest = load_some(scores + whole, some, kUnseen);
        const Lanes value = only_first(exponential(rest - largest), some);
        store(scores + whole, value);
        sum = sum + value;
    }
    for (std::size_t i = whole + kLanes; i < count; i += kLanes) store(scores + i, all(0.0f));
    return 1.0f / sum_of(sum);
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
                store(at, sums[r].low);
                store(at + kLanes, sums[r].high);
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
                const Lanes factor = all(share[r]);
                float* const at = out + r * stride + channel;
                store(at, sums[r].low * factor);
                store(at + kLanes, sums[r].high * factor);
            }
        }
    }
};

// ---- a row -------------------------------------------------------------------------------------

// Hands out parts of a scratch, each beginning on a cache line; without one it only counts.
struct Arena {
    float* base;
    std::size_t used = 0;

    float* take(std::size_t floats) {
        float* const part = base ? base + used : nullptr;
        used += rounded_up(floats, kLanes);
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
        queries = arena.take(steps * query_width(model));
        keys = arena.take(steps * key_width(model));
        values = arena.take(steps * key_width(model));
        packed_keys = arena.take(seen * model.head_width);
        packed_values = arena.take(seen * model.head_width);
        scores = arena.take(kTile * seen);
        normed = input(arena, steps, model.width);
        attended = input(arena, steps, query_width(model));
        gated = input(arena, steps, model.inner);
        floats = arena.used;
    }

    std::size_t floats;

  private:
    static Input input(Arena& arena, std::size_t rows, std::size_t width) {
        float* const floats = arena.take(rows * width);
        float* const codes = arena.take(rows * width * sizeof(Code) / sizeof(float));
        return {floats, reinterpret_cast<Code*>(codes), arena.take(rows), width};
    }
};

// Rounds a row so that its largest value has the largest code; gives the value of a step.
float round_by_itself(const float* row, std::size_t width, Code* out) {
    Lanes top = all(kLeastLargest);
    for (std::size_t i = 0; i < width; i += kLanes) {
        const Lanes value = load(row + i);
        top = larger(top, larger(value, all(0.0f) - value));
    }
    const float largest = largest_of(top);
    const Lanes steps = all(kLargestCode / largest), zero = all(128.0f + kLowest);
    for (std::size_t i = 0; i < width; i += kLanes)
        store_codes(out + i, nearest_whole(load(row + i) * steps) + zero);
    return largest / kLargestCode;
}

// Gives a linear layer its input rounded, where it wants that.
void prepare(const Linear& reader, const Input& input, std::size_t rows) {
    if (!rounds(reader)) return;
    if (each_row_by_itself(reader)) {
        for (std::size_t row = 0; row < rows; ++row) {
            const Input own = input.from(row);
            *own.step = round_by_itself(own.floats, own.width, own.codes);
        }
        return;
    }
    for (std::size_t i = 0; i < rows * input.width; i += kLanes)
        round_to_codes(load(input.floats + i), input.codes + i, reader);
}

void mlp(const Model& model, const Layer& layer, std::size_t rows, const Work& work,
         float* hidden) {
    normalise(model, hidden, layer.mlp_norm, rows, work.normed.floats);
    prepare(layer.gate_up, work.normed, rows);
    const Input gated = work.gated;
    const Linear& down = layer.down;
    const bool at_once = rounds(down) && !each_row_by_itself(down);
    product(layer.gate_up, work.normed, rows,
            [&](std::size_t row, std::size_t panel, const Pair& made) {
                const Lanes value = silu(made.low) * made.high;
                const std::size_t at = row * gated.width + panel * kLanes;
                if (at_once) round_to_codes(value, gated.codes + at, down);
                else store(gated.floats + at, value);
            });
    if (!at_once) prepare(down, gated, rows);
    added(down, gated, rows, hidden, model.width);
}

// Mixes values for the queries from step `first` on.
void attend(const Model& model, const Row& row, std::size_t layer, std::size_t first,
            const Work& work) {
    const std::size_t d = model.head_width, head_floats = row.prefix_capacity * d;
    for (std::size_t head = 0; head < model.kv_heads; ++head) {
        const float* const prefix =
            row.prefix + (2 * layer * model.kv_heads + head) * head_floats;
        const Seen keys{prefix, row.prefix_steps, work.keys + head * d, key_width(model), row.steps};
        const Seen values{prefix + model.kv_heads * head_floats, row.prefix_steps,
                          work.values + head * d, key_width(model), row.steps};
        pack_keys(keys, d, work.packed_keys);
        pack_values(values, d, work.packed_values);
        for (std::size_t g = 0; g < model.group; ++g)
            for (std::size_t step = first; step < row.steps; step += kTile) {
                const std::size_t at =
                    step * query_width(model) + (head * model.group + g) * d;
                with_rows(least(kTile, row.steps - step),
                          Attending{d, row.prefix_steps, keys.count(), work.packed_keys,
                                    work.packed_values, work.queries + at, step,
                                    query_width(model), work.scores, work.attended.floats + at});
            }
    }
}

// Lays what all heads made of a token side by side head by head; gives the end of what it wrote.
float* keep(const Model& model, std::size_t steps, const float* made, float* out) {
    const std::size_t d = model.head_width;
    for (std::size_t head = 0; head < model.kv_heads; ++head)
        for (std::size_t step = 0; step < steps; ++step, out += d)
            std::memcpy(out, made + step * key_width(model) + head * d, d * sizeof(float));
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

std::size_t row_scratch(const Model& model, std::size_t steps, std::size_t prefix_steps) {
    return Work(model, steps, prefix_steps, Arena{nullptr}).floats;
}

void attend_row(const Model& model, const Rotary& rotary, const Row& row, float* scratch,
                float* hidden, float* attended, float* kept) {
    const Work work(model, row.steps, row.prefix_steps, Arena{scratch});
    const std::size_t heads = model.kv_heads * model.group, half = model.head_width / 2;
    const float scale = 1.0f / root(static_cast<float>(model.head_width));
    std::memcpy(work.hidden, row.embeds, row.steps * model.width * sizeof(float));
    turn_tables(model, rotary, row, work);
    for (std::size_t index = 0; index < model.layer_count; ++index) {
        const Layer& layer = model.layers[index];
        const bool last = index + 1 == model.layer_count;
        const std::size_t first = last ? row.steps - 1 : 0, wanted = row.steps - first;
        normalise(model, work.hidden, layer.attention_norm, row.steps, work.normed.floats);
        // Layers that want it rounded want it alike: an activation has one range.
        const Linear* const readers[] = {&layer.query, &layer.key, &layer.value};
        for (const Linear* const reader : readers)
            if (rounds(*reader)) {
                prepare(*reader, work.normed, row.steps);
                break;
            }
        stored(layer.key, work.normed, row.steps, work.keys, key_width(model));
        stored(layer.value, work.normed, row.steps, work.values, key_width(model));
        rotate(model, work.cosines, work.sines, row.steps, model.kv_heads, 1.0f, work.keys);
        if (kept) {
            kept = keep(model, row.steps, work.keys, kept);
            kept = keep(model, row.steps, work.values, kept);
            if (last) return;
        }
        stored(layer.query, work.normed.from(first), wanted,
               work.queries + first * query_width(model), query_width(model));
        rotate(model, work.cosines + first * half, work.sines + first * half, wanted, heads, scale,
               work.queries + first * query_width(model));
        attend(model, row, index, first, work);
        if (last) break;
        prepare(layer.mix, work.attended, row.steps);
        added(layer.mix, work.attended, row.steps, work.hidden, model.width);
        mlp(model, layer, row.steps, work, work.hidden);
    }
    const std::size_t end = row.steps - 1;
    std::memcpy(hidden, work.hidden + end * model.width, model.width * sizeof(float));
    std::memcpy(attended, work.attended.floats + end * query_width(model),
                query_width(model) * sizeof(float));
}

void finish_rows(const Model& model, std::size_t rows, const float* attended, float* scratch,
                 float* hidden) {
    const Work work(model, rows, 0, Arena{scratch});
    const Layer& layer = model.layers[model.layer_count - 1];
    std::memcpy(work.attended.floats, attended, rows * query_width(model) * sizeof(float));
    prepare(layer.mix, work.attended, rows);
    added(layer.mix, work.attended, rows, hidden, model.width);
    mlp(model, layer, rows, work, hidden);
    normalise(model, hidden, model.last_norm, rows, hidden);
}

}  // namespace
}  // namespace meiqa
