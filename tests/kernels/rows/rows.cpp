// Runs the decoder's kernels without Python, for processors that are emulated.
//
//     rows                       says which kernels run here: name, together, lowest, halves, side_by_side
//     rows KERNEL [TIMES] <in    hidden states of the rows in `in`, then their products with a head,
//                                by a kernel whether it says so or not
//
// The input is a sequence of arrays in the order in which they are asked for here, each behind its
// number of bytes.

#include "decoder.hpp"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

using namespace meiqa;

namespace {

void* aligned(std::size_t bytes) { return std::aligned_alloc(64, (bytes + 64) / 64 * 64); }

template <class T>
const T* next(std::size_t* count = nullptr) {
    std::int64_t bytes = 0;
    if (std::fread(&bytes, sizeof bytes, 1, stdin) != 1) std::exit(3);
    void* const array = aligned(bytes);
    if (bytes && std::fread(array, bytes, 1, stdin) != 1) std::exit(3);
    if (count) *count = bytes / sizeof(T);
    return static_cast<const T*>(array);
}

Linear next_linear(std::size_t inputs) {
    Linear linear;
    linear.inputs = inputs;
    linear.weights = next<char>();
    std::size_t outputs, blocks;
    linear.blocks = next<float>(&blocks);
    if (!blocks) linear.blocks = nullptr;
    linear.bias = next<float>(&outputs);
    linear.panels = outputs / kPanel;
    linear.scale = next<float>();
    linear.start = next<std::int32_t>();
    const float* const range = next<float>();
    linear.steps = range[0];
    linear.zero = range[1];
    linear.halves = range[2];
    return linear;
}

int run(const Kernel& kernel, int times) {
    const std::int64_t* const shape = next<std::int64_t>();
    Model model{};
    model.width = shape[0], model.inner = shape[1], model.kv_heads = shape[2];
    model.group = shape[3], model.head_width = shape[4], model.layer_count = shape[5];
    model.epsilon = *next<float>();
    model.axes = next<std::int32_t>();
    model.last_norm = next<float>();
    std::vector<Layer> layers(model.layer_count);
    for (Layer& layer : layers) {
        layer.attention_norm = next<float>();
        layer.mlp_norm = next<float>();
        layer.query = next_linear(model.width);
        layer.key = next_linear(model.width);
        layer.value = next_linear(model.width);
        layer.mix = next_linear(query_width(model));
        layer.gate_up = next_linear(model.width);
        layer.down = next_linear(model.inner);
    }
    model.layers = layers.data();
    const float* const cosines = next<float>();
    const Rotary rotary{cosines, next<float>()};
    std::size_t count;
    const std::int64_t* const steps = next<std::int64_t>(&count);
    std::vector<Row> rows(count);
    std::size_t most = 0, longest = 0;
    for (std::size_t index = 0; index < count; ++index) {
        Row& row = rows[index];
        row.steps = steps[index];
        row.embeds = next<float>();
        for (auto& places : row.positions) places = next<std::int32_t>();
        row.prefix.steps = row.prefix.capacity = *next<std::int64_t>();
        row.prefix.array = next<float>();
        row.past = {nullptr, 0, 0};
        most = std::max(most, row.steps);
        longest = std::max(longest, row.prefix.steps);
    }
    const Linear head = next_linear(model.width);
    const Crew alone;
    const std::size_t floats = kernel.row_scratch(model, alone, std::max(most, count), longest);
    auto* const scratch = static_cast<float*>(aligned(floats * sizeof(float)));
    std::vector<float> hidden(count * model.width), attended(count * query_width(model));
    for (int time = 0; time < times; ++time) {
        for (std::size_t index = 0; index < count; ++index)
            kernel.run_row(model, alone, rotary, rows[index], scratch,
                           {&hidden[index * model.width], &attended[index * query_width(model)],
                            nullptr});
        kernel.finish_rows(model, alone, count, attended.data(), scratch, hidden.data());
    }
    std::vector<float> made(count * head.panels * kPanel);
    kernel.multiply_rows(head, alone, count, hidden.data(), made.data());
    for (const auto* const out : {&hidden, &made})
        if (std::fwrite(out->data(), sizeof(float), out->size(), stdout) != out->size()) return 1;
    return 0;
}

}  // namespace

int main(int count, char** arguments) {
    for (const Kernel* const kernel : kKernels) {
        if (count < 2 && kernel->runs_here())
            std::printf("%s %zu %d %d %zu\n", kernel->name, kernel->together, kernel->lowest,
                        kernel->halves, kernel->side_by_side);
        else if (count > 1 && !std::strcmp(kernel->name, arguments[1]))
            return run(*kernel, count > 2 ? std::atoi(arguments[2]) : 1);
    }
    return count < 2 ? 0 : 2;
}
