// Tiles of modes grid, integer and step in AVX2 intrinsics, eight weights at a time: block_decode.cpp's loops but for the
// last weights of a tile. Each returns how many weights it has decoded; 0 leaves the tile to the other loops.
#pragma once

#include <bit>
#include <cstring>

#include <immintrin.h>

#include "tile.h"
#include "weight.h"

namespace nacd::NACD_ISA {

alignas(64) inline constexpr uint32_t kStarts[8][4] = {{0, 0, 0, 0}, {1, 1, 1, 1}, {2, 2, 2, 2}, {3, 3, 3, 3},
                                                {4, 4, 4, 4}, {5, 5, 5, 5}, {6, 6, 6, 6}, {7, 7, 7, 7}};

inline __m128i load4(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

// Fields of widths n_i <= 24 bits, one behind the other: the running sum of the widths over each four lanes gives their
// places, one 16-byte load for each four and a byte shuffle bring the four bytes that hold each, and a variable shift
// aligns them.
struct Widths {
    __m256i n, sum;
};

inline Widths sum_widths(__m256i n) {
    const __m256i pairs = _mm256_add_epi32(n, _mm256_slli_si256(n, 4));
    return {n, _mm256_add_epi32(pairs, _mm256_slli_si256(pairs, 8))};
}

// sums: the same `sum` in memory, where scalar code reads the two totals.
inline __m256i take_low(const uint8_t* low, uint64_t& position, const Widths& widths, const uint32_t* sums) {
    const uint64_t first = position, second = first + sums[3];
    position = second + sums[7];
    const __m256i start = _mm256_set_m128i(load4(kStarts[second & 7]), load4(kStarts[first & 7]));
    const __m256i bytes = _mm256_set_m128i(load4(low + (second >> 3)), load4(low + (first >> 3)));

    const __m256i offset = _mm256_add_epi32(_mm256_sub_epi32(widths.sum, widths.n), start);
    const __m256i spread = _mm256_setr_epi8(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12,  //
                                            0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12);
    const __m256i places = _mm256_add_epi8(_mm256_shuffle_epi8(_mm256_srli_epi32(offset, 3), spread),
                                           _mm256_set1_epi32(0x03020100));
    const __m256i words =
        _mm256_srlv_epi32(_mm256_shuffle_epi8(bytes, places), _mm256_and_si256(offset, _mm256_set1_epi32(7)));
    return _mm256_andnot_si256(_mm256_sllv_epi32(_mm256_set1_epi32(-1), widths.n), words);
}

// Fields that are all `shift` bits wide.
inline __m256i take_low(const uint8_t* low, uint64_t& position, int shift) {
    const auto n = static_cast<uint32_t>(shift);
    const uint32_t sums[8] = {n, 2 * n, 3 * n, 4 * n, n, 2 * n, 3 * n, 4 * n};
    const __m256i sum = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(sums));
    return take_low(low, position, {_mm256_set1_epi32(shift), sum}, sums);
}

inline __m256i load8(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

template <Predictor P>
inline __m256 predict8(const Tile& tile, size_t i) {
    if constexpr (P == Predictor::none) return _mm256_setzero_ps();
    const __m256 a = _mm256_castsi256_ps(load8(tile.a + i));
    if constexpr (P == Predictor::previous) return a;
    const __m256 b = _mm256_castsi256_ps(load8(tile.b + i));
    return _mm256_add_ps(a, _mm256_mul_ps(_mm256_set1_ps(tile.alpha), _mm256_sub_ps(b, a)));
}

inline __m256i symbols8(const Tile& tile, size_t i) {
    return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(tile.symbols + i)));
}

inline void store8(uint32_t* p, __m256i x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }

// 23 - floor(log2 |cell|) from the cell as a float, its sign shifted out; 0 in the zero cell and below 0.
inline __m256i grid_low_bits8(__m256i value, __m256i is_zero) {
    const __m256i exponent = _mm256_srli_epi32(_mm256_slli_epi32(value, 1), 24);
    return _mm256_andnot_si256(is_zero, _mm256_subs_epu16(_mm256_set1_epi32(150), exponent));
}

// Whether eight integers at a time stayed within -most .. most. The conversions do not do what FORMAT.md says beyond the
// cells there are, where only wrong references and hostile frames get: the loop from 0 on then decodes the tile.
class Within {
public:
    explicit Within(int most) : most_(most) {}
    void see(__m256i x) { largest_ = _mm256_max_epu32(largest_, _mm256_add_epi32(x, _mm256_set1_epi32(most_))); }
    bool all() const {
        const __m256i limit = _mm256_set1_epi32(2 * most_);
        return _mm256_movemask_epi8(_mm256_cmpeq_epi32(_mm256_max_epu32(largest_, limit), limit)) == -1;
    }

private:
    int most_;
    __m256i largest_ = _mm256_setzero_si256();
};

// As decode_grid_from for the first weights, up to the last eight; returns how many. Two passes, cells and then low bits:
// the chain from a prediction to its low bits is so long that a processor holds too few turns of one loop at once. Words
// of the zero cell are filled in afterwards from a mask of them: there are few.
template <Predictor P>
size_t decode_grid8(const Tile& tile, int e, Cursor& at, bool* ok) {
    const __m256 scale = _mm256_set1_ps(power_of_two(-e));
    const __m256i exponent = _mm256_set1_epi32(static_cast<int>(static_cast<uint32_t>(e) << 23));
    const __m256i zero = _mm256_setzero_si256();
    uint64_t zero_cells[kTile / 64] = {};
    Within within((1 << 24) - 1);
    alignas(32) uint32_t widths[kTile], sums[kTile];
    const size_t end = tile.count / 8 * 8;
    for (size_t i = 0; i < end; i += 8) {
        const __m256i base = _mm256_cvttps_epi32(_mm256_mul_ps(predict8<P>(tile, i), scale));
        within.see(base);
        const __m256i cell = _mm256_add_epi32(base, symbols8(tile, i));
        const __m256i value = _mm256_castps_si256(_mm256_cvtepi32_ps(cell));
        const __m256i is_zero = _mm256_cmpeq_epi32(cell, zero);
        const Widths width = sum_widths(grid_low_bits8(value, is_zero));
        store8(widths + i, width.n);
        store8(sums + i, width.sum);
        store8(tile.dst + i, _mm256_add_epi32(value, exponent));
        const auto mask = static_cast<uint8_t>(_mm256_movemask_ps(_mm256_castsi256_ps(is_zero)));
        std::memcpy(reinterpret_cast<uint8_t*>(zero_cells) + i / 8, &mask, 1);
    }
    if (!within.all()) return 0;
    uint64_t position = at.low_position;
    for (size_t i = 0; i < end; i += 8) {
        const __m256i low = take_low(at.low, position, {load8(widths + i), load8(sums + i)}, sums + i);
        store8(tile.dst + i, _mm256_or_si256(load8(tile.dst + i), low));
    }
    at.low_position = position;
    for (size_t k = 0; k < kTile / 64; ++k)
        for (uint64_t left = zero_cells[k]; left != 0; left &= left - 1) {
            if (at.zero == at.zeros) return *ok = false, end;
            const size_t i = 64 * k + static_cast<size_t>(std::countr_zero(left));
            tile.dst[i] = zero_word(read_bits(at.zero_fields, at.zero++ * kZeroBits, kZeroBits), e);
        }
    return end;
}

template <Predictor P>
size_t decode_grid_base8(const Tile& tile, int e, Cursor& at) {
    const __m256 scale = _mm256_set1_ps(power_of_two(-e));
    const __m256i exponent = _mm256_set1_epi32(static_cast<int>(static_cast<uint32_t>(e) << 23));
    const __m256i zero = _mm256_setzero_si256();
    __m256i skipped = zero;
    Within within((1 << 24) - 1);
    const size_t end = tile.count / 8 * 8;
    for (size_t i = 0; i < end; i += 8) {
        const __m256i base = _mm256_cvttps_epi32(_mm256_mul_ps(predict8<P>(tile, i), scale));
        within.see(base);
        const __m256i cell = _mm256_add_epi32(base, symbols8(tile, i));
        const __m256i value = _mm256_castps_si256(_mm256_cvtepi32_ps(cell));
        const __m256i is_zero = _mm256_cmpeq_epi32(cell, zero);
        const __m256i n = grid_low_bits8(value, is_zero);
        skipped = _mm256_add_epi32(skipped, n);
        const __m256i half = _mm256_srli_epi32(_mm256_sllv_epi32(_mm256_set1_epi32(1), n), 1);
        const __m256i word = _mm256_add_epi32(_mm256_or_si256(value, half), exponent);
        store8(tile.dst + i, _mm256_andnot_si256(is_zero, word));
    }
    if (!within.all()) return 0;
    alignas(32) uint32_t lanes[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), skipped);
    for (const uint32_t lane : lanes) at.low_position += lane;
    return end;
}

inline __m256i round_to_bfloat16_8(__m256i word) {
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(word, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(_mm256_add_epi32(word, _mm256_set1_epi32(0x7fff)), odd);
    return _mm256_and_si256(up, _mm256_set1_epi32(static_cast<int>(0xffff0000u)));
}

inline __m256i ordered8(__m256i word, __m256i mask) {
    return _mm256_xor_si256(word, _mm256_and_si256(_mm256_srai_epi32(word, 31), mask));
}

template <Predictor P>
size_t decode_integer8(const Tile& tile, int shift, Cursor& at) {
    const __m128i up = _mm_cvtsi32_si128(shift), zeros = _mm_cvtsi32_si128(tile.zero_bits);
    const __m256i mask = _mm256_set1_epi32(0x7fffffff >> tile.zero_bits);
    const size_t end = tile.count / 8 * 8;
    for (size_t i = 0; i < end; i += 8) {
        __m256i predicted = _mm256_castps_si256(predict8<P>(tile, i));
        if (P == Predictor::linear && tile.zero_bits == 16) predicted = round_to_bfloat16_8(predicted);
        const __m256i base = ordered8(_mm256_sra_epi32(predicted, zeros), mask);
        const __m256i low = take_low(at.low, at.low_position, shift);
        const __m256i difference = _mm256_or_si256(_mm256_sll_epi32(symbols8(tile, i), up), low);
        store8(tile.dst + i, _mm256_sll_epi32(ordered8(_mm256_add_epi32(base, difference), mask), zeros));
    }
    return end;
}

template <Predictor P>
size_t decode_step8(const Tile& tile, int shift, float step, Cursor& at) {
    const __m128i up = _mm_cvtsi32_si128(shift);
    const __m256 width = _mm256_set1_ps(step), inverse = _mm256_set1_ps(1.0f / step);
    const size_t end = tile.count / 8 * 8;
    Within within((1 << 22) - 1);
    uint64_t position = at.low_position;
    for (size_t i = 0; i < end; i += 8) {
        const __m256i base = _mm256_cvtps_epi32(_mm256_mul_ps(predict8<P>(tile, i), inverse));
        within.see(base);
        const __m256i low = take_low(at.low, position, shift);
        const __m256i multiple =
            _mm256_add_epi32(base, _mm256_or_si256(_mm256_sll_epi32(symbols8(tile, i), up), low));
        store8(tile.dst + i, _mm256_castps_si256(_mm256_mul_ps(_mm256_cvtepi32_ps(multiple), width)));
    }
    if (!within.all()) return 0;
    at.low_position = position;
    return end;
}

// The tile's predictor is the same for all its weights: choose the loop once. FUNCTION is a template over it.
#define NACD_BY_PREDICTOR(FUNCTION, ...)                                              \
    (tile.predictor == Predictor::none       ? FUNCTION<Predictor::none>(__VA_ARGS__) \
     : tile.predictor == Predictor::previous ? FUNCTION<Predictor::previous>(__VA_ARGS__) \
                                             : FUNCTION<Predictor::linear>(__VA_ARGS__))

}  // namespace nacd::NACD_ISA
