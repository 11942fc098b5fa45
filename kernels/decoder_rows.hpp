// A row of the decoder, written in the sixteen lanes of lanes_avx512.hpp, or in those of
// lanes_vector.hpp with a kernel's own products of codes. Who includes this has included them.
//
// Everything between two products happens on the way: a product's tile is turned to floats, biased,
// gated and rounded before it leaves the registers. All sums run over their inputs in order, however
// many rows a tile has: a row's result depends on nothing but the row. Who shares its work, panel by
// panel and head by head, takes no part in any sum.

#pragma once

#include <type_traits>

namespace meiqa {
namespace {

constexpr float kUnseen = -1e30f;
// Weights that stay in a core's cache beside what else is there, tiles of rows that do, and parts of a
// product for each of a crew.
constexpr std::size_t kCacheBytes = 512 << 10, kManyTiles = 8, kPartsEach = 4;
// Multiplications that are worth sharing. To read a weight takes as long as ten of bytes.
constexpr std::size_t kWorth = 4 << 20, kReading = 10;
// The same of one in floats, and of what is done to a value between products.
constexpr std::size_t kInFloats = 4, kBetween = 32;
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
template <std::size_t ROWS, class Value>
void layer_of(const Linear& w, const Value* a, const float*, std::size_t stride, std::size_t panel,
              Pair (&made)[ROWS]) {
    const std::size_t at = panel * kPanel;
    if constexpr (!std::is_same_v<Value, float>) {
        const auto* const weights = static_cast<const Value*>(w.weights) + at * w.inputs;
        multiply<ROWS>(a, stride, weights, w.inputs, made);
    } else if (w.blocks) {
        const auto* const weights = static_cast<const std::int8_t*>(w.weights) + at * w.inputs;
        const float* const steps = w.blocks + at * (w.inputs / kBlock);
        multiply_blocks<ROWS>(a, stride, weights, steps, w.inputs, made);
    } else if (w.halves) {
        const auto* const weights = static_cast<const Half*>(w.weights) + at * w.inputs;
        multiply_halves<ROWS>(a, stride, weights, w.inputs, made);
    } else {
        const float* const weights = static_cast<const float*>(w.weights) + at * w.inputs;
        multiply<ROWS>(a, stride, weights, w.inputs, made);
    }
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

// What a linear layer may be given: rows of `width` values as floats, factors or rounded.
struct Input {
    float* floats;
    Factor* factors;
    Code* codes;
    float* step;  // value of a row's codes, where each has its own
    std::size_t width;

    Input from(std::size_t row) const {
        const std::size_t at = row * width;
        return {floats + at, factors + at, codes + at, step + row, width};
    }
};

// Panels from `first` to `end`. A tile of rows stays in the first cache while it meets all of them,
// unless they are more than a core's cache holds: then many rows meet a panel before the next one
// comes, so that it is read once for all of them.
template <class Value, class Take>
void product_of(const Linear& w, const Value* a, const Input& input, std::size_t rows,
                std::size_t first, std::size_t end, const Take& take) {
    const std::size_t bytes = (end - first) * kPanel * w.inputs * sizeof(Value);
    const std::size_t together = bytes > kCacheBytes ? kManyTiles * kTile : kTile;
    for (std::size_t group = 0; group < rows; group += together)
        for (std::size_t panel = first; panel < end; ++panel)
            for (std::size_t row = group; row < least(rows, group + together); row += kTile)
                with_rows(least(kTile, rows - row),
                          Tile<Value, Take>{w, a, input.step, input.width, row, panel, take});
}

// The crew where so many multiplications take some 20 µs, else nobody but the caller: others would
// come too late.
Crew worth(const Crew& crew, std::size_t multiplications) {
    return multiplications < kWorth ? Crew{} : crew;
}

template <class Take>
void product(const Crew& all, const Linear& w, const Input& input, std::size_t rows,
             const Take& take) {
    const Crew crew = worth(all, w.panels * kPanel * w.inputs * (rows + kReading));
    const std::size_t parts = least(w.panels, crew.size == 1 ? 1 : kPartsEach * crew.size);
    shared(crew, parts, [&](std::size_t part, std::size_t) {
        const std::size_t first = part * w.panels / parts, end = (part + 1) * w.panels / parts;
        if (rounds(w)) product_of(w, input.codes, input, rows, first, end, take);
        else if (w.in_bf16) product_of(w, input.factors, input, rows, first, end, take);
        else product_of(w, input.floats, input, rows, first, end, take);
    });
}

void stored(const Crew& crew, const Linear& w, const Input& input, std::size_t rows, float* out,
            std::size_t width) {
    product(crew, w, input, rows, [=](std::size_t row, std::size_t panel, const Pair& made) {
        float* const at = out + row * width + panel * kPanel;
        store(at, made.low);
        store(at + kLanes, made.high);
    });
}

void added(const Crew& crew, const Linear& w, const Input& input, std::size_t rows, float* out,
           std::size_t width) {
    product(crew, w, input, rows, [=](std::size_t row, std::size_t panel, const Pair& made) {
        float* const at = out + row * width + panel * kPanel;
        store(at, load(at) + made.low);
        store(at + kLanes, load(at + kLanes) + made.high);
    });
}

// Calls work(first, count) for groups of rows of that width.
template <class Work>
void by_rows(const Crew& all, std::size_t rows, std::size_t width, const Work& work) {
    const Crew crew = worth(all, rows * width * kBetween);
    const std::size_t together = crew.size == 1 ? rows : kTile;
    shared(crew, (rows + together - 1) / together, [&](std::size_t group, std::size_t) {
        work(group * together, least(together, rows - group * together));
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

// Keys or values of one head: those of the prefix, those written behind it, then the row's own.
struct Seen {
    const float *prefix, *past, *own;
    std::size_t prefix_steps, past_steps, steps, own_stride;

    std::size_t count() const { return prefix_steps + past_steps + steps; }

    const float* at(std::size_t index, std::size_t width) const {
        if (index < prefix_steps) return prefix + index * width;
        index -= prefix_steps;
        return index < past_steps ? past + index * width : own + (index - past_steps) * own_stride;
    }
};

// Panels of 32 keys, channel after channel, or as many of them as lie side by side. The last key fills
// its half of a panel; what lies behind is not set, and its scores are not read.
void pack_keys(const Seen& seen, std::size_t width, Factor* out) {
    for (std::size_t first = 0; first < seen.count(); first += kLanes) {
        const float* rows[kLanes];
        for (std::size_t i = 0; i < kLanes; ++i)
            rows[i] = seen.at(least(first + i, seen.count() - 1), width);
        Factor* const panel = out + first / kPanel * kPanel * width + first % kPanel * kSideBySide;
        for (std::size_t channel = 0; channel < width; channel += kLanes * kSideBySide) {
            transpose(rows, reinterpret_cast<float*>(panel + channel * kPanel), kPanel);
            for (auto& row : rows) row += kLanes * kSideBySide;
        }
    }
}

// Panels of 32 channels, value after value, or as many of them as lie side by side. A last one that has
// nobody beside it is there twice: it is multiplied with zero.
void pack_values(const Seen& seen, std::size_t width, Factor* out) {
    const std::size_t count = rounded_up(seen.count(), kSideBySide);
    for (std::size_t index = 0; index < count; index += kSideBySide) {
        const float* const one = seen.at(index, width);
        const float* const other = seen.at(least(index + 1, seen.count() - 1), width);
        for (std::size_t channel = 0; channel < width; channel += kLanes)
            store_both(out + channel / kPanel * kPanel * count + index * kPanel +
                           channel % kPanel * kSideBySide,
                       one + channel, other + channel);
    }
}

// Makes rows of floats factors, each where it lies.
void make_factors(float* rows, std::size_t count, std::size_t width) {
    if constexpr (kSideBySide > 1)
        for (std::size_t row = 0; row < count; ++row, rows += width)
            for (std::size_t i = 0; i < width; i += kLanes)
                store_factors(reinterpret_cast<Factor*>(rows) + i, load(rows + i));
}

// Exponentials of `seen` scores above their largest, then zeros up to `count`, as factors that begin
// where the scores do; gives one over their sum.
float soften(float* scores, std::size_t seen, std::size_t count) {
    const std::size_t whole = seen / kLanes * kLanes, some = seen - whole;
    Lanes top = load_some(scores + whole, some, kUnseen);
    for (std::size_t i = 0; i < whole; i += kLanes) top = larger(top, load(scores + i));
    const Lanes largest = all(largest_of(top));
    Lanes sum = all(0.0f);
    Factor* const out = reinterpret_cast<Factor*>(scores);
    for (std::size_t i = 0; i < whole; i += kLanes) {
        const Lanes value = exponential(load(scores + i) - largest);
        store_factors(out + i, value);
        sum = sum + value;
    }
    if (whole < count) {
        const Lanes rest = load_some(scores + whole, some, kUnseen);
        const Lanes value = only_first(exponential(rest - largest), some);
        store_factors(out + whole, value);
        sum = sum + value;
    }
    for (std::size_t i = whole + kLanes; i < count; i += kLanes) store_factors(out + i, all(0.0f));
    return 1.0f / sum_of(sum);
}

struct Attending {
    std::size_t width;                     // of a head
    std::size_t count;                     // all keys
    const Factor *keys, *values;           // in panels
    const Factor* queries;                 // of the first query of the tile
    std::size_t seen, more;                // keys that it sees, and that each next one sees more
    float* scores;                         // kTile rows of all keys, padded
    float* out;                            // of the first query
    std::size_t stride;                    // from there to that of the next

    template <std::size_t ROWS>
    void operator()() const {
        const std::size_t visible = seen + (ROWS - 1) * more;
        const std::size_t padded = rounded_up(count, kPanel);
        // Rows of factors begin where rows of floats did.
        const std::size_t apart = more ? stride * kSideBySide : stride;
        for (std::size_t panel = 0; panel * kPanel < visible; ++panel) {
            Pair sums[ROWS];
            multiply<ROWS>(queries, apart, keys + panel * kPanel * width, width, sums);
            for (std::size_t r = 0; r < ROWS; ++r) {
                float* const at = scores + r * padded + panel * kPanel;
                store(at, sums[r].low);
                store(at + kLanes, sums[r].high);
            }
        }
        float share[ROWS];
        for (std::size_t r = 0; r < ROWS; ++r)
            share[r] = soften(scores + r * padded, seen + r * more, rounded_up(visible, kLanes));
        const auto* const shares = reinterpret_cast<const Factor*>(scores);
        for (std::size_t channel = 0; channel < width; channel += kPanel) {
            Pair sums[ROWS];
            multiply<ROWS>(shares, padded * kSideBySide,
                           values + channel * rounded_up(count, kSideBySide), visible, sums);
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
    float *hidden, *cosines, *sines, *queries, *keys, *values;
    Factor *packed_keys, *packed_values;  // of a head at a time, or of all heads where a crew shares
    float* scores;                        // of each of a crew
    std::size_t packed, score_floats;     // factors of a head
    Input normed, attended, gated;

    Work(const Model& model, const Crew& crew, std::size_t steps, std::size_t before, Arena arena) {
        const std::size_t seen = rounded_up(before + steps, kPanel);
        packed = seen * model.head_width;
        score_floats = kTile * seen;
        hidden = arena.take(steps * model.width);
        cosines = arena.take(steps * model.head_width / 2);
        sines = arena.take(steps * model.head_width / 2);
        queries = arena.take(steps * query_width(model));
        keys = arena.take(steps * key_width(model));
        values = arena.take(steps * key_width(model));
        const std::size_t heads = crew.size == 1 ? 1 : model.kv_heads;
        packed_keys = reinterpret_cast<Factor*>(arena.take(heads * packed / kSideBySide));
        packed_values = reinterpret_cast<Factor*>(arena.take(heads * packed / kSideBySide));
        scores = arena.take(crew.size * score_floats);
        normed = input(arena, steps, model.width);
        attended = input(arena, steps, query_width(model));
        gated = input(arena, steps, model.inner);
        floats = arena.used;
    }

    std::size_t floats;

  private:
    static Input input(Arena& arena, std::size_t rows, std::size_t width) {
        float* const floats = arena.take(rows * width);
        float* const factors = kSideBySide == 1 ? floats : arena.take(rows * width / kSideBySide);
        float* const codes = arena.take(rows * width * sizeof(Code) / sizeof(float));
        return {floats, reinterpret_cast<Factor*>(factors), reinterpret_cast<Code*>(codes),
                arena.take(rows), width};
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

// Gives a linear layer values of its input as it wants them, if it needs no other of the row for it.
MEIQA_INLINE void put(Lanes x, const Input& input, std::size_t at, const Linear& reader) {
    if (rounds(reader)) round_to_codes(x, input.codes + at, reader);
    else if (reader.in_bf16) store_factors(input.factors + at, x);
    else store(input.floats + at, x);
}

// Gives a linear layer its input as it wants it.
void prepare(const Linear& reader, const Input& input, std::size_t rows) {
    if (takes_floats(reader)) return;
    if (each_row_by_itself(reader)) {
        for (std::size_t row = 0; row < rows; ++row) {
            const Input own = input.from(row);
            *own.step = round_by_itself(own.floats, own.width, own.codes);
        }
        return;
    }
    for (std::size_t i = 0; i < rows * input.width; i += kLanes)
        put(load(input.floats + i), input, i, reader);
}

// Normalises rows and gives a linear layer its input of them.
void norm_for(const Model& model, const Crew& crew, const float* x, const float* weight,
              const Linear& reader, std::size_t rows, const Input& out) {
    by_rows(crew, rows, model.width, [&](std::size_t first, std::size_t count) {
        const Input part = out.from(first);
        normalise(model, x + first * model.width, weight, count, part.floats);
        prepare(reader, part, count);
    });
}

void prepare_all(const Crew& crew, const Linear& reader, const Input& input, std::size_t rows) {
    if (!takes_floats(reader))
        by_rows(crew, rows, input.width, [&](std::size_t first, std::size_t count) {
            prepare(reader, input.from(first), count);
        });
}

void mlp(const Model& model, const Crew& crew, const Layer& layer, std::size_t rows,
         const Work& work, float* hidden) {
    norm_for(model, crew, hidden, layer.mlp_norm, layer.gate_up, rows, work.normed);
    const Input gated = work.gated;
    const Linear& down = layer.down;
    const bool later = each_row_by_itself(down);
    product(crew, layer.gate_up, work.normed, rows,
            [&](std::size_t row, std::size_t panel, const Pair& made) {
                const Lanes value = silu(made.low) * made.high;
                const std::size_t at = row * gated.width + panel * kLanes;
                if (later) store(gated.floats + at, value);
                else put(value, gated, at, down);
            });
    if (later) prepare_all(crew, down, gated, rows);
    added(crew, down, gated, rows, hidden, model.width);
}

// What of attention is shared: the keys and values of a head, and the queries that read them.
struct Heads {
    const Model& model;
    const Row& row;
    const Work& work;
    std::size_t layer, first;  // the step of the first query

    std::size_t before() const { return row.prefix.steps + row.past.steps; }

    // Of one head, keys (0) or values (1).
    Seen seen(std::size_t head, std::size_t which, const float* own) const {
        const std::size_t at = (2 * layer + which) * model.kv_heads + head, d = model.head_width;
        return {row.prefix.array + at * row.prefix.capacity * d,
                row.past.array + at * row.past.capacity * d,
                own + head * d, row.prefix.steps, row.past.steps, row.steps, key_width(model)};
    }

    void pack(std::size_t head, std::size_t place) const {
        const std::size_t at = place * work.packed;
        pack_keys(seen(head, 0, work.keys), model.head_width, work.packed_keys + at);
        pack_values(seen(head, 1, work.values), model.head_width, work.packed_values + at);
    }

    // Mixes values for queries of one head, by what was packed in that place: those of its group from
    // `g` to `end`. Of a single token all of them are a tile, and of several each one's tokens.
    void mix(std::size_t head, std::size_t g, std::size_t end, std::size_t place,
             std::size_t worker) const {
        const std::size_t d = model.head_width, row_stride = query_width(model);
        const std::size_t count = before() + row.steps, packed = place * work.packed;
        const auto* const queries = reinterpret_cast<const Factor*>(work.queries);
        const auto tile = [&](std::size_t rows, std::size_t step, std::size_t query,
                              std::size_t more, std::size_t stride) {
            const std::size_t begin = step * row_stride, at = (head * model.group + query) * d;
            with_rows(rows, Attending{d, count, work.packed_keys + packed,
                                      work.packed_values + packed, queries + begin * kSideBySide + at,
                                      before() + step + 1, more,
                                      work.scores + worker * work.score_floats,
                                      work.attended.floats + begin + at, stride});
        };
        if (row.steps - first == 1) {
            for (; g < end; g += kTile) tile(least(kTile, end - g), first, g, 0, d);
            return;
        }
        for (; g < end; ++g)
            for (std::size_t step = first; step < row.steps; step += kTile)
                tile(least(kTile, row.steps - step), step, g, 1, row_stride);
    }
};

void attend(const Crew& all, const Heads& heads) {
    const std::size_t group = heads.model.group, count = heads.model.kv_heads;
    const std::size_t steps = heads.row.steps - heads.first, seen = heads.before() + heads.row.steps;
    const std::size_t multiplications = 2 * seen * steps * query_width(heads.model);
    const std::size_t packed = 2 * seen * key_width(heads.model);
    const Crew crew = worth(all, multiplications * kInFloats + packed * kBetween);
    if (crew.size == 1) {
        for (std::size_t head = 0; head < count; ++head) {
            heads.pack(head, 0);
            heads.mix(head, 0, group, 0, 0);
        }
        return;
    }
    shared(crew, count, [&](std::size_t head, std::size_t) { heads.pack(head, head); });
    const std::size_t parts = least(group, (crew.size + count - 1) / count);
    shared(crew, count * parts, [&](std::size_t task, std::size_t worker) {
        const std::size_t head = task / parts, part = task % parts;
        heads.mix(head, part * group / parts, (part + 1) * group / parts, head, worker);
    });
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

// Of the layers that read a normed row, one that wants something else than floats, if any does: all
// such want it alike, as an activation has one range.
const Linear& particular(const Layer& layer) {
    if (!takes_floats(layer.query)) return layer.query;
    return takes_floats(layer.key) ? layer.value : layer.key;
}

std::size_t row_scratch(const Model& model, const Crew& crew, std::size_t steps,
                        std::size_t before) {
    return Work(model, crew, steps, before, Arena{nullptr}).floats;
}

void run_row(const Model& model, const Crew& crew, const Rotary& rotary, const Row& row,
             float* scratch, const Wanted& wanted) {
    const Work work(model, crew, row.steps, row.prefix.steps + row.past.steps, Arena{scratch});
    const std::size_t heads = model.kv_heads * model.group, half = model.head_width / 2;
    const float scale = 1.0f / root(static_cast<float>(model.head_width));
    float* kept = wanted.kept;
    std::memcpy(work.hidden, row.embeds, row.steps * model.width * sizeof(float));
    turn_tables(model, rotary, row, work);
    for (std::size_t index = 0; index < model.layer_count; ++index) {
        const Layer& layer = model.layers[index];
        const bool last = index + 1 == model.layer_count;
        const std::size_t first = last && wanted.attended ? row.steps - 1 : 0;
        norm_for(model, crew, work.hidden, layer.attention_norm, particular(layer), row.steps,
                 work.normed);
        stored(crew, layer.key, work.normed, row.steps, work.keys, key_width(model));
        stored(crew, layer.value, work.normed, row.steps, work.values, key_width(model));
        by_rows(crew, row.steps, key_width(model), [&](std::size_t from, std::size_t count) {
            rotate(model, work.cosines + from * half, work.sines + from * half, count,
                   model.kv_heads, 1.0f, work.keys + from * key_width(model));
        });
        if (kept) {
            kept = keep(model, row.steps, work.keys, kept);
            kept = keep(model, row.steps, work.values, kept);
            if (last && !wanted.hidden) return;
        }
        stored(crew, layer.query, work.normed.from(first), row.steps - first,
               work.queries + first * query_width(model), query_width(model));
        by_rows(crew, row.steps - first, query_width(model), [&](std::size_t from,
                                                                 std::size_t count) {
            from += first;
            float* const queries = work.queries + from * query_width(model);
            rotate(model, work.cosines + from * half, work.sines + from * half, count, heads,
                   scale, queries);
            make_factors(queries, count, query_width(model));
        });
        attend(crew, {model, row, work, index, first});
        if (last && wanted.attended) break;
        prepare_all(crew, layer.mix, work.attended, row.steps);
        added(crew, layer.mix, work.attended, row.steps, work.hidden, model.width);
        mlp(model, crew, layer, row.steps, work, work.hidden);
    }
    if (!wanted.attended) {
        normalise(model, work.hidden, model.last_norm, row.steps, wanted.hidden);
        return;
    }
    const std::size_t end = row.steps - 1;
    std::memcpy(wanted.hidden, work.hidden + end * model.width, model.width * sizeof(float));
    std::memcpy(wanted.attended, work.attended.floats + end * query_width(model),
                query_width(model) * sizeof(float));
}

void finish_rows(const Model& model, const Crew& crew, std::size_t rows, const float* attended,
                 float* scratch, float* hidden) {
    const Work work(model, crew, rows, 0, Arena{scratch});
    const Layer& layer = model.layers[model.layer_count - 1];
    std::memcpy(work.attended.floats, attended, rows * query_width(model) * sizeof(float));
    prepare_all(crew, layer.mix, work.attended, rows);
    added(crew, layer.mix, work.attended, rows, hidden, model.width);
    mlp(model, crew, layer, rows, work, hidden);
    normalise(model, hidden, model.last_norm, rows, hidden);
}

void multiply_rows(const Linear& w, const Crew& crew, std::size_t rows, const float* a,
                   float* out) {
    const Input input{const_cast<float*>(a), nullptr, nullptr, nullptr, w.inputs};
    stored(crew, w, input, rows, out, w.panels * kPanel);
}

}  // namespace
}  // namespace meiqa
