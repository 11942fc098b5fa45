// What the fused decoder's front (decoder.cpp) and its kernels (decoder_*.cpp) agree on.
//
// Widths of the weights are cut into panels of 32 columns, so that a tile of rows times a panel
// stays in the registers. Only plain data crosses: a kernel is compiled for other
// instructions than everything else, and nothing that both sides define may be shared by the linker.

#pragma once

#include "crew.hpp"

#include <cstddef>
#include <cstdint>

// Of what takes and gives registers: a call would pass them through memory.
#define MEIQA_INLINE inline __attribute__((always_inline))

namespace meiqa {

constexpr std::size_t kLanes = 16, kPanel = 2 * kLanes;
// Inputs of a column that share a step, where a matrix of bytes is multiplied with floats.
constexpr std::size_t kBlock = 32;

// In place of steps: 127 of them, on either side of zero, are the largest value of each row.
constexpr float kOfEachRow = -1.0f;

// A product with a stored matrix of `inputs` rows. A panel holds its columns row after row. Where the
// input is rounded to codes first, the matrix is one of bytes, of which a kernel wants some rows at
// a time (`Kernel::together`). With steps of blocks it is one of bytes for an input in floats.
struct Linear {
    std::size_t inputs = 0, panels = 0;
    const void* weights = nullptr;
    bool halves = false;                  // floats in half precision
    bool in_bf16 = false;                 // floats in bf16, as many side by side as a kernel takes
    const float* blocks = nullptr;        // step of each block: panels, inputs / kBlock, 32
    const float* bias = nullptr;          // panels * 32
    const float* scale = nullptr;         // of codes: float value of one step of a sum
    const std::int32_t* start = nullptr;  // of codes: what a sum begins with, so that zero gives 0
    float steps = 0;                      // of codes: their steps to one, or kOfEachRow
    float zero = 0;                       // of codes: the zero point, of 0 to 255
};

struct Layer {
    const float* attention_norm = nullptr;
    const float* mlp_norm = nullptr;
    Linear query, key, value, mix, gate_up, down;
};

struct Model {
    std::size_t width, inner, kv_heads, group, head_width, layer_count;
    float epsilon;
    const Layer* layers;
    const float* last_norm;
    const std::int32_t* axes;  // which of the three positions turns a channel, (head_width / 2)
};

// Of each side its own, as nothing with code may be shared.
namespace {

inline bool rounds(const Linear& linear) { return linear.steps != 0; }

// Whether it is given its input as it is.
inline bool takes_floats(const Linear& linear) { return !rounds(linear) && !linear.in_bf16; }

inline bool each_row_by_itself(const Linear& linear) { return linear.steps == kOfEachRow; }

inline std::size_t query_width(const Model& model) {
    return model.kv_heads * model.group * model.head_width;
}

inline std::size_t key_width(const Model& model) { return model.kv_heads * model.head_width; }

}  // namespace

// Keys and values of tokens that came before, (layers, 2, kv heads, capacity, head width).
struct Before {
    const float* array;
    std::size_t steps, capacity;
};

// One row: the tokens that continue a prefix and what was written behind that.
struct Row {
    const float* embeds;               // (steps, width)
    const std::int32_t* positions[3];  // each (steps)
    std::size_t steps;
    Before prefix, past;
};

// What is wanted of a row. Without hidden states, of the last layer nothing but keys and values is
// computed; with what the last token attended to, nothing but that is computed of other tokens.
struct Wanted {
    float* hidden;    // (steps, width) normalised; with `attended` (width) of the last token, which
                      // the last layer has still to be finished for
    float* attended;  // (queries), or none
    float* kept;      // the row's keys and values, (layers, 2, kv heads, steps, head width), or none
};

// Cosines and sines by position and channel, (positions, head_width / 2) each.
struct Rotary {
    const float* cosines;
    const float* sines;
};

// The decoder compiled for some processors.
struct Kernel {
    const char* name;
    std::size_t together;  // bytes of a column side by side in a panel; 0: floats that hold them
    int lowest;            // the code that stands for 0 of 0 to 255
    bool halves;           // whether it takes weights in half precision; else they are made floats
    std::size_t side_by_side;  // floats of a column that it multiplies at once: in bf16, or one
    bool (*runs_here)();

    // Floats that a row of so many steps behind so many others works in.
    std::size_t (*row_scratch)(const Model& model, const Crew& crew, std::size_t steps,
                               std::size_t before);

    // Runs a row; its products and heads are shared among the crew.
    void (*run_row)(const Model& model, const Crew& crew, const Rotary& rotary, const Row& row,
                    float* scratch, const Wanted& wanted);

    // What is left of the last layer, for `rows` tokens at once; their hidden states (rows, width)
    // are replaced by the normalised ones. The scratch is that of a row of as many steps.
    void (*finish_rows)(const Model& model, const Crew& crew, std::size_t rows,
                        const float* attended, float* scratch, float* hidden);

    // A product (rows, panels * 32) of floats (rows, inputs), which are not rounded.
    void (*multiply_rows)(const Linear& w, const Crew& crew, std::size_t rows, const float* a,
                          float* out);
};

extern const Kernel kAvx512Bf16, kAvx512, kAvxVnni, kAvx2, kI8mm, kDotprod, kPortable;

// Those of this architecture, the fastest first.
constexpr const Kernel* kKernels[] = {
#if defined(__x86_64__)
    &kAvx512Bf16, &kAvx512, &kAvxVnni, &kAvx2,
#elif defined(__aarch64__) && defined(__linux__)
    &kI8mm, &kDotprod,
#endif
    &kPortable};

}  // namespace meiqa
