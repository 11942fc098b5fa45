// Thurstone's Case V, of photos each alone and of many photos together: see thurstone.py.
//
// Eight comparisons are worked on at a time, as vectors of the compiler's: what a processor lacks
// the compiler composes, and on x86-64 it makes the solver for three generations of processors,
// of which the loader takes the newest that runs. Sums run in one order everywhere.

#include "pool.hpp"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <utility>
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
using Pairs = nb::ndarray<const std::int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Out = nb::ndarray<double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

constexpr double kEpsilon = std::numeric_limits<double>::epsilon();
constexpr int kMaxSteps = 200;
// Newton squares the error: after a step this small, in sigmas, the next would be below rounding,
// and the curvature where the step began is that where it ends, to eight digits.
constexpr double kLastStep = 1e-8;
constexpr std::size_t kBlock = 64;  // photos that a thread takes at a time

// With t = |z| and h = φ/Φ, the inverse Mills ratio, e(t) = h(-t) - t falls from √(2/π) to 1/t. It
// is computed directly, so nothing cancels far out, where φ(t) and Φ(-t) underflow: (t + 4) e(t) is
// this polynomial in u = (t - 4)/(t + 4), highest power first, interpolated at 61 Chebyshev points
// with 50 digits and truncated; the relative error is at most 4e-16. From h(-t) follows
// Φ(-t) = φ(t)/h(-t), and h(t) from that.
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

constexpr std::size_t padded(std::size_t count) {
    return (count + kLanes - 1) / kLanes * kLanes;
}

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

// h(z), -h'(z), h(-z) and -h'(-z), where h = φ/Φ and -h'(z) = h(z)(z + h(z)).
struct Mills {
    Doubles won, won_fall, lost, lost_fall;
};

MEIQA_INLINE Mills inverse_mills_ratios(Doubles z) {
    const Longs left = z < Doubles{};
    const Doubles t = left ? -z : z;
    const Doubles shrunk = 1.0 / (t + 4.0);
    const Doubles excess = polynomial(kExcess, (t - 4.0) * shrunk) * shrunk;
    const Doubles low = t + excess, dense = density(t), high = dense * low / (low - dense);
    const Doubles low_fall = low * excess, high_fall = high * (t + high);
    return {left ? low : high, left ? low_fall : high_fall, left ? high : low,
            left ? high_fall : low_fall};
}

struct Derivatives {
    Doubles slope, curvature;
};

// The first and second derivative of eight comparisons' cross-entropy by the difference of scores.
MEIQA_INLINE Derivatives cross_entropy(Doubles difference, Doubles per_width, Doubles preference) {
    const Mills mills = inverse_mills_ratios(difference * per_width);
    const Doubles other = 1.0 - preference;
    return {(other * mills.lost - preference * mills.won) * per_width,
            (other * mills.lost_fall + preference * mills.won_fall) * (per_width * per_width)};
}

MEIQA_INLINE Doubles load(const double* from) {
    Doubles made;
    std::memcpy(&made, from, sizeof made);
    return made;
}

MEIQA_INLINE void store(double* to, Doubles made) { std::memcpy(to, &made, sizeof made); }

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
        const std::size_t at = i * kLanes;
        const Derivatives made =
            cross_entropy(score - load(asked.known + at), load(asked.per_width + at),
                          load(asked.preferences + at));
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
        const double rounding = 2.0 * kEpsilon * std::abs(score);
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
    const std::size_t width = padded(photos.neighbours);
    double *const known = room, *const per_width = room + width, *const answers = per_width + width;
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
    meiqa::Pool::gather(std::min(threads, blocks), [&](const meiqa::Crew& crew) {
        meiqa::shared(crew, blocks, [&](std::size_t block, std::size_t) {
            std::vector<double> room(3 * (neighbours + kLanes));
            solve(photos, block * kBlock, std::min((block + 1) * kBlock, count), room.data());
        });
    });
}

// ---- Many photos together ----------------------------------------------------------------------

constexpr int kMaxSolverSteps = 500, kMaxHalvings = 60, kMaxSweeps = 200;
// The first Newton steps are solved to this share of the gradient, later ones as far as Newton's
// method can then shorten it (Eisenstat and Walker, SIAM J. Sci. Comput. 17, 1996, choice 2).
constexpr double kFirstShare = 0.05, kLastShare = 1e-4;
constexpr double kSettled = 1e-10;
// The Hessian is held whole for at most so many items and so many places for each entry: its rows
// are read in order then, sixteen times as fast as entries are gathered.
constexpr std::size_t kWholeUpTo = 1000, kPlacesAnEntry = 8;
constexpr std::size_t kTogether = 4;  // rows that are eliminated at a time

using Row = std::vector<double>;
using Places = std::vector<std::int32_t>;

// Free items come first, those of known score behind them; a comparison names the places of its
// two, and counts as so many. There are whole vectors of comparisons: the last may say nothing.
struct Votes {
    std::size_t free, count;
    Row prior, weights, per_width, preferences, counts;
    Places first, second;

    Votes(std::size_t free, std::size_t count, std::size_t items)
        : free(free), count(count), prior(items), weights(items), per_width(padded(count)),
          preferences(padded(count)), counts(padded(count)), first(padded(count)),
          second(padded(count)) {}
};

// The loss's derivatives at some scores: by each item, where those of known ones mean nothing, and
// by each comparison's difference.
struct Slopes {
    Row gradient, diagonal, curvatures;
    double squared_length;  // of the gradient

    explicit Slopes(const Votes& votes)
        : gradient(votes.prior.size() + kLanes), diagonal(gradient),
          curvatures(votes.first.size()) {}
};

// Over the free items, its rows and columns filled up to whole vectors: either whole or in rows of
// entries, each of which is its comparison's curvature, negative.
struct Hessian {
    std::size_t side;
    Row whole, entries;
    Places starts, asked, others;
};

MEIQA_INLINE double dot(const double* a, const double* b, std::size_t count) {
    Doubles total{};
    for (std::size_t i = 0; i < count; i += kLanes) total += load(a + i) * load(b + i);
    return sum(total);
}

MEIQA_EACH_PROCESSOR
void differentiate(const Votes& votes, const Row& scores, Slopes& made) {
    double *const gradient = made.gradient.data(), *const diagonal = made.diagonal.data();
    for (std::size_t i = 0; i < scores.size(); ++i) {
        gradient[i] = 2.0 * votes.weights[i] * (scores[i] - votes.prior[i]);
        diagonal[i] = 2.0 * votes.weights[i];
    }
    double differences[kLanes], slopes[kLanes];
    for (std::size_t m = 0; m < votes.first.size(); m += kLanes) {
        const std::int32_t *const first = &votes.first[m], *const second = &votes.second[m];
        for (std::size_t lane = 0; lane < kLanes; ++lane)
            differences[lane] = scores[first[lane]] - scores[second[lane]];
        const Derivatives each = cross_entropy(
            load(differences), load(&votes.per_width[m]), load(&votes.preferences[m]));
        double* const curvatures = &made.curvatures[m];
        const Doubles counts = load(&votes.counts[m]);
        store(slopes, counts * each.slope);
        store(curvatures, counts * each.curvature);
        for (std::size_t lane = 0; lane < kLanes; ++lane) {
            gradient[first[lane]] += slopes[lane];
            gradient[second[lane]] -= slopes[lane];
            diagonal[first[lane]] += curvatures[lane];
            diagonal[second[lane]] += curvatures[lane];
        }
    }
    std::fill(gradient + votes.free, gradient + padded(votes.free), 0.0);
    made.squared_length = dot(gradient, gradient, padded(votes.free));
}

bool among_free(const Votes& votes, std::size_t m) {
    return std::max<std::size_t>(votes.first[m], votes.second[m]) < votes.free;
}

// Makes room for the whole of it, or lists each free item's comparisons with free ones.
Hessian hessian_of(const Votes& votes, bool whole) {
    Hessian made{padded(votes.free), {}, {}, {}, {}, {}};
    if (whole) {
        made.whole.resize(made.side * made.side);
        return made;
    }
    made.starts.resize(votes.free + 1);
    for (std::size_t m = 0; m < votes.count; ++m) {
        if (!among_free(votes, m)) continue;
        ++made.starts[votes.first[m] + 1];
        ++made.starts[votes.second[m] + 1];
    }
    for (std::size_t i = 0; i < votes.free; ++i) made.starts[i + 1] += made.starts[i];
    for (auto* each : {&made.asked, &made.others}) each->resize(made.starts[votes.free]);
    made.entries.resize(made.starts[votes.free]);
    Places filled = made.starts;
    for (std::size_t m = 0; m < votes.count; ++m) {
        if (!among_free(votes, m)) continue;
        const std::int32_t a = votes.first[m], b = votes.second[m];
        made.asked[filled[a]] = made.asked[filled[b]] = static_cast<std::int32_t>(m);
        made.others[filled[a]++] = b;
        made.others[filled[b]++] = a;
    }
    return made;
}

void fill(const Votes& votes, const Slopes& at, Hessian& hessian) {
    for (std::size_t entry = 0; entry < hessian.asked.size(); ++entry)
        hessian.entries[entry] = at.curvatures[hessian.asked[entry]];
    if (hessian.whole.empty()) return;
    double* const whole = hessian.whole.data();
    const std::size_t side = hessian.side;
    std::fill(whole, whole + side * side, 0.0);
    for (std::size_t i = 0; i < votes.free; ++i) whole[i * side + i] = at.diagonal[i];
    for (std::size_t m = 0; m < votes.count; ++m) {
        if (!among_free(votes, m)) continue;
        whole[votes.first[m] * side + votes.second[m]] -= at.curvatures[m];
        whole[votes.second[m] * side + votes.first[m]] -= at.curvatures[m];
    }
}

MEIQA_INLINE double times_row(const Hessian& hessian, const Slopes& at, std::size_t i,
                              const Row& x) {
    if (!hessian.whole.empty())
        return dot(&hessian.whole[i * hessian.side], x.data(), hessian.side);
    double even = at.diagonal[i] * x[i], odd = 0.0;
    std::int32_t entry = hessian.starts[i];
    const std::int32_t end = hessian.starts[i + 1];
    if ((end - entry) % 2) even -= hessian.entries[entry] * x[hessian.others[entry]], ++entry;
    for (; entry < end; entry += 2) {
        even -= hessian.entries[entry] * x[hessian.others[entry]];
        odd -= hessian.entries[entry + 1] * x[hessian.others[entry + 1]];
    }
    return even + odd;
}

// Solves Hessian · direction = gradient by conjugate gradients, preconditioned by the diagonal,
// until a share of the residual is left.
MEIQA_EACH_PROCESSOR
void solve_for_direction(const Hessian& hessian, const Slopes& at, std::size_t free, double share,
                         Row& direction) {
    const std::size_t side = hessian.side;
    Row residual(at.gradient.begin(), at.gradient.begin() + side), per_diagonal(side), scaled(side),
        product(side);
    for (std::size_t i = 0; i < free; ++i) per_diagonal[i] = 1.0 / at.diagonal[i];
    for (std::size_t i = 0; i < side; ++i) scaled[i] = residual[i] * per_diagonal[i];
    Row search = scaled;
    std::fill(direction.begin(), direction.end(), 0.0);
    double energy = dot(residual.data(), scaled.data(), side);
    const double enough = energy * share * share;
    for (int turn = 0; turn < kMaxSolverSteps && energy > enough; ++turn) {
        for (std::size_t i = 0; i < free; ++i) product[i] = times_row(hessian, at, i, search);
        const double curvature = dot(product.data(), search.data(), side);
        if (curvature <= 0.0) break;
        const double length = energy / curvature;
        for (std::size_t i = 0; i < side; ++i) {
            direction[i] += length * search[i];
            residual[i] -= length * product[i];
            scaled[i] = residual[i] * per_diagonal[i];
        }
        const double following = dot(residual.data(), scaled.data(), side);
        for (std::size_t i = 0; i < side; ++i)
            search[i] = scaled[i] + following / energy * search[i];
        energy = following;
    }
}

// Newton's method; a step is halved until it shortens the gradient. That of a strictly convex loss
// is shortened along each Newton step and vanishes only at the minimum, so nothing else need be
// looked at. Leaves the derivatives of where the last step began, which is the minimum to eight
// digits.
Slopes minimum_together(const Votes& votes, double sigma, Hessian& hessian, Row& scores) {
    Slopes here(votes), there(votes);
    Row direction(hessian.side), trial = scores;
    differentiate(votes, scores, here);
    double share = kFirstShare;
    for (int turn = 0; turn < kMaxSteps && here.squared_length > 0.0; ++turn) {
        fill(votes, here, hessian);
        solve_for_direction(hessian, here, votes.free, share, direction);
        double largest = 0.0, highest = 0.0;
        for (std::size_t i = 0; i < votes.free; ++i) {
            largest = std::max(largest, std::abs(direction[i]));
            highest = std::max(highest, std::abs(scores[i]));
        }
        const bool last = largest <= std::max(kLastStep * sigma, 4.0 * kEpsilon * highest);
        double length = 1.0;
        for (int halving = 0; halving < kMaxHalvings; ++halving, length *= 0.5) {
            for (std::size_t i = 0; i < votes.free; ++i)
                trial[i] = scores[i] - length * direction[i];
            if (last) break;
            differentiate(votes, trial, there);
            if (there.squared_length < here.squared_length) break;
        }
        if (last) {
            scores = trial;
            break;
        }
        if (!(there.squared_length < here.squared_length)) break;  // nothing is left but rounding
        share = std::clamp(there.squared_length / here.squared_length, kLastShare, kFirstShare);
        std::swap(scores, trial);
        std::swap(here, there);
    }
    return here;
}

// Subtracts multiples of the rows above from a block of rows, so that zeros arise there; what
// they were multiplied by takes the zeros' places.
MEIQA_INLINE void eliminate(const double* above, double* rows, std::size_t k, std::size_t side) {
    double factors[kTogether][kTogether];
    for (std::size_t r = 0; r < kTogether; ++r)
        for (std::size_t q = 0; q < kTogether; ++q) {
            double left = rows[r * side + k + q];
            for (std::size_t p = 0; p < q; ++p) left -= factors[r][p] * above[p * side + k + q];
            factors[r][q] = left / above[q * side + k + q];
        }
    for (std::size_t j = 0; j < side; j += kLanes) {
        Doubles pivots[kTogether];
        for (std::size_t q = 0; q < kTogether; ++q) pivots[q] = load(above + q * side + j);
        for (std::size_t r = 0; r < kTogether; ++r) {
            Doubles row = load(rows + r * side + j);
            for (std::size_t q = 0; q < kTogether; ++q) row -= factors[r][q] * pivots[q];
            store(rows + r * side + j, row);
        }
    }
    for (std::size_t r = 0; r < kTogether; ++r)
        for (std::size_t q = 0; q < kTogether; ++q) {
            double made = -factors[r][q];
            for (std::size_t p = q + 1; p < kTogether; ++p)
                made -= factors[r][p] * above[p * side + k + q];
            rows[r * side + k + q] = made;
        }
}

// The diagonal of the inverse, which takes the Hessian's place: rows are eliminated from top to
// bottom, and what eliminates them is written where zeros arise. With H = L·D·Lᵀ that is L⁻¹, and
// the diagonal of the inverse the sum of its columns' squares over D.
MEIQA_EACH_PROCESSOR
void invert_diagonal(Hessian& hessian, std::size_t free, double* variances) {
    const std::size_t side = hessian.side;
    double* const whole = hessian.whole.data();
    std::fill(variances, variances + free, 0.0);
    for (std::size_t top = 0; top < free; top += kTogether) {
        double* const rows = whole + top * side;
        for (std::size_t k = 0; k < top; k += kTogether) eliminate(whole + k * side, rows, k, side);
        for (std::size_t k = top; k < std::min(top + kTogether, free); ++k) {
            const double* const pivot = whole + k * side;
            for (std::size_t i = k + 1; i < top + kTogether; ++i) {
                double* const row = whole + i * side;
                const double factor = row[k] / pivot[k];
                for (std::size_t j = 0; j < side; ++j) row[j] -= factor * pivot[j];
                row[k] = -factor;
            }
            const double variance = 1.0 / pivot[k];
            for (std::size_t j = 0; j < k; ++j) variances[j] += pivot[j] * pivot[j] * variance;
            variances[k] += variance;
        }
    }
}

// Approximates the diagonal of the inverse by Gaussian belief propagation: along each edge both
// items tell the other how precisely they are known without it.
void propagate_beliefs(const Votes& votes, const Slopes& at, double* variances) {
    struct Edge {
        std::size_t ends[2];
        double entry, told[2], following[2];
    };
    std::vector<Edge> edges;
    for (std::size_t m = 0; m < votes.count; ++m) {
        if (!among_free(votes, m)) continue;
        const std::size_t a = votes.first[m], b = votes.second[m];
        edges.push_back({{std::min(a, b), std::max(a, b)}, at.curvatures[m], {}, {}});
    }
    std::stable_sort(edges.begin(), edges.end(), [](const Edge& one, const Edge& other) {
        return std::lexicographical_compare(one.ends, one.ends + 2, other.ends, other.ends + 2);
    });
    std::size_t merged = 0;  // comparisons of the same two items are one edge
    for (const Edge& edge : edges) {
        if (merged && std::equal(edge.ends, edge.ends + 2, edges[merged - 1].ends))
            edges[merged - 1].entry += edge.entry;
        else edges[merged++] = edge;
    }
    edges.resize(merged);
    const double* const diagonal = at.diagonal.data();
    Row total(diagonal, diagonal + votes.free);
    double largest = 1.0;
    for (int sweep = 0; sweep < kMaxSweeps && largest > kSettled; ++sweep) {
        largest = 0.0;
        for (Edge& edge : edges) {
            for (int side = 0; side < 2; ++side) {
                const double left = total[edge.ends[1 - side]] + edge.told[1 - side];
                edge.following[side] = edge.entry * edge.entry / left;
                const double change = std::abs(edge.following[side] - edge.told[side]);
                largest = std::max(largest, change / diagonal[edge.ends[side]]);
            }
        }
        std::copy(diagonal, diagonal + votes.free, total.begin());
        for (Edge& edge : edges) {
            for (int side = 0; side < 2; ++side) {
                edge.told[side] = edge.following[side];
                total[edge.ends[side]] -= edge.told[side];
            }
        }
    }
    for (std::size_t i = 0; i < votes.free; ++i) variances[i] = 1.0 / total[i];
}

// Shapes and values were checked by thurstone.py; at least one item is free: its std is NaN.
void thurstone_joint(const Column& prior, const Column& weights, const Column& stds,
                     const Pairs& pairs, const Column& preferences, const Column& sigmas,
                     const Column& counts, std::size_t exact_up_to, Out& score, Out& std) {
    const nb::gil_scoped_release unlocked;
    const std::size_t items = prior.size(), count = preferences.size();
    const auto is_free = [&](std::int32_t item) { return std::isnan(stds.data()[item]); };
    Places order(items), places(items);
    std::iota(order.begin(), order.end(), 0);
    const auto known = std::stable_partition(order.begin(), order.end(), is_free);
    Votes votes(known - order.begin(), count, items);
    for (std::size_t i = 0; i < items; ++i) {
        places[order[i]] = static_cast<std::int32_t>(i);
        votes.prior[i] = prior.data()[order[i]];
        votes.weights[i] = weights.data()[order[i]];
    }
    double least = std::numeric_limits<double>::max();
    for (std::size_t m = 0; m < count; ++m) {
        const double sigma = sigmas.data()[m];
        double width = sigma * sigma;
        for (std::size_t side = 0; side < 2; ++side) {
            const std::int64_t item = pairs.data()[2 * m + side];
            (side ? votes.second : votes.first)[m] = places[item];
            if (!is_free(item)) width += stds.data()[item] * stds.data()[item];
        }
        votes.per_width[m] = 1.0 / std::sqrt(width);
        votes.preferences[m] = preferences.data()[m];
        votes.counts[m] = counts.data()[m];
        least = std::min(least, sigma);
    }
    const std::size_t free = votes.free, side = padded(free);
    const bool whole = side <= kWholeUpTo && side * side <= kPlacesAnEntry * 2 * count;
    Hessian hessian = hessian_of(votes, whole);
    Row scores = votes.prior, variances(side);
    const Slopes at = minimum_together(votes, least, hessian, scores);
    if (free > exact_up_to) {
        propagate_beliefs(votes, at, variances.data());
    } else {
        hessian.whole.resize(side * side);
        fill(votes, at, hessian);
        invert_diagonal(hessian, free, variances.data());
    }
    for (std::size_t i = 0; i < items; ++i) {
        score.data()[order[i]] = scores[i];
        std.data()[order[i]] = i < free ? std::sqrt(variances[i]) : stds.data()[order[i]];
    }
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

// h(z), -h'(z), h(-z) and -h'(-z) for one z, to be compared with what is known of them.
std::array<double, 4> inverse_mills_ratios_of(double z) {
    const Mills made = inverse_mills_ratios(all(z));
    return {made.won[0], made.won_fall[0], made.lost[0], made.lost_fall[0]};
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
    module.def("thurstone_joint", &thurstone_joint, nb::arg("prior").noconvert(),
               nb::arg("weights").noconvert(), nb::arg("stds").noconvert(),
               nb::arg("pairs").noconvert(), nb::arg("preferences").noconvert(),
               nb::arg("sigmas").noconvert(), nb::arg("counts").noconvert(),
               nb::arg("exact_up_to"), nb::arg("score").noconvert(), nb::arg("std").noconvert());
    module.def("inverse_mills_ratios", &inverse_mills_ratios_of, nb::arg("z"));
    module.def("which_is_out_of_range", &which_is_out_of_range, nb::arg("known").noconvert(),
               nb::arg("stds").noconvert(), nb::arg("preferences").noconvert());
}
