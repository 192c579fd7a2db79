// The arithmetic of one weight: what FORMAT.md defines, once, for the portable code, the vector code's edges and the GPU.
//
// Every operation is an IEEE-754 float32 operation rounded to nearest even, never fused, subnormals kept. A prediction
// that differs in one bit between two machines would decode to other weights.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "format.h"

#ifdef __CUDACC__
#define NACD_HD __host__ __device__
#else
#define NACD_HD
#endif

namespace nacd {

NACD_HD inline uint32_t bits_of(float x) {
#ifdef __CUDA_ARCH__
    return __float_as_uint(x);
#else
    return std::bit_cast<uint32_t>(x);
#endif
}

NACD_HD inline float float_of(uint32_t bits) {
#ifdef __CUDA_ARCH__
    return __uint_as_float(bits);
#else
    return std::bit_cast<float>(bits);
#endif
}

// 2^e for e in -126 .. 127.
NACD_HD inline float power_of_two(int e) { return float_of(static_cast<uint32_t>(e + 127) << 23); }

NACD_HD inline float add(float x, float y) {
#ifdef __CUDA_ARCH__
    return __fadd_rn(x, y);
#else
    return x + y;
#endif
}

NACD_HD inline float multiply(float x, float y) {
#ifdef __CUDA_ARCH__
    return __fmul_rn(x, y);
#else
    return x * y;
#endif
}

NACD_HD inline bool is_finite(uint32_t word) { return (word & 0x7f800000u) != 0x7f800000u; }

// ---- predictions

NACD_HD inline float tile_alpha(float alpha, uint8_t byte) {
    return add(alpha, multiply(static_cast<float>(static_cast<int8_t>(byte)), kAlphaUnit));
}

// The nearest bfloat16, ties to even, as the word of a float32.
NACD_HD inline uint32_t round_to_bfloat16(uint32_t word) {
    return (word + 0x7fffu + ((word >> 16) & 1)) & 0xffff0000u;
}

NACD_HD inline uint32_t predict(Predictor predictor, float alpha, int zero_bits, uint32_t a, uint32_t b) {
    if (predictor == Predictor::none) return 0;
    if (predictor == Predictor::previous) return a;
    const float x = float_of(a);
    const uint32_t word = bits_of(add(x, multiply(alpha, add(float_of(b), -x))));
    return zero_bits == 16 ? round_to_bfloat16(word) : word;
}

// ---- mode grid: cells of width 2^e, counted from zero outwards

// Towards zero; 0 for what has no cell (|x| >= 2^24, NaN).
NACD_HD inline int32_t truncate(float x) {
    return x > -16777216.0f && x < 16777216.0f ? static_cast<int32_t>(x) : 0;
}

NACD_HD inline uint32_t magnitude(int32_t cell) {
    return cell < 0 ? 0u - static_cast<uint32_t>(cell) : static_cast<uint32_t>(cell);
}

// How many low mantissa bits the cell leaves open: 23 - floor(log2 |cell|); none in the zero cell.
NACD_HD inline int grid_low_bits(int32_t cell) {
    const int n = 150 - static_cast<int>(bits_of(static_cast<float>(magnitude(cell))) >> 23);
    return cell == 0 || n < 0 ? 0 : n;
}

NACD_HD inline uint32_t grid_word(int32_t cell, uint32_t low, int e) {
    const uint32_t word = (bits_of(static_cast<float>(magnitude(cell))) | low) + (static_cast<uint32_t>(e) << 23);
    return word | (static_cast<uint32_t>(cell) & 0x80000000u);
}

// The middle of a cell, for reading without low bits; 0 in the zero cell.
NACD_HD inline uint32_t grid_middle(int32_t cell, int e) {
    const int n = grid_low_bits(cell);
    return cell == 0 ? 0 : grid_word(cell, n > 0 ? 1u << (n - 1) : 0, e);
}

// Zero cell, |w| < 2^e. Field: sign << 26 | k << 23 | mantissa, with |w| in [2^(e-1-k), 2^(e-k)); k = 7 is a signed zero.
NACD_HD inline uint32_t zero_word(uint32_t field, int e) {
    const uint32_t sign = (field >> 26) << 31, k = (field >> 23) & 7;
    if (k == 7) return sign;
    return sign | (static_cast<uint32_t>(e + 126 - static_cast<int>(k)) << 23) | (field & 0x7fffffu);
}

// False where the word has no field.
inline bool zero_field(uint32_t word, int e, uint32_t* field) {
    const uint32_t sign = (word >> 31) << 26;
    const int k = e + 126 - static_cast<int>((word >> 23) & 0xff);
    if ((word & 0x7fffffffu) == 0) return *field = sign | 7u << 23, true;
    if (k < 0 || k > 6 || (word & 0x7f800000u) == 0) return false;
    return *field = sign | static_cast<uint32_t>(k) << 23 | (word & 0x7fffffu), true;
}

// ---- mode integer: words in the order of the numbers they stand for

// Ascending with the value; of its own inverse. `word` is shifted right by zero_bits before.
NACD_HD inline int32_t ordered(int32_t word, int zero_bits) {
    return word ^ ((word >> 31) & (0x7fffffff >> zero_bits));
}

NACD_HD inline int32_t order(uint32_t word, int zero_bits) {
    return ordered(static_cast<int32_t>(word) >> zero_bits, zero_bits);
}

NACD_HD inline uint32_t integer_word(int32_t residual, uint32_t low, int shift, uint32_t predicted, int zero_bits) {
    const uint32_t difference = (static_cast<uint32_t>(residual) << shift) | low;
    const uint32_t sum = static_cast<uint32_t>(order(predicted, zero_bits)) + difference;
    return static_cast<uint32_t>(ordered(static_cast<int32_t>(sum), zero_bits)) << zero_bits;
}

// ---- mode step: the nearest multiple of a step

// To the nearest integer, ties to even; 0 for what has none (|x| >= 2^22, NaN).
NACD_HD inline int32_t round_to_integer(float x) {
    if (!(x > -4194304.0f && x < 4194304.0f)) return 0;
    const float shifted = add(x, 12582912.0f);  // 1.5 x 2^23: the last place is 1
    return static_cast<int32_t>(bits_of(shifted)) - 0x4b400000;
}

NACD_HD inline uint32_t step_word(int32_t residual, uint32_t low, int shift, uint32_t predicted, float step, float inverse) {
    const uint32_t base = static_cast<uint32_t>(round_to_integer(multiply(float_of(predicted), inverse)));
    const uint32_t multiple = base + ((static_cast<uint32_t>(residual) << shift) | low);
    return bits_of(multiply(static_cast<float>(static_cast<int32_t>(multiple)), step));
}

// ---- streams: the first bit is the lowest of the first byte

NACD_HD inline uint64_t load64(const uint8_t* p) {
#ifdef __CUDA_ARCH__
    uint64_t x = 0;
    for (int i = 0; i < 8; ++i) x |= static_cast<uint64_t>(p[i]) << (8 * i);
    return x;
#else
    uint64_t x;
    std::memcpy(&x, p, sizeof x);
    return x;
#endif
}

// `width` <= 32 bits at bit `position`.
NACD_HD inline uint32_t read_bits(const uint8_t* stream, uint64_t position, int width) {
    const uint64_t window = load64(stream + (position >> 3)) >> (position & 7);
    return static_cast<uint32_t>(window & ((uint64_t{1} << width) - 1));
}

}  // namespace nacd
