// The mask decoder's passes over image tokens on a CPU: what `FastDecoder` does in PyTorch, without storing anything
// in between. A block of 64 places of a prompt goes through all steps of a pass while it is in the first cache.
//
// Letters are those of decoder.py: N prompts, T tokens each, L places, X = s U + Bt R + c with r rows. All tables are
// float32 and lie in blocks of 64 places: [L / 64][rows][64]. Tokens have 8 heads of 16 channels, 128 channels in all.
// Products are summed in the same order whatever the number of threads.

#include "native_math.h"

#include <atomic>
#include <cstring>
#include <limits>
#include <system_error>
#include <thread>

namespace {

constexpr long HEADS = 8, EACH = 16, INNER = HEADS * EACH;
constexpr long SLOTS = 64;  // of tokens: token t of head h is in slot 8 h + t
constexpr long PAIR = 2 * SLOTS / HEADS;  // slots of two heads, which are multiplied at once
constexpr long TOGETHER = 8;  // prompts for which a block of tables stays in the cache
constexpr long PIXELS = 4, FIRST = 64, LAST = 32;  // pixels a transposed convolution makes of one; their channels

// Calls work(first, last) for groups of prompts, in so many threads.
template <class Work>
void in_groups(long threads, long prompts, Work work) {
    std::atomic<long> next{0};
    auto run = [&] {
        const NoDenormals here;
        for (long first; (first = next.fetch_add(TOGETHER)) < prompts;)
            work(first, std::min(prompts, first + TOGETHER));
    };
    const long groups = (prompts + TOGETHER - 1) / TOGETHER;
    std::vector<std::thread> others;
    try {
        for (long i = 1; i < std::min(threads, groups); i++) others.emplace_back(run);
    } catch (const std::system_error&) {  // the system gives no more threads: these do it all
    }
    run();
    for (std::thread& other : others) other.join();
}

// to = factor * from + rest over rows of 64 places each; factor is one number a place.
inline void scaled(long rows, const float* from, const float* factor, const float* rest, float* to) {
    for (long i = 0; i < rows * PLACES; i += PLACES)
        for (long v = i; v < i + PLACES; v += WIDTH) {
            const Vec x = load(from + v) * load(factor + v - i);
            store(to + v, rest ? x + load(rest + v) : x);
        }
}

// Softmax over T rows of 64 places, in place.
inline void softmax(long tokens, float* x) {
    for (long v = 0; v < PLACES; v += WIDTH) {
        Vec top = load(x + v), sum = {};
        for (long t = 1; t < tokens; t++) top = larger(load(x + t * PLACES + v), top);
        for (long t = 0; t < tokens; t++) {
            const Vec weight = exponential(load(x + t * PLACES + v) - top);
            sum += weight;
            store(x + t * PLACES + v, weight);
        }
        sum = 1.0f / sum;
        for (long t = 0; t < tokens; t++) store(x + t * PLACES + v, load(x + t * PLACES + v) * sum);
    }
}

}  // namespace

// Image tokens read from the prompts' tokens, and are normalised. With Y = s U + Bt R, |Y|^2 is s^2 |U|^2 and, for
// each row, R (2 s B U + B Bt R).
//
//   keys      N x 8 x 16 x T, divided by the root of 16
//   through   N x old x 8 T: the old basis times the queries' map times the keys
//   values    a layer so far: N x 8 x 16 x T, doubled
//   gram      N x r x r: B Bt, doubled below the diagonal, zero above it
//   queries, rest   of U; of what is not scaled. Without old rows all is in queries
//   dots, constant_dots   a layer so far: products of U with what values become, with the constant, doubled
//   energy    |U|^2
//   new_rows  filled: the old ones, 8 T of the tokens, the constant's
extern "C" void update(long threads, long N, long blocks, long T, long old, long layers, float channels, float eps,
                       const float* keys, const float* through, const float* const* values, const float* gram,
                       const float* scale, const float* rows, const float* queries, const float* rest,
                       const float* const* dots, const float* const* constant_dots, const float* energy,
                       float* new_scale, float* new_rows) {
    const long own = HEADS * T, r = old + own + 1;
    in_groups(threads, N, [=](long first, long last) {
        Scratch scratch((INNER + T) * PLACES);
        float *mixed = scratch.take(INNER * PLACES), *shared = scratch.take(T * PLACES);
        for (long b = 0; b < blocks; b++)
            for (long n = first; n < last; n++) {
                const float *s = scale + (n * blocks + b) * PLACES, *asked = queries + b * INNER * PLACES;
                float* const row = new_rows + (n * blocks + b) * r * PLACES;
                float* const weights = row + old * PLACES;
                if (old) {
                    std::memcpy(row, rows + (n * blocks + b) * old * PLACES, sizeof(float) * old * PLACES);
                    scaled(INNER, asked, s, rest + b * INNER * PLACES, mixed);
                    asked = mixed;
                }
                for (long h = 0; h < HEADS; h++)
                    product(T, PLACES, EACH, {keys + (n * HEADS + h) * EACH * T, 1, T}, asked + h * EACH * PLACES,
                            PLACES, weights + h * T * PLACES, PLACES);
                const Matrix old_keys{through + n * old * own, 1, own};
                if (old) product(own, PLACES, old, old_keys, row, PLACES, weights, PLACES, true);
                for (long h = 0; h < HEADS; h++) softmax(T, weights + h * T * PLACES);
                std::fill_n(row + (r - 1) * PLACES, PLACES, 1.0f);

                Vec square[PLACES / WIDTH] = {};
                auto add = [&](long i, long count) {  // of some rows, whose shared part is made
                    const Matrix with_those_before{gram + (n * r + i) * r, r, 1};
                    product(count, PLACES, i + count, with_those_before, row, PLACES, shared, PLACES, true);
                    for (long j = 0; j < count; j++)
                        for (long v = 0; v < PLACES; v += WIDTH)
                            square[v / WIDTH] += load(row + (i + j) * PLACES + v) * load(shared + j * PLACES + v);
                };
                for (long layer = 0, i = 0; layer < layers; layer++, i++) {
                    for (long h = 0; h < HEADS; h++, i += T) {
                        product(T, PLACES, EACH, {values[layer] + (n * HEADS + h) * EACH * T, 1, T},
                                dots[layer] + (b * INNER + h * EACH) * PLACES, PLACES, shared, PLACES);
                        scaled(T, shared, s, nullptr, shared);
                        add(i, T);
                    }
                    scaled(1, constant_dots[layer] + b * PLACES, s, nullptr, shared);
                    add(i, 1);
                }
                float* const scale_after = new_scale + (n * blocks + b) * PLACES;
                for (long v = 0; v < PLACES; v += WIDTH) {
                    const Vec before = load(s + v);
                    const Vec whole = square[v / WIDTH] + load(energy + b * PLACES + v) * before * before;
                    const Vec factor = reciprocal_root(larger(Vec{}, whole) / channels + eps);
                    store(scale_after + v, before * factor);
                    for (long i = 0; i < r; i++) store(row + i * PLACES + v, load(row + i * PLACES + v) * factor);
                }
            }
    });
}

// The prompts' tokens read from all places: softmax and both sums in one pass, which shrinks what it has summed when
// it finds a larger score.
//
//   queries   N x 4 x 32 x 16: of two heads each, in columns of their own, divided by the root of 16
//   through   N x r x 64: the basis times the keys' map times the queries
//   keys, rest, values   of U; of what is not scaled; of U. Without rows all is in keys, and s is not used
//   of_values N x 4 x 32 x 16, filled: the values of U, weighed; only a head's own slots have a meaning
//   of_rows   N x r x 64, filled: the rows, weighed
extern "C" void read_places(long threads, long N, long blocks, long r, const float* queries, const float* through,
                            const float* scale, const float* rows, const float* keys, const float* rest,
                            const float* values, float* of_values, float* of_rows) {
    constexpr long PAIRS = HEADS / 2, WIDE = 2 * EACH;
    in_groups(threads, N, [=](long first, long last) {
        Scratch scratch(2 * INNER * PLACES + PLACES * SLOTS + 2 * TOGETHER * SLOTS);
        float *mixed = scratch.take(INNER * PLACES), *weighed = scratch.take(INNER * PLACES);
        float* scores = scratch.take(PLACES * SLOTS);  // place by place
        float *tops = scratch.take(TOGETHER * SLOTS), *sums = scratch.take(TOGETHER * SLOTS);
        std::fill_n(tops, TOGETHER * SLOTS, -std::numeric_limits<float>::infinity());
        std::fill_n(sums, TOGETHER * SLOTS, 0.0f);
        std::fill(of_values + first * INNER * PAIR, of_values + last * INNER * PAIR, 0.0f);
        std::fill(of_rows + first * r * SLOTS, of_rows + last * r * SLOTS, 0.0f);
        auto shrink = [=](long n, long v, Vec factor) {
            for (long i = 0; i < r; i++) {
                float* x = of_rows + (n * r + i) * SLOTS + v;
                store(x, load(x) * factor);
            }
            for (long i = 0; i < WIDE; i++) {
                float* x = of_values + (n * INNER + v / PAIR * WIDE + i) * PAIR + v % PAIR;
                store(x, load(x) * factor);
            }
        };
        for (long b = 0; b < blocks; b++)
            for (long n = first; n < last; n++) {
                const float *s = scale + (n * blocks + b) * PLACES, *row = rows + (n * blocks + b) * r * PLACES;
                const float *key = keys + b * INNER * PLACES, *value = values + b * INNER * PLACES;
                if (r) {
                    scaled(INNER, key, s, rest + b * INNER * PLACES, mixed);
                    scaled(INNER, value, s, nullptr, weighed);
                    key = mixed, value = weighed;
                }
                for (long j = 0; j < PAIRS; j++)
                    product(PLACES, PAIR, WIDE, {key + j * WIDE * PLACES, 1, PLACES},
                            queries + (n * PAIRS + j) * WIDE * PAIR, PAIR, scores + j * PAIR, SLOTS);
                if (r) product(PLACES, SLOTS, r, {row, 1, PLACES}, through + n * r * SLOTS, SLOTS, scores, SLOTS, true);
                for (long v = 0; v < SLOTS; v += WIDTH) {
                    float *top = tops + (n - first) * SLOTS + v, *sum = sums + (n - first) * SLOTS + v;
                    Vec now = load(top), added = {};
                    for (long p = 0; p < PLACES; p++) now = larger(load(scores + p * SLOTS + v), now);
                    for (long p = 0; p < PLACES; p++) {
                        const Vec weight = exponential(load(scores + p * SLOTS + v) - now);
                        added += weight;
                        store(scores + p * SLOTS + v, weight);
                    }
                    const Vec factor = exponential(load(top) - now);
                    store(sum, load(sum) * factor + added);
                    store(top, now);
                    shrink(n, v, factor);
                }
                product(r, SLOTS, PLACES, {row, PLACES, 1}, scores, SLOTS, of_rows + n * r * SLOTS, SLOTS, true);
                for (long j = 0; j < PAIRS; j++)
                    product(WIDE, PAIR, PLACES, {value + j * WIDE * PLACES, PLACES, 1}, scores + j * PAIR, SLOTS,
                            of_values + (n * PAIRS + j) * WIDE * PAIR, PAIR, true);
            }
        for (long n = first; n < last; n++)
            for (long v = 0; v < SLOTS; v += WIDTH) shrink(n, v, 1.0f / load(sums + (n - first) * SLOTS + v));
    });
}

namespace {

template <class Type>
void upscale_in(long threads, long N, long blocks, long r, long M, long side, float eps, const int64_t* which,
                const void* by_row, const float* scale, const float* rows, const float* shared, const float* rest,
                const float* gain, const float* bias, const void* last, const float* last_bias, const float* weights,
                float* logits) {
    using Number = typename Type::Number;
    const Number *first_map = static_cast<const Number*>(by_row), *last_map = static_cast<const Number*>(last);
    in_groups(threads, N, [=](long first, long end) {
        [[maybe_unused]] const Type configured;
        const long rows_room = Type::room(r), first_room = Type::room(FIRST);
        Scratch scratch((FIRST + PIXELS * LAST + PIXELS * PIXELS * M) * PLACES + rows_room + first_room);
        float *once = scratch.take(FIRST * PLACES), *twice = scratch.take(PIXELS * LAST * PLACES);
        float* made = scratch.take(PIXELS * PIXELS * M * PLACES);
        float *for_rows = scratch.take(rows_room), *for_first = scratch.take(first_room);
        for (long b = 0; b < blocks; b++)
            for (long n = first; n < end; n++) {
                const long block = which[n] * blocks + b;
                const float *s = scale + block * PLACES, *row = rows + block * r * PLACES;
                const Number* const right = Type::right(r, row, for_rows);
                for (long q = 0; q < PIXELS; q++) {
                    scaled(FIRST, shared + (b * PIXELS + q) * FIRST * PLACES, s, nullptr, once);
                    Type::product(FIRST, r, first_map + (n * PIXELS + q) * Type::depth(r) * FIRST, right, once, true);
                    for (long v = 0; v < PLACES; v += WIDTH) {
                        Vec mean = {}, variance = {};
                        for (long i = 0; i < FIRST; i++) mean += load(once + i * PLACES + v) + rest[q * FIRST + i];
                        mean /= float(FIRST);
                        for (long i = 0; i < FIRST; i++) {
                            const Vec x = load(once + i * PLACES + v) + rest[q * FIRST + i] - mean;
                            store(once + i * PLACES + v, x);
                            variance += x * x;
                        }
                        const Vec factor = reciprocal_root(variance / float(FIRST) + eps);
                        for (long i = 0; i < FIRST; i++) {
                            float* x = once + i * PLACES + v;
                            store(x, Type::gelu(load(x) * factor * gain[i] + bias[i]));
                        }
                    }
                    Type::product(PIXELS * LAST, FIRST, last_map, Type::right(FIRST, once, for_first), twice, false);
                    for (long i = 0; i < PIXELS * LAST; i++)
                        for (long v = i * PLACES; v < (i + 1) * PLACES; v += WIDTH)
                            store(twice + v, Type::gelu(load(twice + v) + last_bias[i]));
                    for (long d = 0; d < PIXELS; d++)
                        product(M, PLACES, LAST, {weights + n * LAST * M, 1, M}, twice + d * LAST * PLACES, PLACES,
                                made + (q * PIXELS + d) * M * PLACES, PLACES);
                }
                for (long m = 0; m < M; m++)
                    for (long p = 0; p < PLACES; p++) {
                        const long y = (b * PLACES + p) / side, x = (b * PLACES + p) % side;
                        float* corner = logits + (((n * M + m) * side + y) * 4 * side + x) * 4;
                        for (long q = 0; q < PIXELS; q++)
                            for (long d = 0; d < PIXELS; d++)
                                corner[(2 * (q / 2) + d / 2) * 4 * side + 2 * (q % 2) + d % 2] =
                                    made[((q * PIXELS + d) * M + m) * PLACES + p];
                    }
            }
    });
}

}  // namespace

// Whether `upscale` has a matrix unit for bfloat16.
extern "C" int knows_bfloat16() {
#ifdef MATRIX_UNIT
    return has_matrix_unit();
#else
    return 0;
#endif
}

// Image tokens to masks: two transposed convolutions of kernel 2 and stride 2, a normalisation and two GELUs, and the
// product with a mask's own weights.
//
//   bfloat16  whether the convolutions are in bfloat16; their matrices are then transposed, and those of by_row end in
//             columns of zeros, up to a multiple of 32
//   which     N: of the prompts in scale and rows, those whose masks are made
//   by_row    N x 4 x r x 64: the basis times the first convolution, for each pixel that it makes of a place
//   shared    blocks x 4 x 64 x 64 places: U times it; rest, 4 x 64: c times it, and its bias
//   gain, bias    64: of the normalisation
//   last      64 x 128: the last convolution, four pixels of 32 channels; last_bias 128
//   weights   N x 32 x M
//   logits    N x M x 4 side x 4 side, filled
extern "C" void upscale(long threads, [[maybe_unused]] long bfloat16, long N, long blocks, long r, long M, long side,
                        float eps, const int64_t* which, const void* by_row, const float* scale, const float* rows,
                        const float* shared, const float* rest, const float* gain, const float* bias, const void* last,
                        const float* last_bias, const float* weights, float* logits) {
#ifdef MATRIX_UNIT
    if (bfloat16)
        return upscale_in<InBFloat16>(threads, N, blocks, r, M, side, eps, which, by_row, scale, rows, shared, rest,
                                      gain, bias, last, last_bias, weights, logits);
#endif
    upscale_in<InFloat32>(threads, N, blocks, r, M, side, eps, which, by_row, scale, rows, shared, rest, gain, bias,
                          last, last_bias, weights, logits);
}
