// Thurstone's Case V for photos against neighbours of known score: see thurstone.py.
//
// Eight comparisons are worked on at a time, as vectors of the compiler's: what a processor lacks
// the compiler composes, and on x86-64 it makes the solver for three generations of processors,
// of which the loader takes the newest that runs. Sums run in one order everywhere.

#include "pool.hpp"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define MEIQA_EACH_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MEIQA_EACH_PROCESSOR
#endif
#define MEIQA_INLINE inline __attribute__((always_inline))

namespace nb = nanobind;

namespace {

constexpr std::size_t kLanes = 8;
typedef double Doubles __attribute__((vector_size(64)));
typedef std::int64_t Longs __attribute__((vector_size(64)));
typedef std::int32_t Ints __attribute__((vector_size(32)));

using Table = nb::ndarray<const double, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Column = nb::ndarray<const double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Out = nb::ndarray<double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

constexpr int kMaxSteps = 200;
// Newton squares the error: after a step this small, in sigmas, the next would be below rounding,
// and the curvature where the step began is that where it ends, to eight digits.
constexpr double kLastStep = 1e-8;
constexpr std::size_t kBlock = 64;  // photos that a thread takes at a time

// (t + 4) e(t) in powers of u, highest first: see hazards.py.
constexpr double kExcess[] = {
    1.4804154022563544e-08,  -2.071114283078507e-08,  -1.3529413081994808e-07,
    2.5569143808187903e-07,  5.605918542801535e-07,   -1.6905634592427578e-06,
    -1.1267471643798478e-06, 8.114172816411628e-06,   -1.4565187827615587e-06,
    -3.170859414881326e-05,  2.5598410718239395e-05,  0.00010488754870985674,
    -0.0001503312905080569,  -0.0002892918027857523,  0.0006654957847153117,
    0.0005948559918031812,   -0.00248579224219354,    -0.00037358596952200143,
    0.007961411150203152,    -0.004488589890605869,   -0.02080045431159896,
    0.031656527489777486,    0.03370366765351547,     -0.13822449147915367,
    0.06751792792276659,     0.40195670380623527,     -1.1822045015192792,
    1.8048571559157687};
constexpr double kExponential[] = {
    1.6059043836821613e-10, 2.08767569878681e-09,   2.505210838544172e-08,  2.755731922398589e-07,
    2.7557319223985893e-06, 2.48015873015873e-05,   0.0001984126984126984,  0.001388888888888889,
    0.008333333333333333,   0.041666666666666664,   0.16666666666666666,    0.5,
    1.0,                    1.0};

MEIQA_INLINE Doubles all(double value) { return Doubles{} + value; }

template <std::size_t COUNT>
MEIQA_INLINE Doubles polynomial(const double (&factors)[COUNT], Doubles x) {
    Doubles sum = all(factors[0]);
    for (std::size_t i = 1; i < COUNT; ++i) sum = sum * x + factors[i];
    return sum;
}

// The standard normal density: 2^n times a Taylor series on |x| <= ln(2)/2.
MEIQA_INLINE Doubles density(Doubles t) {
    const Doubles power = -0.5 * t * t;
    const Longs normal = power > all(-708.0);  // exp of less is no normal number: 0 there
    const Doubles exponent = normal ? power : all(-708.0);
    const Ints whole = __builtin_convertvector(exponent * 1.4426950408889634 - 0.5, Ints);
    const Doubles x = exponent - __builtin_convertvector(whole, Doubles) * 0.6931471805599453;
    const Longs bits = (__builtin_convertvector(whole, Longs) + 1023) << 52;
    const Doubles made = 0.3989422804014327 * polynomial(kExponential, x) * (Doubles)bits;
    return normal ? made : Doubles{};
}

struct Bends {
    Doubles slope, curvature;
};

// What eight comparisons add to the derivatives of the cross-entropy; hazards.py explains h.
MEIQA_INLINE Bends bends(Doubles z, Doubles per_width, Doubles preference) {
    const Longs left = z < Doubles{};
    const Doubles t = left ? -z : z;
    const Doubles shrunk = 1.0 / (t + 4.0);
    const Doubles excess = polynomial(kExcess, (t - 4.0) * shrunk) * shrunk;
    const Doubles low = t + excess, dense = density(t), high = dense * low / (low - dense);
    const Doubles low_bend = low * excess, high_bend = high * (t + high);
    const Doubles won = left ? low : high, won_bend = left ? low_bend : high_bend;
    const Doubles lost = left ? high : low, lost_bend = left ? high_bend : low_bend;
    const Doubles other = 1.0 - preference;
    return {(other * lost - preference * won) * per_width,
            (other * lost_bend + preference * won_bend) * (per_width * per_width)};
}

// The comparisons of one photo that were asked, side by side, filled up with some that say nothing.
struct Asked {
    const double *known, *per_width, *preferences;
    std::size_t vectors;
};

MEIQA_INLINE double sum(Doubles each) {
    return ((each[0] + each[4]) + (each[2] + each[6])) + ((each[1] + each[5]) + (each[3] + each[7]));
}

MEIQA_INLINE void derivatives(const Asked& asked, double score, double& slope, double& curvature) {
    Doubles slopes{}, curvatures{};
    for (std::size_t i = 0; i < asked.vectors; ++i) {
        Doubles known, per_width, preference;
        std::memcpy(&known, asked.known + i * kLanes, sizeof known);
        std::memcpy(&per_width, asked.per_width + i * kLanes, sizeof per_width);
        std::memcpy(&preference, asked.preferences + i * kLanes, sizeof preference);
        const Bends made = bends((score - known) * per_width, per_width, preference);
        slopes += made.slope;
        curvatures += made.curvature;
    }
    slope = sum(slopes);
    curvature = sum(curvatures);
}

// Newton's method, kept inside a shrinking bracket.
MEIQA_INLINE void minimum(const Asked& asked, double prior, double sigma, double lam,
                          double& answer, double& std) {
    double score = prior, slope, curvature;
    derivatives(asked, score, slope, curvature);
    // The slope never falls, so lam (s - prior)^2 has balanced it within this distance.
    const double reach = std::abs(slope) / (2.0 * lam);
    double low = slope > 0.0 ? prior - reach : prior, high = slope > 0.0 ? prior : prior + reach;
    double step = 2.0 * reach;
    curvature += 2.0 * lam;
    for (int turn = 0; turn < kMaxSteps; ++turn) {
        if (slope > 0.0) high = score;
        else if (slope < 0.0) low = score;
        double following = score - slope / curvature;
        if (!(low <= following && following <= high) || std::abs(following - score) > 0.5 * step)
            following = low + 0.5 * (high - low);
        step = std::abs(following - score);
        score = following;
        const double rounding = 2.0 * std::numeric_limits<double>::epsilon() * std::abs(score);
        if (step <= std::max(kLastStep * sigma, rounding)) break;
        derivatives(asked, score, slope, curvature);
        slope += 2.0 * lam * (score - prior);
        curvature += 2.0 * lam;
    }
    answer = score;
    std = 1.0 / std::sqrt(curvature);
}

struct Photos {
    const double *prior, *known, *stds, *preferences;
    std::size_t neighbours;
    double sigma, lam;
    double *score, *std;
};

MEIQA_EACH_PROCESSOR
void solve(const Photos& photos, std::size_t first, std::size_t last, double* room) {
    const std::size_t padded = (photos.neighbours + kLanes - 1) / kLanes * kLanes;
    double *const known = room, *const per_width = room + padded, *const answers = per_width + padded;
    for (std::size_t i = first; i < last; ++i) {
        std::size_t count = 0;
        const std::size_t row = i * photos.neighbours;
        for (std::size_t j = row; j < row + photos.neighbours; ++j) {
            if (std::isnan(photos.preferences[j])) continue;
            const double spread = photos.stds[j];
            known[count] = photos.known[j];
            per_width[count] = 1.0 / std::sqrt(photos.sigma * photos.sigma + spread * spread);
            answers[count++] = photos.preferences[j];
        }
        std::size_t filled = count;
        for (; filled % kLanes; ++filled) known[filled] = per_width[filled] = answers[filled] = 0.0;
        minimum({known, per_width, answers, filled / kLanes}, photos.prior[i], photos.sigma,
                photos.lam, photos.score[i], photos.std[i]);
    }
}

// Shapes and values were checked by thurstone.py.
void thurstone_map(const Column& prior, const Table& known, const Table& stds,
                   const Table& preferences, double sigma, double lam, std::size_t threads,
                   Out& score, Out& std) {
    const nb::gil_scoped_release unlocked;
    const std::size_t count = prior.shape(0), neighbours = preferences.shape(1);
    const Photos photos{prior.data(), known.data(), stds.data(),  preferences.data(), neighbours,
                        sigma,        lam,          score.data(), std.data()};
    const std::size_t blocks = (count + kBlock - 1) / kBlock;
    meiqa::Pool::run(threads, blocks, [&](std::size_t block) {
        std::vector<double> room(3 * (neighbours + kLanes));
        solve(photos, block * kBlock, std::min((block + 1) * kBlock, count), room.data());
    });
}

// Whether preferences, scores and stds are allowed wherever a preference is given.
MEIQA_EACH_PROCESSOR
int bad_values(const double* known, const double* stds, const double* preferences,
               std::size_t count) {
    constexpr double most = std::numeric_limits<double>::max();
    int answers = 0, scores = 0, spreads = 0;
    for (std::size_t i = 0; i < count; ++i) {
        const double answer = preferences[i];
        const int asked = answer == answer;
        answers |= asked & !((answer >= 0.0) & (answer <= 1.0));
        scores |= asked & !((known[i] >= -most) & (known[i] <= most));
        spreads |= asked & !((stds[i] >= 0.0) & (stds[i] <= most));
    }
    return answers ? 1 : scores ? 2 : spreads ? 3 : 0;
}

int which_is_out_of_range(const Table& known, const Table& stds, const Table& preferences) {
    return bad_values(known.data(), stds.data(), preferences.data(), preferences.size());
}

}  // namespace

NB_MODULE(_thurstone, module) {
    module.def("thurstone_map", &thurstone_map, nb::arg("prior").noconvert(),
               nb::arg("known").noconvert(), nb::arg("stds").noconvert(),
               nb::arg("preferences").noconvert(), nb::arg("sigma"), nb::arg("lam"),
               nb::arg("threads"), nb::arg("score").noconvert(), nb::arg("std").noconvert());
    module.def("which_is_out_of_range", &which_is_out_of_range, nb::arg("known").noconvert(),
               nb::arg("stds").noconvert(), nb::arg("preferences").noconvert());
}
