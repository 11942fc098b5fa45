// What the fused decoder's front (decoder.cpp) and its kernels (decoder_*.cpp) agree on.
//
// Widths of the weights are cut into panels of 32 columns, so that a tile of rows times a panel
// stays in the registers. Only plain data crosses: a kernel is compiled for other
// instructions than everything else, and nothing that both sides define may be shared by the linker.

#pragma once

#include <cstddef>
#include <cstdint>

// Of what takes and gives registers: a call would pass them through memory.
#define MEIQA_INLINE inline __attribute__((always_inline))

namespace meiqa {

constexpr std::size_t kLanes = 16, kPanel = 2 * kLanes;

// In place of steps: 127 of them, on either side of zero, are the largest value of each row.
constexpr float kOfEachRow = -1.0f;

// A product with a stored matrix of `inputs` rows. A panel holds its columns row after row. Where the
// input is rounded to codes first, the matrix is one of bytes, of which a kernel wants some rows at
// a time (`Kernel::together`).
struct Linear {
    std::size_t inputs = 0, panels = 0;
    const void* weights = nullptr;
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

inline bool each_row_by_itself(const Linear& linear) { return linear.steps == kOfEachRow; }

inline std::size_t query_width(const Model& model) {
    return model.kv_heads * model.group * model.head_width;
}

inline std::size_t key_width(const Model& model) { return model.kv_heads * model.head_width; }

}  // namespace

// One row: the tokens that continue a prefix.
struct Row {
    const float* embeds;               // (steps, width)
    const std::int32_t* positions[3];  // each (steps)
    std::size_t steps;
    const float* prefix;               // (layers, 2, kv heads, capacity, head width)
    std::size_t prefix_steps, prefix_capacity;
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
    bool (*runs_here)();

    // Floats that a row of so many steps on such a prefix works in.
    std::size_t (*row_scratch)(const Model& model, std::size_t steps, std::size_t prefix_steps);

    // Runs a row up to the attention of the last layer, of which only the last token is wanted: its
    // hidden state (width) and what it attended to (queries). With `kept`, the row's own keys and
    // values, (layers, 2, kv heads, steps, head width), are all that is wanted.
    void (*attend_row)(const Model& model, const Rotary& rotary, const Row& row, float* scratch,
                       float* hidden, float* attended, float* kept);

    // What is left of the last layer, for `rows` tokens at once; their hidden states (rows, width)
    // are replaced by the normalised ones. The scratch is that of a row of as many steps.
    void (*finish_rows)(const Model& model, std::size_t rows, const float* attended,
                        float* scratch, float* hidden);
};

extern const Kernel kAvx512, kAvxVnni, kAvx2, kI8mm, kDotprod, kPortable;

// Those of this architecture, the fastest first.
constexpr const Kernel* kKernels[] = {
#if defined(__x86_64__)
    &kAvx512, &kAvxVnni, &kAvx2,
#elif defined(__aarch64__) && defined(__linux__)
    &kI8mm, &kDotprod,
#endif
    &kPortable};

}  // namespace meiqa
