// Encoding a block on the CPU. Compiled for any machine as nacd::portable and with AVX2 as nacd::avx2: the same loops, which
// the compiler vectorises, and the same bytes.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "block.h"
#include "weight.h"

namespace nacd::NACD_ISA {

namespace {

// The encoder picks cells of 2^(k - shift), 2^k the power of two at or below the mean |w - prediction|: 3.4 to 4.4 bits a
// residual. A shift of 0 would cost 0.07 bit a weight and decode 5 % faster, 2 would save 0.02 and decode 7 % slower.
// Without a prediction many weights lie in the zero cell, where they take a bit more than they should: finer cells.
constexpr int kCellShift = 1, kKeyCellShift = 3;
constexpr size_t kLanes = 16;  // of sums: their order is part of what both builds do alike

struct BitWriter {
    uint8_t* out;
    uint64_t pending = 0;
    int filled = 0;  // < 8 after put

    // width <= 56, value below 2^width. Writes 8 bytes, of which the first (filled + width) / 8 stay.
    void put(uint64_t value, int width) {
        pending |= value << filled;
        std::memcpy(out, &pending, sizeof pending);
        filled += width;
        out += filled >> 3;
        pending >>= filled & ~7;
        filled &= 7;
    }

    uint8_t* finish() {
        if (filled > 0) *out++ = static_cast<uint8_t>(pending);
        filled = 0;
        return out;
    }
};

// One tile on its way into the block; arrays beyond count are not read.
struct TileWork {
    size_t count;
    const uint32_t* words;
    uint32_t predicted[kTile];
    int32_t cells[kTile];
    int32_t residuals[kTile];
    int32_t widths[kTile];
    uint32_t lows[kTile];
    uint32_t zeros[kTile];
    size_t zero_count;
    uint16_t exceptions[kTileExceptions];
    size_t exception_count;
    double max_error;

    void clear() { zero_count = exception_count = 0, max_error = 0; }
    bool except(size_t i) {
        if (exception_count == kTileExceptions) return false;
        exceptions[exception_count++] = static_cast<uint16_t>(i);
        return true;
    }
};

// The floor of log2 |x|, for normal x.
int floor_log2(float x) { return static_cast<int>(bits_of(x) >> 23 & 0xff) - 127; }

template <class Term>
float sum_lanes(size_t count, Term term) {
    float lanes[kLanes] = {};
    size_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
        for (size_t l = 0; l < kLanes; ++l) lanes[l] += term(i + l);
    for (; i < count; ++i) lanes[0] += term(i);
    float sum = 0;
    for (const float lane : lanes) sum += lane;
    return sum;
}

// Least squares of w - a over b - a in the tile, as an offset from the frame's alpha.
uint8_t fit_tile_alpha(const uint32_t* w, const uint32_t* a, const uint32_t* b, size_t count, float alpha) {
    const float xy = sum_lanes(count, [=](size_t i) {
        return (float_of(w[i]) - float_of(a[i])) * (float_of(b[i]) - float_of(a[i]));
    });
    const float xx = sum_lanes(count, [=](size_t i) {
        const float x = float_of(b[i]) - float_of(a[i]);
        return x * x;
    });
    const float offset = (xy / xx - alpha) / kAlphaUnit;
    if (!(offset > -1e6f && offset < 1e6f)) return 0;
    return static_cast<uint8_t>(static_cast<int8_t>(std::clamp(std::nearbyint(offset), -128.0f, 127.0f)));
}

void predict_tile(const EncodeFrame& frame, float alpha, const uint32_t* a, const uint32_t* b, TileWork& tile) {
    uint32_t* out = tile.predicted;
    const int zero_bits = frame.zero_bits;
    switch (frame.predictor) {
        case Predictor::none: std::fill_n(out, tile.count, 0u); break;
        case Predictor::previous: std::copy_n(a, tile.count, out); break;
        case Predictor::linear:
            for (size_t i = 0; i < tile.count; ++i) out[i] = predict(Predictor::linear, alpha, zero_bits, a[i], b[i]);
    }
}

struct TileFacts {
    bool same;               // every word is its prediction
    bool finite, predicted_finite;
    float mean;              // of |w - prediction|
    uint32_t largest;        // magnitude of a word or a prediction, as bits
};

TileFacts look_at(const TileWork& tile) {
    const uint32_t *w = tile.words, *p = tile.predicted;
    uint32_t differ = 0, largest = 0, largest_predicted = 0;
    for (size_t i = 0; i < tile.count; ++i) differ |= w[i] ^ p[i];
    for (size_t i = 0; i < tile.count; ++i) largest = std::max(largest, w[i] & 0x7fffffffu);
    for (size_t i = 0; i < tile.count; ++i) largest_predicted = std::max(largest_predicted, p[i] & 0x7fffffffu);
    const float sum =
        sum_lanes(tile.count, [=](size_t i) { return std::fabs(float_of(w[i]) - float_of(p[i])); });
    return {differ == 0, is_finite(largest), is_finite(largest_predicted), sum / static_cast<float>(tile.count),
            std::max(largest, largest_predicted)};
}

// Cells as wide as the residuals ask for, unless the largest number would leave the 2^24 cells there are.
bool grid_exponent(const TileFacts& facts, Predictor predictor, int* e) {
    if (!facts.finite || !facts.predicted_finite || !std::isfinite(facts.mean)) return false;
    const int shift = predictor == Predictor::none ? kKeyCellShift : kCellShift;
    const int wanted = floor_log2(facts.mean) - shift, least = floor_log2(float_of(facts.largest)) - 23;
    *e = std::max({wanted, least, -kGridBias});
    return *e < kGridTiles - kGridBias;
}

// Residuals outside a byte become exceptions, with the cell of the prediction.
bool try_grid(int e, TileWork& tile) {
    tile.clear();
    const float scale = power_of_two(-e);
    const size_t count = tile.count;
    int32_t outside = 0, any_zero = 0;
    for (size_t i = 0; i < count; ++i) {  // below 2^24 cells by the choice of e
        const int32_t base = static_cast<int32_t>(float_of(tile.predicted[i]) * scale);
        const int32_t cell = static_cast<int32_t>(float_of(tile.words[i]) * scale);
        tile.cells[i] = cell;
        tile.residuals[i] = cell - base;
        outside |= static_cast<int32_t>(static_cast<uint32_t>(cell - base + 128) & ~255u);
        any_zero |= cell == 0;
    }
    if (outside != 0)
        for (size_t i = 0; i < count; ++i)
            if (tile.residuals[i] < -128 || tile.residuals[i] > 127) {
                if (!tile.except(i)) return false;
                tile.cells[i] -= tile.residuals[i];
                tile.residuals[i] = 0;
                any_zero |= tile.cells[i] == 0;
            }
    for (size_t i = 0; i < count; ++i) {
        tile.widths[i] = grid_low_bits(tile.cells[i]);
        tile.lows[i] = tile.words[i] & ((1u << tile.widths[i]) - 1);
    }
    if (any_zero != 0)
        for (size_t i = 0; i < count; ++i)
            if (tile.cells[i] == 0) {
                uint32_t field = 7u << 23;
                const bool excepted = std::find(tile.exceptions, tile.exceptions + tile.exception_count, i) !=
                                      tile.exceptions + tile.exception_count;
                if (!excepted && !zero_field(tile.words[i], e, &field)) {
                    field = 7u << 23;
                    if (!tile.except(i)) return false;
                }
                tile.zeros[tile.zero_count++] = field;
            }
    return true;
}

// The shift at which differences take the fewest bits: one of `length` bits takes that many, but at least the shift's,
// and one that leaves the residual's byte becomes an exception. Of equals the least: a code does better than whole bits.
int choose_shift(const int32_t* differences, size_t count, int most) {
    size_t lengths[33] = {};
    for (size_t i = 0; i < count; ++i) ++lengths[std::bit_width(magnitude(differences[i]))];
    int best = most;
    size_t fewest = SIZE_MAX;
    for (int shift = most; shift >= 0; --shift) {
        size_t bits = 0;
        for (int length = 0; length <= 32; ++length) {
            const bool excepted = length > shift + 7;
            bits += lengths[length] * (excepted ? 8 * kExceptionBytes : static_cast<size_t>(std::max(length, shift)));
        }
        if (bits <= fewest) fewest = bits, best = shift;
    }
    return best;
}

bool try_integer(int zero_bits, int* shift, TileWork& tile) {
    tile.clear();
    const size_t count = tile.count;
    for (size_t i = 0; i < count; ++i) {
        const uint32_t difference = static_cast<uint32_t>(order(tile.words[i], zero_bits)) -
                                    static_cast<uint32_t>(order(tile.predicted[i], zero_bits));
        tile.cells[i] = static_cast<int32_t>(difference);
    }
    *shift = choose_shift(tile.cells, count, kMaxIntegerShift);
    for (size_t i = 0; i < count; ++i) {
        tile.residuals[i] = tile.cells[i] >> *shift;
        tile.widths[i] = *shift;
        tile.lows[i] = static_cast<uint32_t>(tile.cells[i]) & ((1u << *shift) - 1);
        if (tile.residuals[i] < -128 || tile.residuals[i] > 127) {
            if (!tile.except(i)) return false;
            tile.residuals[i] = 0;
        }
    }
    return true;
}

bool try_step(const TileFacts& facts, float step, float tolerance, int* shift, TileWork& tile) {
    tile.clear();
    const float inverse = 1.0f / step;
    if (!facts.finite || !facts.predicted_finite || !(float_of(facts.largest) * inverse < 4194304.0f)) return false;
    const size_t count = tile.count;
    for (size_t i = 0; i < count; ++i) {
        const int32_t base = round_to_integer(float_of(tile.predicted[i]) * inverse);
        tile.cells[i] = round_to_integer(float_of(tile.words[i]) * inverse);
        tile.residuals[i] = tile.cells[i] - base;
    }
    *shift = choose_shift(tile.residuals, count, kMaxStepShift);
    for (size_t i = 0; i < count; ++i) {
        const float value = static_cast<float>(tile.cells[i]) * step;
        const double error = std::fabs(static_cast<double>(value) - static_cast<double>(float_of(tile.words[i])));
        const bool within = tolerance > 0 ? error <= static_cast<double>(tolerance) : bits_of(value) == tile.words[i];
        const int32_t difference = tile.residuals[i];
        tile.residuals[i] = difference >> *shift;
        tile.widths[i] = *shift;
        tile.lows[i] = static_cast<uint32_t>(difference) & ((1u << *shift) - 1);
        if (!within || tile.residuals[i] < -128 || tile.residuals[i] > 127) {
            if (!tile.except(i)) return false;
            tile.residuals[i] = 0;
        } else {
            tile.max_error = std::max(tile.max_error, error);
        }
    }
    return true;
}

// A lower bound good enough to tell a tile that would be larger than its words: residuals count 4 bits.
size_t cost_bits(const TileWork& tile) {
    size_t bits = 4 * tile.count + kZeroBits * tile.zero_count + 8 * kExceptionBytes * tile.exception_count;
    for (size_t i = 0; i < tile.count; ++i) bits += static_cast<size_t>(tile.widths[i]);
    return bits;
}

void append_tile(const TileWork& tile, size_t first, BitWriter& low, BlockParts* parts) {
    size_t i = 0;
    for (; i + 2 <= tile.count; i += 2)
        low.put(tile.lows[i] | static_cast<uint64_t>(tile.lows[i + 1]) << tile.widths[i],
                tile.widths[i] + tile.widths[i + 1]);
    if (i < tile.count) low.put(tile.lows[i], tile.widths[i]);
    std::copy_n(tile.zeros, tile.zero_count, parts->zeros + parts->zero_count);
    parts->zero_count += tile.zero_count;
    for (size_t k = 0; k < tile.exception_count; ++k) {
        uint8_t* out = parts->exceptions + kExceptionBytes * parts->exception_count++;
        const auto index = static_cast<uint16_t>(first + tile.exceptions[k]);
        std::memcpy(out, &index, sizeof index);
        std::memcpy(out + 2, tile.words + tile.exceptions[k], 4);
    }
    parts->max_error = std::max(parts->max_error, tile.max_error);
}

void append_raw(const TileWork& tile, int zero_bits, BitWriter& low) {
    for (size_t i = 0; i < tile.count; ++i) low.put(tile.words[i] >> zero_bits, 32 - zero_bits);
}

// The mode byte of the tile, which then stands in `tile`. kSameTile and kRawTile put nothing there.
uint8_t choose_mode(const EncodeFrame& frame, size_t tile_index, TileWork& tile) {
    const TileFacts facts = look_at(tile);
    const bool predictable = frame.predictor != Predictor::linear || facts.predicted_finite;  // NaNs differ by machine
    if (!predictable) return kRawTile;
    if (facts.same) return kSameTile;
    const size_t raw_bits = tile.count * static_cast<size_t>(32 - frame.zero_bits);
    int shift = 0, e = 0;
    const StepRequest* run = run_at(frame.runs, frame.run_count, tile_index);
    if (run != nullptr && try_step(facts, run->step, run->tolerance, &shift, tile))
        return static_cast<uint8_t>(kStepTile + shift);
    if (frame.zero_bits == 0 && grid_exponent(facts, frame.predictor, &e) && try_grid(e, tile) && cost_bits(tile) < raw_bits)
        return static_cast<uint8_t>(e + kGridBias);
    if (try_integer(frame.zero_bits, &shift, tile) && cost_bits(tile) < raw_bits)
        return static_cast<uint8_t>(kIntegerTile + shift);
    return kRawTile;
}

}  // namespace

void encode_block(const EncodeFrame& frame, size_t first_tile, const uint32_t* words, const uint32_t* a,
                  const uint32_t* b, size_t count, BlockParts* parts) {
    TileWork tile;
    BitWriter low{parts->low};
    int8_t* symbols = parts->symbols;
    parts->zero_count = parts->exception_count = 0;
    parts->max_error = 0;
    std::fill_n(parts->stream_symbols, kBlockStreams, size_t{0});
    for (size_t t = 0; t * kTile < count; ++t) {
        const size_t i = t * kTile;
        tile.count = std::min(kTile, count - i);
        tile.words = words + i;
        const uint32_t *ta = a == nullptr ? nullptr : a + i, *tb = b == nullptr ? nullptr : b + i;
        parts->alphas[t] = 0;
        if (frame.predictor == Predictor::linear)
            parts->alphas[t] = fit_tile_alpha(tile.words, ta, tb, tile.count, frame.alpha);
        predict_tile(frame, tile_alpha(frame.alpha, parts->alphas[t]), ta, tb, tile);
        const uint8_t mode = choose_mode(frame, first_tile + t, tile);
        parts->modes[t] = mode;
        if (mode == kRawTile) append_raw(tile, frame.zero_bits, low);
        if (!has_symbols(mode)) continue;
        append_tile(tile, i, low, parts);
        for (size_t k = 0; k < tile.count; ++k) *symbols++ = static_cast<int8_t>(tile.residuals[k]);
        parts->stream_symbols[t / kStreamTiles] += tile.count;
    }
    parts->low_bytes = static_cast<size_t>(low.finish() - parts->low);
}

void count_symbols(const int8_t* symbols, size_t count, uint64_t histogram[kSymbols]) {
    uint32_t histograms[4][kSymbols] = {};
    size_t i = 0;
    for (; i + 4 <= count; i += 4)
        for (size_t k = 0; k < 4; ++k) ++histograms[k][static_cast<uint8_t>(symbols[i + k])];
    for (; i < count; ++i) ++histograms[0][static_cast<uint8_t>(symbols[i])];
    for (size_t s = 0; s < kSymbols; ++s)
        histogram[s] += uint64_t{histograms[0][s]} + histograms[1][s] + histograms[2][s] + histograms[3][s];
}

size_t pack_symbols(const Code codes[kSymbols], const int8_t* symbols, size_t count, uint8_t* dst) {
    BitWriter out{dst};
    const auto code = [&](size_t i) { return codes[static_cast<uint8_t>(symbols[i])]; };
    size_t i = 0;
    for (; i + 4 <= count; i += 4) {
        uint64_t bits = 0;
        int width = 0;
        for (size_t k = 0; k < 4; ++k) {
            const Code next = code(i + k);
            bits |= uint64_t{next.bits} << width;
            width += next.width;
        }
        out.put(bits, width);
    }
    for (; i < count; ++i) out.put(code(i).bits, code(i).width);
    return static_cast<size_t>(out.finish() - dst);
}

}  // namespace nacd::NACD_ISA
