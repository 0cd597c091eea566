// Vectors, their exponential and GELU, and small matrix products, on a CPU with AVX2 or AVX-512; in bfloat16 where it has
// a matrix unit (AMX).

#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <vector>

#include <immintrin.h>
#if defined(__linux__) && defined(__AMX_BF16__) && defined(__AVX512BF16__)
#define MATRIX_UNIT
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX2__)
constexpr int WIDTH = 8;
#else
#error "slower than PyTorch without AVX2"
#endif
constexpr int TILE = WIDTH == 16 ? 8 : 6;  // rows whose sums are kept in registers, two vectors each
constexpr long PLACES = 64;  // of a block

typedef float Vec __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef int32_t Int __attribute__((vector_size(4 * WIDTH)));

inline Vec load(const float* from) { return *reinterpret_cast<const Vec*>(from); }
inline void store(float* to, Vec x) { *reinterpret_cast<Vec*>(to) = x; }
inline Vec all(float x) { return x - Vec{}; }
inline Vec larger(Vec x, Vec y) { return x > y ? x : y; }  // y where one is no number

// Of x from -87 on, below as of -87; within 1 ulp. Taylor's series within half a power of two.
inline Vec exponential(Vec x) {
    x = larger(all(-87.0f), x);
    const float round = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    const Vec rounded = x * 1.44269504f + round, n = rounded - round;
    const Vec f = x - n * 0.693359375f + n * 2.12194440e-4f;
    Vec y = all(1.0f / 5040);
    for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) y = y * f + c;
    return (Vec)((Int)y + ((Int)rounded << 23));
}

// x times the normal distribution's function; largest error 4e-7. The logarithm of erfc is a polynomial from 0 to 5.
inline Vec gelu(Vec x) {
    constexpr float logarithm[] = {-1.104421112e-7f, 2.976813127e-6f, -3.339582219e-5f, 1.897412714e-4f,
                                   -4.027930003e-4f, -1.986868092e-3f, 2.135243801e-2f, -1.040770131e-1f,
                                   -6.362260554e-1f, -1.128425803f, 9.178107954e-7f};
    const Vec z = -larger(larger(x, -x) * -0.70710678f, all(-5.0f));
    Vec y = {};
    for (float c : logarithm) y = y * z + c;
    const Vec half = 0.5f * exponential(y);
    return x * (x < 0.0f ? half : 1.0f - half);
}

inline Vec reciprocal_root(Vec x) {
    for (int i = 0; i < WIDTH; i++) x[i] = 1.0f / std::sqrt(x[i]);
    return x;
}

// A matrix of which element i, j is at i * row + j * column.
struct Matrix {
    const float* at;
    long row, column;
    Matrix from_row(long i) const { return {at + i * row, row, column}; }
};

template <int ROWS, int VECTORS>
inline void tile(long k, Matrix a, const float* b, long b_row, float* c, long c_row, bool onto) {
    Vec sums[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++) sums[i][v] = Vec{};
    for (long j = 0; j < k; j++) {
        Vec right[VECTORS];
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++) right[v] = load(b + j * b_row + v * WIDTH);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) {
            const float left = a.at[i * a.row + j * a.column];
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; v++) sums[i][v] += left * right[v];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++) {
            float* to = c + i * c_row + v * WIDTH;
            store(to, onto ? load(to) + sums[i][v] : sums[i][v]);
        }
}

template <int ROWS>
inline void tiles(long m, long n, long k, Matrix a, const float* b, long b_row, float* c, long c_row, bool onto) {
    if constexpr (ROWS > 0) {
        if (m < ROWS) return tiles<ROWS - 1>(m, n, k, a, b, b_row, c, c_row, onto);
        long v = 0;
        for (; v + 2 * WIDTH <= n; v += 2 * WIDTH) tile<ROWS, 2>(k, a, b + v, b_row, c + v, c_row, onto);
        for (; v < n; v += WIDTH) tile<ROWS, 1>(k, a, b + v, b_row, c + v, c_row, onto);
    }
}

// c (m x n) = a (m x k) b (k x n), or c += a b; n is a multiple of a vector's width. What is added is summed first:
// of a sum over all places, block by block, the roundings are then as many as there are blocks, not places.
void product(long m, long n, long k, Matrix a, const float* b, long b_row, float* c, long c_row, bool onto = false) {
    for (long i = 0; i < m; i += TILE)
        tiles<TILE>(std::min<long>(TILE, m - i), n, k, a.from_row(i), b, b_row, c + i * c_row, c_row, onto);
}

// Floats from a multiple of 64 bytes on.
class Scratch {
public:
    explicit Scratch(long floats) : heap_(floats + 16) {}
    float* take(long floats) {
        if (!next_) next_ = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(heap_.data()) + 63) & ~uintptr_t{63});
        float* taken = next_;
        next_ += floats;
        return taken;
    }

private:
    std::vector<float> heap_;
    float* next_ = nullptr;
};

// While it lives, numbers below 1.2e-38 are zero. A sharp softmax makes many, and an Intel Xeon took up to forty times
// as long for a pass over them.
class NoDenormals {
public:
    NoDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
    ~NoDenormals() { _mm_setcsr(before_); }

private:
    unsigned before_;
};

// Products of matrices with rows of 64 places, in float32. See InBFloat16.
struct InFloat32 {
    using Number = float;  // of the left matrix, k x m
    static long depth(long k) { return k; }
    static long room(long /* k */) { return 0; }
    static const float* right(long /* k */, const float* rows, float* /* room */) { return rows; }
    static void product(long m, long k, const float* a, const float* rows, float* c, bool onto) {
        ::product(m, PLACES, k, {a, 1, m}, rows, PLACES, c, PLACES, onto);
    }
    static Vec gelu(Vec x) { return ::gelu(x); }
};

#ifdef MATRIX_UNIT

// Whether the system lets this process use the matrix unit.
inline bool has_matrix_unit() {
    constexpr long ask = 0x1023, tiles = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool granted = !syscall(SYS_arch_prctl, ask, tiles);
    return granted;
}

// Products of bfloat16 numbers, summed in float32. While one lives, its thread's matrix unit has eight tiles of 16 rows
// of 64 bytes.
class InBFloat16 {
public:
    using Number = uint16_t;  // of the left matrix, m x k; m is a multiple of 32

    InBFloat16() {
        struct Config {
            uint8_t palette, start, reserved[14];
            uint16_t bytes[16];
            uint8_t rows[16];
        };
        alignas(64) static constexpr Config tiles{
            1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
        _tile_storeconfig(before_);
        _tile_loadconfig(&tiles);
    }
    ~InBFloat16() { _tile_loadconfig(before_); }
    InBFloat16(const InBFloat16&) = delete;

    // Of k columns of a left matrix, and the zeros after them.
    static long depth(long k) { return (k + 31) / 32 * 32; }

    // Floats that `right` needs.
    static long room(long k) { return depth(k) * PLACES / 2; }

    // Rounds k rows, and adds zeros: two rows at a time, place by place.
    static const Number* right(long k, const float* rows, float* room) {
        alignas(64) static constexpr Number zip[] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8,  24, 9,  25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
        Number* const pairs = reinterpret_cast<Number*>(room);
        for (long i = 0; i < depth(k); i += 2)
            for (long v = 0; v < PLACES; v += WIDTH) {
                const Vec none = {}, one = i < k ? load(rows + i * PLACES + v) : none;
                const Vec other = i + 1 < k ? load(rows + (i + 1) * PLACES + v) : none;
                const auto both = (__m512i)_mm512_cvtne2ps_pbh((__m512)other, (__m512)one);
                _mm512_storeu_si512(pairs + i * PLACES + 2 * v, _mm512_permutexvar_epi16(_mm512_load_si512(zip), both));
            }
        return pairs;
    }

    // c (m x 64) = a b, or c += a b.
    static void product(long m, long k, const Number* a, const Number* pairs, float* c, bool onto) {
        k = depth(k);
        std::atomic_signal_fence(std::memory_order_seq_cst);  // GCC may not know that tiles are loaded from memory
        for (long i = 0; i < m; i += 32)
            for (long v = 0; v < PLACES; v += 32) {
                float *upper = c + i * PLACES + v, *lower = upper + 16 * PLACES;
                if (onto) {
                    _tile_loadd(0, upper, 4 * PLACES);
                    _tile_loadd(1, upper + 16, 4 * PLACES);
                    _tile_loadd(2, lower, 4 * PLACES);
                    _tile_loadd(3, lower + 16, 4 * PLACES);
                } else {
                    _tile_zero(0);
                    _tile_zero(1);
                    _tile_zero(2);
                    _tile_zero(3);
                }
                for (long j = 0; j < k; j += 32) {
                    const Number* b = pairs + j * PLACES + 2 * v;
                    _tile_loadd(4, a + i * k + j, 2 * k);
                    _tile_loadd(5, a + (i + 16) * k + j, 2 * k);
                    _tile_loadd(6, b, 4 * PLACES);
                    _tile_loadd(7, b + 32, 4 * PLACES);
                    _tile_dpbf16ps(0, 4, 6);
                    _tile_dpbf16ps(1, 4, 7);
                    _tile_dpbf16ps(2, 5, 6);
                    _tile_dpbf16ps(3, 5, 7);
                }
                _tile_stored(0, upper, 4 * PLACES);
                _tile_stored(1, upper + 16, 4 * PLACES);
                _tile_stored(2, lower, 4 * PLACES);
                _tile_stored(3, lower + 16, 4 * PLACES);
            }
    }

    // Largest error 2e-4, less than bfloat16's own from 0.1 on: the normal distribution's function, less a half, is an
    // odd polynomial from -4 to 4.
    static Vec gelu(Vec x) {
        constexpr float odd[] = {2.258818301e-8f, -1.588825771e-6f, 4.776385820e-5f, -8.121871828e-4f,
                                 8.763689503e-3f, -6.455440877e-2f, 3.978702637e-1f};
        const Vec z = -larger(-larger(x, all(-4.0f)), all(-4.0f)), square = z * z;
        Vec y = {};
        for (float c : odd) y = y * square + c;
        return x * (y * z + 0.5f);
    }

private:
    alignas(64) uint8_t before_[64];
};

#endif

}  // namespace
