// The fused decoder's front: keeps the weights, shares rows among threads, or a row where there are
// fewer rows than threads.

#include "decoder.hpp"
#include "pool.hpp"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

namespace nb = nanobind;

namespace {

using namespace meiqa;

template <class T, std::size_t N>
using Array = nb::ndarray<const T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
template <std::size_t N>
using Out = nb::ndarray<float, nb::ndim<N>, nb::c_contig, nb::device::cpu>;

constexpr std::size_t kLine = 64;
// Last tokens that are finished together: what AVX-512 has registers for, and a few tiles elsewhere.
constexpr std::size_t kRowsAtOnce = 14;
// Multiplications of a row, some milliseconds, whose products are worth sharing rather than rows.
constexpr std::size_t kLongRow = std::size_t{1} << 30;

struct Free {
    void operator()(void* part) const { std::free(part); }
};

// Memory that begins on a cache line: a load that crosses two takes twice as long.
template <class T>
using Aligned = std::unique_ptr<T[], Free>;

template <class T>
Aligned<T> aligned(std::size_t count) {
    const std::size_t bytes = (count * sizeof(T) + kLine - 1) / kLine * kLine;
    void* const part = std::aligned_alloc(kLine, std::max(bytes, kLine));
    if (!part) throw std::bad_alloc();
    return Aligned<T>(static_cast<T*>(part));
}

template <class T, class Source>
Aligned<T> copied(const Source& source) {
    Aligned<T> part = aligned<T>(source.size());
    std::memcpy(part.get(), source.data(), source.size() * sizeof(T));
    return part;
}

// A linear layer whose weight was cut into panels: see `kernels/decoder.py`.
class StoredLinear {
  public:
    using Weights = nb::ndarray<nb::ro, nb::ndim<4>, nb::c_contig, nb::device::cpu>;

    StoredLinear(const Weights& panels, const Array<float, 3>& blocks, const Array<float, 1>& bias,
                 const Array<float, 1>& scale, const Array<std::int32_t, 1>& start, float steps,
                 float zero)
        : weights_(aligned<std::byte>(panels.nbytes())), blocks_(copied<float>(blocks)),
          bias_(copied<float>(bias)), scale_(copied<float>(scale)),
          start_(copied<std::int32_t>(start)) {
        std::memcpy(weights_.get(), panels.data(), panels.nbytes());
        linear_.panels = panels.shape(0);
        linear_.inputs = panels.shape(1) * panels.shape(3);
        linear_.weights = weights_.get();
        const bool is_float = panels.dtype().code == std::uint8_t(nb::dlpack::dtype_code::Float);
        linear_.halves = is_float && panels.dtype().bits == 16;
        linear_.in_bf16 = !is_float && panels.dtype().bits == 16;
        linear_.blocks = blocks.size() ? blocks_.get() : nullptr;
        linear_.bias = bias_.get();
        linear_.scale = scale_.get();
        linear_.start = start_.get();
        linear_.steps = steps;
        linear_.zero = zero;
    }

    const Linear& linear() const { return linear_; }

  private:
    Linear linear_;
    Aligned<std::byte> weights_;
    Aligned<float> blocks_, bias_, scale_;
    Aligned<std::int32_t> start_;
};

using Packing = std::tuple<std::size_t, int, bool, std::size_t>;

std::vector<std::tuple<std::string, Packing>> kernels() {
    std::vector<std::tuple<std::string, Packing>> found;
    for (const Kernel* const kernel : kKernels)
        if (kernel->runs_here())
            found.emplace_back(kernel->name,
                               Packing(kernel->together, kernel->lowest, kernel->halves,
                                       kernel->side_by_side));
    return found;
}

const Kernel& named(const std::string& name) {
    for (const Kernel* const kernel : kKernels)
        if (kernel->name == name && kernel->runs_here()) return *kernel;
    throw std::invalid_argument("no kernel for this processor is called " + name);
}

// Shapes were checked by `FusedDecoder` in decoder.py.
class Decoder {
  public:
    Decoder(const std::string& kernel, std::size_t width, std::size_t inner, std::size_t kv_heads,
            std::size_t group, std::size_t head_width, float epsilon,
            const Array<std::int32_t, 1>& axes, const Array<float, 1>& last_norm)
        : kernel_(named(kernel)), axes_(copied<std::int32_t>(axes)),
          last_norm_(copied<float>(last_norm)),
          model_{width,   inner, kv_heads, group,           head_width, 0,
                 epsilon, nullptr, last_norm_.get(), axes_.get()} {}

    void add_layer(const Array<float, 1>& attention_norm, const Array<float, 1>& mlp_norm,
                   const StoredLinear& query, const StoredLinear& key, const StoredLinear& value,
                   const StoredLinear& mix, const StoredLinear& gate_up, const StoredLinear& down) {
        norms_.push_back(copied<float>(attention_norm));
        norms_.push_back(copied<float>(mlp_norm));
        layers_.push_back({norms_[norms_.size() - 2].get(), norms_.back().get(), query.linear(),
                           key.linear(), value.linear(), mix.linear(), gate_up.linear(),
                           down.linear()});
        model_.layers = layers_.data();
        model_.layer_count = layers_.size();
    }

    void run(const Array<float, 3>& embeds, const Array<std::int32_t, 3>& positions,
             const Array<std::int64_t, 1>& steps, const std::vector<Array<float, 5>>& prefixes,
             const Array<std::int64_t, 1>& prefix_steps, const Array<float, 2>& cosines,
             const Array<float, 2>& sines, std::size_t threads, const Out<2>& out) const {
        const nb::gil_scoped_release unlocked;
        const std::size_t count = embeds.shape(0), most = embeds.shape(1);
        const std::size_t longest =
            *std::max_element(prefix_steps.data(), prefix_steps.data() + prefix_steps.size());
        const Rotary rotary{cosines.data(), sines.data()};
        const Aligned<float> attended = aligned<float>(count * query_width(model_));
        Pool::gather(threads, [&](const Crew& crew) {
            share_rows(crew, count, most, [&](const Crew& own, std::size_t index) {
                const std::size_t at = prefixes.size() == 1 ? 0 : index;
                Row row = row_of(embeds, positions, steps, index);
                row.prefix = {prefixes[at].data(),
                              static_cast<std::size_t>(prefix_steps.data()[at]),
                              prefixes[at].shape(3)};
                kernel_.run_row(model_, own, rotary, row, scratch(own, most, longest),
                                {out.data() + index * model_.width,
                                 attended.get() + index * query_width(model_), nullptr});
            });
            const std::size_t groups = (count + kRowsAtOnce - 1) / kRowsAtOnce;
            share_rows(crew, groups, kRowsAtOnce, [&](const Crew& own, std::size_t group) {
                const std::size_t first = group * kRowsAtOnce;
                kernel_.finish_rows(model_, own, std::min(kRowsAtOnce, count - first),
                                    attended.get() + first * query_width(model_),
                                    scratch(own, kRowsAtOnce, 0),
                                    out.data() + first * model_.width);
            });
        });
    }

    void read(const Array<float, 3>& embeds, const Array<std::int32_t, 3>& positions,
              const Array<std::int64_t, 1>& steps, const Array<float, 2>& cosines,
              const Array<float, 2>& sines, std::size_t threads,
              const std::vector<Out<5>>& kept) const {
        const nb::gil_scoped_release unlocked;
        const Rotary rotary{cosines.data(), sines.data()};
        Pool::gather(threads, [&](const Crew& crew) {
            const std::size_t most = embeds.shape(1);
            share_rows(crew, embeds.shape(0), most, [&](const Crew& own, std::size_t index) {
                const Row row = row_of(embeds, positions, steps, index);
                kernel_.run_row(model_, own, rotary, row, scratch(own, most, 0),
                                {nullptr, nullptr, kept[index].data()});
            });
        });
    }

    // A single row behind a prefix and a past.
    void step(const Array<float, 3>& embeds, const Array<std::int32_t, 3>& positions,
              const Array<std::int64_t, 1>& steps, const Array<float, 5>& prefix,
              std::size_t prefix_steps, const Array<float, 5>& past, std::size_t past_steps,
              const Array<float, 2>& cosines, const Array<float, 2>& sines, std::size_t threads,
              const Out<2>& hidden, const Out<5>& kept) const {
        const nb::gil_scoped_release unlocked;
        const Rotary rotary{cosines.data(), sines.data()};
        Row row = row_of(embeds, positions, steps, 0);
        row.prefix = {prefix.data(), prefix_steps, prefix.shape(3)};
        row.past = {past.data(), past_steps, past.shape(3)};
        Pool::gather(threads, [&](const Crew& crew) {
            kernel_.run_row(model_, crew, rotary, row,
                            scratch(crew, row.steps, prefix_steps + past_steps),
                            {hidden.data(), nullptr, kept.data()});
        });
    }

  private:
    // Calls work(crew, index) for rows of up to so many tokens: each has a member of the crew to
    // itself, or all of them where there are too few rows and a row is long enough.
    template <class Work>
    void share_rows(const Crew& crew, std::size_t count, std::size_t tokens,
                    const Work& work) const {
        if (count == 1 || (count < crew.size && tokens * multiplications() > kLongRow))
            for (std::size_t index = 0; index < count; ++index) work(crew, index);
        else
            shared(crew, count, [&](std::size_t index, std::size_t) { work(Crew{}, index); });
    }

    // Of linear layers, for a token.
    std::size_t multiplications() const {
        const std::size_t attention = 2 * (query_width(model_) + key_width(model_));
        return model_.layer_count * model_.width * (attention + 3 * model_.inner);
    }

    static Row row_of(const Array<float, 3>& embeds, const Array<std::int32_t, 3>& positions,
                      const Array<std::int64_t, 1>& steps, std::size_t index) {
        const std::size_t count = embeds.shape(0), most = embeds.shape(1);
        const std::int32_t* const place = positions.data() + index * most;
        return {embeds.data() + index * most * embeds.shape(2),
                {place, place + count * most, place + 2 * count * most},
                static_cast<std::size_t>(steps.data()[index]),
                {nullptr, 0, 0},
                {nullptr, 0, 0}};
    }

    float* scratch(const Crew& crew, std::size_t steps, std::size_t before) const {
        return kept_floats(kernel_.row_scratch(model_, crew, steps, before));
    }

    const Kernel& kernel_;
    Aligned<std::int32_t> axes_;
    Aligned<float> last_norm_;
    std::vector<Aligned<float>> norms_;
    std::vector<Layer> layers_;
    Model model_;
};

// A product (rows, panels * 32) of floats (rows, inputs) with a layer that does not round them.
void multiply(const std::string& kernel, const StoredLinear& stored, const Array<float, 2>& rows,
              std::size_t threads, const Out<2>& out) {
    const nb::gil_scoped_release unlocked;
    const Kernel& chosen = named(kernel);
    Pool::gather(threads, [&](const Crew& crew) {
        chosen.multiply_rows(stored.linear(), crew, rows.shape(0), rows.data(), out.data());
    });
}

}  // namespace

NB_MODULE(_decoder, module) {
    // A command's engine lives until its process ends, and is exempt from collection.
    nb::set_leak_warnings(false);
    module.def("kernels", &kernels);
    nb::class_<StoredLinear>(module, "StoredLinear")
        .def(nb::init<const StoredLinear::Weights&, const Array<float, 3>&,
                      const Array<float, 1>&, const Array<float, 1>&,
                      const Array<std::int32_t, 1>&, float, float>(),
             nb::arg("panels").noconvert(), nb::arg("blocks").noconvert(),
             nb::arg("bias").noconvert(), nb::arg("scale").noconvert(),
             nb::arg("start").noconvert(), nb::arg("steps"), nb::arg("zero"));
    module.def("multiply", &multiply, nb::arg("kernel"), nb::arg("stored"),
               nb::arg("rows").noconvert(), nb::arg("threads"), nb::arg("out").noconvert());
    nb::class_<Decoder>(module, "Decoder")
        .def(nb::init<const std::string&, std::size_t, std::size_t, std::size_t, std::size_t,
                      std::size_t, float, const Array<std::int32_t, 1>&,
                      const Array<float, 1>&>(),
             nb::arg("kernel"), nb::arg("width"), nb::arg("inner"), nb::arg("kv_heads"),
             nb::arg("group"), nb::arg("head_width"), nb::arg("epsilon"), nb::arg("axes").noconvert(),
             nb::arg("last_norm").noconvert())
        .def("add_layer", &Decoder::add_layer, nb::arg("attention_norm").noconvert(),
             nb::arg("mlp_norm").noconvert(), nb::arg("query"), nb::arg("key"), nb::arg("value"),
             nb::arg("mix"), nb::arg("gate_up"), nb::arg("down"),
             nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>(), nb::keep_alive<1, 6>(),
             nb::keep_alive<1, 7>(), nb::keep_alive<1, 8>(), nb::keep_alive<1, 9>())
        .def("run", &Decoder::run, nb::arg("embeds").noconvert(), nb::arg("positions").noconvert(),
             nb::arg("steps").noconvert(), nb::arg("prefixes"), nb::arg("prefix_steps").noconvert(),
             nb::arg("cosines").noconvert(), nb::arg("sines").noconvert(), nb::arg("threads"),
             nb::arg("out").noconvert())
        .def("read", &Decoder::read, nb::arg("embeds").noconvert(),
             nb::arg("positions").noconvert(), nb::arg("steps").noconvert(),
             nb::arg("cosines").noconvert(), nb::arg("sines").noconvert(), nb::arg("threads"),
             nb::arg("kept"))
        .def("step", &Decoder::step, nb::arg("embeds").noconvert(),
             nb::arg("positions").noconvert(), nb::arg("steps").noconvert(),
             nb::arg("prefix").noconvert(), nb::arg("prefix_steps"), nb::arg("past").noconvert(),
             nb::arg("past_steps"), nb::arg("cosines").noconvert(), nb::arg("sines").noconvert(),
             nb::arg("threads"), nb::arg("hidden").noconvert(), nb::arg("kept").noconvert());
}
