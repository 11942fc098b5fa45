// Pixels to normalised patches, in the order in which the vision tower merges them.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace nb = nanobind;

namespace {

constexpr std::size_t kChannels = 3;

using Pixels = nb::ndarray<const std::uint8_t, nb::shape<-1, -1, 3>, nb::c_contig, nb::device::cpu>;
using PerChannel = nb::ndarray<const double, nb::shape<3>, nb::c_contig, nb::device::cpu>;
using Patches = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// A byte has 256 values: a table normalises them once, in double, and each pixel costs one load.
using Levels = std::array<std::array<float, 256>, kChannels>;

Levels normalised_levels(const double* mean, const double* std) {
    Levels levels;
    for (std::size_t c = 0; c < kChannels; ++c)
        for (std::size_t x = 0; x < 256; ++x)
            levels[c][x] =
                static_cast<float>((static_cast<double>(x) / 255.0 - mean[c]) / std[c]);
    return levels;
}

struct Layout {
    std::size_t width, patch, temporal;
};

void write_patch(const std::uint8_t* corner, const Layout& layout, const Levels& levels,
                 float* out) {
    const std::size_t plane = layout.patch * layout.patch;
    for (std::size_t c = 0; c < kChannels; ++c) {
        const float* const level = levels[c].data();
        float* const first = out;
        for (std::size_t py = 0; py < layout.patch; ++py) {
            const std::uint8_t* const row = corner + py * layout.width * kChannels + c;
            for (std::size_t px = 0; px < layout.patch; ++px) *out++ = level[row[px * kChannels]];
        }
        for (std::size_t t = 1; t < layout.temporal; ++t, out += plane)
            std::memcpy(out, first, plane * sizeof(float));
    }
}

// The caller has checked that the sizes agree: see pixels_to_patches in patches.py.
void write_patches(const Pixels& pixels, std::size_t patch, std::size_t merge,
                   std::size_t temporal, const PerChannel& mean, const PerChannel& std,
                   Patches& out) {
    const nb::gil_scoped_release unlocked;
    const Levels levels = normalised_levels(mean.data(), std.data());
    const Layout layout{pixels.shape(1), patch, temporal};
    const std::size_t window = patch * merge, length = out.shape(1);
    float* cursor = out.data();
    for (std::size_t y = 0; y < pixels.shape(0); y += window)
        for (std::size_t x = 0; x < pixels.shape(1); x += window)
            for (std::size_t my = 0; my < merge; ++my)
                for (std::size_t mx = 0; mx < merge; ++mx, cursor += length) {
                    const std::size_t top = y + my * patch, left = x + mx * patch;
                    write_patch(pixels.data() + (top * layout.width + left) * kChannels, layout,
                                levels, cursor);
                }
}

}  // namespace

NB_MODULE(_native, module) {
    module.def("write_patches", &write_patches, nb::arg("pixels").noconvert(), nb::arg("patch"),
               nb::arg("merge"), nb::arg("temporal"), nb::arg("mean").noconvert(),
               nb::arg("std").noconvert(), nb::arg("out").noconvert());
}
