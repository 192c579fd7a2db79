// Decoding a block on the CPU. Compiled for any machine as nacd::portable and with AVX2 as nacd::avx2, which adds loops in
// intrinsics for tiles of modes grid, integer and step; FORMAT.md says what they compute.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "block.h"
#include "tile.h"
#include "weight.h"

#ifdef __AVX2__
#include "tile_avx2.h"
#endif

namespace nacd::NACD_ISA {

namespace {

// Symbols of one stream land here with room for what the last table entries write too much.
constexpr size_t kStreamSymbols = kStreamTiles * kTile;
constexpr size_t kStreamStride = kStreamSymbols + 64;
constexpr size_t kGroup = 4;  // streams decoded at once, so that their chains of table lookups overlap

constexpr size_t kLookups = 5;  // of kCodeBits bits, in the 57 bits or more that one load holds

// A stream's next bit, counted from the block's first stream, and where its next symbol goes.
struct SymbolReader {
    const TableEntry* table;
    uint64_t position;
    int8_t* out;
    int8_t* end;
};

// kLookups entries of each of `kReaders` streams, in turns: one stream's lookups wait for each other.
template <size_t kReaders>
inline void decode_some(const uint8_t* streams, SymbolReader* readers) {
    uint64_t bits[kReaders], used[kReaders] = {};
    for (size_t k = 0; k < kReaders; ++k)
        bits[k] = load64(streams + (readers[k].position >> 3)) >> (readers[k].position & 7);
    for (size_t i = 0; i < kLookups; ++i)
        for (size_t k = 0; k < kReaders; ++k) {
            const TableEntry entry = readers[k].table[bits[k] & (kTableSize - 1)];
            std::memcpy(readers[k].out + (used[k] >> 8), &entry, sizeof entry);
            bits[k] >>= entry >> 48 & 63;
            used[k] += entry >> 48;  // bits, and symbols in the next byte
        }
    for (size_t k = 0; k < kReaders; ++k) {
        readers[k].position += used[k] & 0xff;
        readers[k].out += used[k] >> 8;
    }
}

// Symbols beyond `end` are written, too: at most those of kLookups entries.
void decode_symbols(const uint8_t* streams, SymbolReader* readers, size_t count) {
    while (count == kGroup) {  // as many rounds as no reader can pass its end in, then look again
        SymbolReader r[kGroup] = {readers[0], readers[1], readers[2], readers[3]};
        ptrdiff_t left = r[0].end - r[0].out;
        for (const SymbolReader& reader : r) left = std::min(left, reader.end - reader.out);
        if (left <= 0) break;
        for (ptrdiff_t rounds = left / static_cast<ptrdiff_t>(kLookups * kEntrySymbols) + 1; rounds > 0; --rounds)
            decode_some<kGroup>(streams, r);
        std::copy_n(r, kGroup, readers);
    }
    for (size_t i = 0; i < count; ++i)
        while (readers[i].out < readers[i].end) decode_some<1>(streams, readers + i);
}

// Weights from `begin` on, one by one. Zero cells take their fields here.
bool decode_grid_from(size_t begin, const Tile& tile, int e, bool base_only, Cursor& at) {
    const float scale = power_of_two(-e);
    for (size_t i = begin; i < tile.count; ++i) {
        const int32_t base = truncate(multiply(float_of(tile.predicted(i)), scale));
        const int32_t cell = base + tile.symbols[i];
        const int n = grid_low_bits(cell);
        if (base_only) {
            tile.dst[i] = grid_middle(cell, e);
            at.low_position += static_cast<uint64_t>(n);
        } else if (cell == 0) {
            if (at.zero == at.zeros) return false;
            tile.dst[i] = zero_word(read_bits(at.zero_fields, at.zero++ * kZeroBits, kZeroBits), e);
        } else {
            tile.dst[i] = grid_word(cell, read_bits(at.low, at.low_position, n), e);
            at.low_position += static_cast<uint64_t>(n);
        }
    }
    return true;
}

void decode_integer_from(size_t begin, const Tile& tile, int shift, Cursor& at) {
    for (size_t i = begin; i < tile.count; ++i, at.low_position += static_cast<uint64_t>(shift)) {
        const uint32_t low = read_bits(at.low, at.low_position, shift);
        tile.dst[i] = integer_word(tile.symbols[i], low, shift, tile.predicted(i), tile.zero_bits);
    }
}

void decode_step_from(size_t begin, const Tile& tile, int shift, float step, Cursor& at) {
    const float inverse = 1.0f / step;
    for (size_t i = begin; i < tile.count; ++i, at.low_position += static_cast<uint64_t>(shift)) {
        const uint32_t low = read_bits(at.low, at.low_position, shift);
        tile.dst[i] = step_word(tile.symbols[i], low, shift, tile.predicted(i), step, inverse);
    }
}

bool decode_grid(const Tile& tile, int e, bool base_only, Cursor& at) {
    size_t done = 0;
    bool ok = true;
#ifdef __AVX2__
    done = base_only ? NACD_BY_PREDICTOR(decode_grid_base8, tile, e, at) : NACD_BY_PREDICTOR(decode_grid8, tile, e, at, &ok);
#endif
    return ok && decode_grid_from(done, tile, e, base_only, at);
}

void decode_integer(const Tile& tile, int shift, Cursor& at) {
    size_t done = 0;
#ifdef __AVX2__
    done = NACD_BY_PREDICTOR(decode_integer8, tile, shift, at);
#endif
    decode_integer_from(done, tile, shift, at);
}

void decode_step(const Tile& tile, int shift, float step, Cursor& at) {
    size_t done = 0;
#ifdef __AVX2__
    done = NACD_BY_PREDICTOR(decode_step8, tile, shift, step, at);
#endif
    decode_step_from(done, tile, shift, step, at);
}

void decode_raw(const Tile& tile, Cursor& at) {
    const int width = 32 - tile.zero_bits;
    for (size_t i = 0; i < tile.count; ++i, at.low_position += static_cast<uint64_t>(width))
        tile.dst[i] = read_bits(at.low, at.low_position, width) << tile.zero_bits;
}

Status decode_tile(const DecodeFrame& frame, uint8_t mode, float step, const Tile& tile, Cursor& at) {
    if (mode < kGridTiles) {
        if (!decode_grid(tile, mode - kGridBias, frame.base_only, at)) return Status::bad_stream;
    } else if (mode <= kIntegerTile + kMaxIntegerShift) {
        decode_integer(tile, mode - kIntegerTile, at);
    } else if (mode == kSameTile) {
        for (size_t i = 0; i < tile.count; ++i) tile.dst[i] = tile.predicted(i);
    } else if (mode == kRawTile) {
        decode_raw(tile, at);
    } else {
        if (step == 0) return Status::bad_tile;
        decode_step(tile, mode - kStepTile, step, at);
    }
    return Status::ok;
}

}  // namespace

Status decode_block(const DecodeFrame& frame, const BlockView& block, size_t first_tile, const uint32_t* a,
                    const uint32_t* b, uint32_t* dst) {
    alignas(64) int8_t symbols[kGroup * kStreamStride];
    Cursor at{block.low, 0, block.zero_fields, 0, block.zeros};
    uint64_t stream = 0;  // where the next one begins
    for (size_t s0 = 0; s0 < block.streams; s0 += kGroup) {
        const size_t streams = std::min(kGroup, block.streams - s0);
        SymbolReader readers[kGroup];
        uint64_t ends[kGroup];
        for (size_t k = 0; k < streams; ++k) {
            size_t count = 0;
            const size_t last = std::min((s0 + k + 1) * kStreamTiles, block.tiles);
            for (size_t t = (s0 + k) * kStreamTiles; t < last; ++t)
                if (has_symbols(block.modes[t])) count += std::min(kTile, block.count - t * kTile);
            int8_t* out = symbols + k * kStreamStride;
            readers[k] = {frame.tables + block.stream_tables[s0 + k] * kTableSize, 8 * stream, out, out + count};
            uint16_t size;
            std::memcpy(&size, block.stream_sizes + 2 * (s0 + k), sizeof size);
            stream += size;
            ends[k] = 8 * stream;
        }
        decode_symbols(block.symbols, readers, streams);

        for (size_t k = 0; k < streams; ++k) {
            if (readers[k].position > ends[k] + kLookups * kCodeBits) return Status::bad_stream;  // more than it looks ahead
            const int8_t* next = symbols + k * kStreamStride;
            const size_t last = std::min((s0 + k + 1) * kStreamTiles, block.tiles);
            for (size_t t = (s0 + k) * kStreamTiles; t < last; ++t) {
                const size_t i = t * kTile, count = std::min(kTile, block.count - i);
                const uint8_t mode = block.modes[t];
                const float alpha = block.alphas == nullptr ? 0 : tile_alpha(frame.alpha, block.alphas[t]);
                const Tile tile{frame.predictor, frame.zero_bits, alpha, a == nullptr ? nullptr : a + i,
                                b == nullptr ? nullptr : b + i, next, dst + i, count};
                const StepRun* run = mode < kStepTile ? nullptr : run_at(frame.runs, frame.run_count, first_tile + t);
                const float step = run == nullptr ? 0 : run->step;
                if (const Status status = decode_tile(frame, mode, step, tile, at); status != Status::ok) return status;
                if (at.low_position > 8 * block.low_bytes) return Status::bad_stream;
                if (has_symbols(mode)) next += count;
            }
        }
    }
    if (divide_up(at.low_position, 8) != block.low_bytes) return Status::bad_stream;
    if (!frame.base_only && at.zero != at.zeros) return Status::bad_stream;
    for (size_t k = 0; k < block.exception_count; ++k) {
        uint16_t index;
        std::memcpy(&index, block.exceptions + kExceptionBytes * k, sizeof index);
        if (index >= block.count) return Status::bad_stream;
        std::memcpy(dst + index, block.exceptions + kExceptionBytes * k + 2, 4);
    }
    return Status::ok;
}

}  // namespace nacd::NACD_ISA
