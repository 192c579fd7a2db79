// One block on a GPU: decoded by the warps of one thread block, in phases with a barrier behind each.
//
// The ordinary compiler builds the same functions for tests (block_gpu.cpp, lanes.h).
//
// Whatever bytes a block holds, nothing outside its payload (and kGpuSlack bytes), its words and its references is
// touched: sizes and indices are checked where they are read, bit positions before the first is used.
#pragma once

#include "codec.h"
#include "format.h"
#include "lanes.h"
#include "launch_gpu.h"
#include "weight.h"

namespace nacd::gpu {

// ---- phase 1: sections, modes and streams, as view_block checks them

NACD_GPU uint32_t load_bytes(const uint8_t* p, uint32_t bytes) {
    uint32_t x = 0;
    for (uint32_t k = 0; k < bytes; ++k) x |= static_cast<uint32_t>(p[k]) << (8 * k);
    return x;
}

NACD_GPU bool has_symbols(uint8_t mode) { return mode != kSameTile && mode != kRawTile; }

NACD_GPU bool find_sections(const Block& block, Sections* at) {
    if (block.bytes < sizeof(BlockHeader)) return false;
    at->low_bytes = load_bytes(block.payload, 4);
    at->zeros = load_bytes(block.payload + 4, 4);
    at->exception_count = load_bytes(block.payload + 8, 4);
    if (at->zeros > block.count || at->exception_count > block.count) return false;
    const uint32_t alphas = block.predictor == Predictor::linear ? block.tiles : 0;
    const uint64_t low = sizeof(BlockHeader) + block.tiles + alphas;
    const uint64_t zero_fields = low + at->low_bytes;
    const uint64_t exceptions = zero_fields + rounded_up(at->zeros * kZeroBits, 8);
    const uint64_t stream_tables = exceptions + at->exception_count * kExceptionBytes;
    const uint64_t stream_sizes = stream_tables + block.streams;
    const uint64_t symbols = stream_sizes + block.streams * 2;
    if (symbols > block.bytes) return false;
    at->modes = sizeof(BlockHeader);
    at->alphas = at->modes + block.tiles;
    at->low = static_cast<uint32_t>(low);
    at->zero_fields = static_cast<uint32_t>(zero_fields);
    at->exceptions = static_cast<uint32_t>(exceptions);
    at->stream_tables = static_cast<uint32_t>(stream_tables);
    at->stream_sizes = static_cast<uint32_t>(stream_sizes);
    at->symbols = static_cast<uint32_t>(symbols);
    return true;
}

// The step of a tile of the frame: that of the last run that begins at or before it; 0 where there is none.
NACD_GPU float step_at(const Block& block, uint64_t tile) {
    uint32_t begin = 0, end = block.run_count;  // runs before `begin` start at or before the tile, from `end` on behind
    while (begin < end) {
        const uint32_t middle = begin + (end - begin) / 2;
        if (block.runs[middle].first_tile <= tile)
            begin = middle + 1;
        else
            end = middle;
    }
    return begin == 0 ? 0 : block.runs[begin - 1].step;
}

NACD_GPU Status open_tile(const Block& block, const Sections& at, uint32_t t, Shared& shared) {
    const uint8_t mode = block.payload[at.modes + t];
    const bool linear = block.predictor == Predictor::linear;
    shared.modes[t] = mode;
    shared.alphas[t] = linear ? tile_alpha(block.alpha, block.payload[at.alphas + t]) : 0;
    shared.steps[t] = mode >= kStepTile ? step_at(block, block.first_tile + t) : 0;
    if (mode >= kTileEnd || (mode < kGridTiles && block.zero_bits != 0)) return Status::bad_tile;
    return mode >= kStepTile && shared.steps[t] == 0 ? Status::bad_tile : Status::ok;
}

NACD_GPU Status open_streams(const Block& block, const Sections& at, Shared& shared) {
    Status status = Status::ok;
    PerLane<uint32_t> begins;
    each([&](uint32_t lane) {
        const bool inside = lane < block.streams;
        const uint8_t table = inside ? block.payload[at.stream_tables + lane] : 0;
        begins[lane] = inside ? load_bytes(block.payload + at.stream_sizes + 2 * lane, 2) : 0;
        shared.stream_tables[lane] = table;
        shared.stream_bytes[lane] = begins[lane];
        if (table >= block.tables) status = Status::bad_block;
    });
    const uint32_t total = sums_before(begins);
    each([&](uint32_t lane) { shared.stream_begins[lane] = at.symbols + begins[lane]; });
    return total == block.bytes - at.symbols ? status : Status::bad_block;
}

NACD_GPU Status open_block(const Block& block, Shared& shared, uint32_t warp, uint32_t warps) {
    Sections at;
    if (!find_sections(block, &at)) return Status::bad_block;
    Status status = warp == 0 ? open_streams(block, at, shared) : Status::ok;
    each([&](uint32_t lane) {
        const uint32_t thread = warp * kLanes + lane, threads = warps * kLanes;
        if (thread == 0) shared.at = at;
        for (uint32_t k = thread; k < block.tables * kTableSize; k += threads) shared.entries()[k] = block.entries[k];
        for (uint32_t t = thread; t < block.tiles; t += threads)
            if (const Status tile = open_tile(block, at, t, shared); status == Status::ok) status = tile;
    });
    return status;
}

// ---- phase 2: symbols, one stream a lane of the first warp

// The words that hold `bytes` bytes from p on, first to last, then zeros: a code cut short reads nothing behind them.
struct WordReader {
    const uint8_t* word;
    uint32_t left;  // words

    NACD_GPU uint32_t next() {
        if (left == 0) return 0;
        --left;
        word += 4;
        return load_word(word - 4);
    }
};

// As the table has them, except that only `left` of the entry's symbols are wanted.
NACD_GPU uint32_t bits_of_first(Entry entry, uint32_t left, const uint8_t* lengths) {
    uint32_t bits = 0;
    for (uint32_t k = 0; k < left; ++k) bits += lengths[entry >> (8 * k) & 0xff];
    return bits;
}

// False unless `count` symbols use up the stream's bytes.
NACD_GPU bool decode_stream(const Entry* table, const uint8_t* lengths, const uint8_t* stream, uint32_t bytes,
                            uint32_t count, int8_t* out) {
    const uint32_t skip = bytes_into_word(stream);
    WordReader reader{stream - skip, rounded_up(skip + bytes, 4)};
    uint64_t window = reader.next() >> (8 * skip);
    uint32_t filled = 32 - 8 * skip, used = 0;  // bits
    uint32_t next = reader.next();              // one word ahead of its use
    uint64_t symbols = 0;
    uint32_t held = 0;
    while (count > 0) {
        if (filled < 32) {
            window |= static_cast<uint64_t>(next) << filled;
            filled += 32;
            next = reader.next();
        }
        const Entry entry = table[window & (kTableSize - 1)];
        const uint32_t bits = entry >> 24 & 15, found = entry >> 28;
        const uint32_t taken = least(found, count);
        used += taken == found ? bits : bits_of_first(entry, taken, lengths);
        window >>= bits;
        filled -= bits;
        symbols |= static_cast<uint64_t>(entry & 0xffffff) << (8 * held);
        held += taken;
        count -= taken;
        if (held >= 4 || count == 0) {
            store_word(out, static_cast<uint32_t>(symbols));
            out += 4;
            symbols >>= 32;
            held -= least(held, 4);
            if (count == 0 && held > 0) store_word(out, static_cast<uint32_t>(symbols));
        }
    }
    return rounded_up(used, 8) == bytes;
}

NACD_GPU Status decode_symbols(const Block& block, Shared& shared, uint32_t warp, uint32_t) {
    if (warp != 0) return Status::ok;
    Status status = Status::ok;
    each([&](uint32_t lane) {
        if (lane >= block.streams) return;
        uint32_t count = 0;
        const uint32_t last = least((lane + 1) * kStreamTiles, block.tiles);
        for (uint32_t t = lane * kStreamTiles; t < last; ++t)
            if (has_symbols(shared.modes[t])) count += weights_in(block, t);
        const uint8_t* stream = block.payload + shared.stream_begins[lane];
        int8_t* out = shared.symbols + lane * kStreamStride;
        const Entry* table = shared.entries() + shared.stream_tables[lane] * kTableSize;
        const uint8_t* lengths = block.lengths + shared.stream_tables[lane] * kSymbols;
        if (!decode_stream(table, lengths, stream, shared.stream_bytes[lane], count, out)) status = Status::bad_stream;
    });
    return status;
}

// ---- tiles

struct Tile {
    uint32_t first, count;  // weights in the block
    uint8_t mode;
    float alpha;
    const int8_t* symbols;
};

NACD_GPU Tile tile_of(const Block& block, const Shared& shared, uint32_t t) {
    const uint32_t stream = t / kStreamTiles;
    uint32_t before = 0;  // tiles of the stream that have symbols
    for (uint32_t other = stream * kStreamTiles; other < t; ++other) before += has_symbols(shared.modes[other]);
    return {static_cast<uint32_t>(t * kTile), weights_in(block, t), shared.modes[t], shared.alphas[t],
            shared.symbols + stream * kStreamStride + before * kTile};
}

NACD_GPU uint32_t predicted(const Block& block, const Tile& tile, uint32_t i) {
    const uint32_t a = block.predictor == Predictor::none ? 0 : block.a[tile.first + i];
    const uint32_t b = block.predictor == Predictor::linear ? block.b[tile.first + i] : 0;
    return predict(block.predictor, tile.alpha, block.zero_bits, a, b);
}

NACD_GPU int32_t cell_of(const Block& block, const Tile& tile, float scale, uint32_t i) {
    return truncate(multiply(float_of(predicted(block, tile, i)), scale)) + tile.symbols[i];
}

// Low bits of each weight, in all modes but grid.
NACD_GPU int fixed_width(const Block& block, uint8_t mode) {
    if (mode >= kStepTile) return mode - kStepTile;
    if (mode == kRawTile) return 32 - block.zero_bits;
    return mode == kSameTile ? 0 : mode - kIntegerTile;
}

// `width` <= 32 bits at bit `position`, from the one or two aligned words that hold them.
NACD_GPU uint32_t bits_at(const uint8_t* stream, uint32_t position, int width) {
    const uint8_t* byte = stream + position / 8;
    const uint32_t bytes = bytes_into_word(byte), skip = 8 * bytes + position % 8;
    uint64_t window = load_word(byte - bytes);
    if (skip + static_cast<uint32_t>(width) > 32) window |= static_cast<uint64_t>(load_word(byte - bytes + 4)) << 32;
    return static_cast<uint32_t>(window >> skip & ((uint64_t{1} << width) - 1));
}

// ---- phase 3: how many low bits and zero fields each tile takes

NACD_GPU Status measure_tiles(const Block& block, Shared& shared, uint32_t warp, uint32_t warps) {
    for (uint32_t t = warp; t < block.tiles; t += warps) {
        const Tile tile = tile_of(block, shared, t);
        uint32_t low = 0, zeros = 0;
        if (tile.mode >= kGridTiles) {
            low = tile.count * static_cast<uint32_t>(fixed_width(block, tile.mode));
        } else {
            const float scale = power_of_two(kGridBias - tile.mode);
            PerLane<uint32_t> bits, zero_cells;
            each([&](uint32_t lane) {
                bits[lane] = zero_cells[lane] = 0;
                NACD_UNROLL
                for (uint32_t i = lane; i < tile.count; i += kLanes) {
                    const int32_t cell = cell_of(block, tile, scale, i);
                    bits[lane] += static_cast<uint32_t>(grid_low_bits(cell));
                    zero_cells[lane] += cell == 0;
                }
            });
            low = sum(bits);
            zeros = sum(zero_cells);
        }
        each([&](uint32_t lane) {
            if (lane == 0) shared.low[t] = low, shared.zeros[t] = zeros;
        });
    }
    return Status::ok;
}

// ---- phase 4: where they begin, by the first warp

NACD_GPU Status place_tiles(const Block& block, Shared& shared, uint32_t warp, uint32_t) {
    if (warp != 0) return Status::ok;
    constexpr uint32_t each_has = kBlockTiles / kLanes;
    PerLane<uint32_t> low, zeros;
    each([&](uint32_t lane) {
        low[lane] = zeros[lane] = 0;
        for (uint32_t t = lane * each_has; t < least((lane + 1) * each_has, block.tiles); ++t)
            low[lane] += shared.low[t], zeros[lane] += shared.zeros[t];
    });
    const uint32_t all_low = sums_before(low), all_zeros = sums_before(zeros);
    each([&](uint32_t lane) {
        for (uint32_t t = lane * each_has; t < least((lane + 1) * each_has, block.tiles); ++t) {
            const uint32_t tile_low = shared.low[t], tile_zeros = shared.zeros[t];
            shared.low[t] = low[lane], shared.zeros[t] = zeros[lane];
            low[lane] += tile_low, zeros[lane] += tile_zeros;
        }
    });
    const bool fits = rounded_up(all_low, 8) == shared.at.low_bytes;
    return fits && (block.base_only || all_zeros == shared.at.zeros) ? Status::ok : Status::bad_stream;
}

// ---- phase 5: words

NACD_GPU void write_grid(const Block& block, const Shared& shared, const Tile& tile, uint32_t low_at, uint32_t zero_at) {
    const int e = tile.mode - kGridBias;
    const float scale = power_of_two(-e);
    const uint8_t* low = block.payload + shared.at.low;
    const uint8_t* zero_fields = block.payload + shared.at.zero_fields;
    NACD_UNROLL
    for (uint32_t first = 0; first < tile.count; first += kLanes) {
        PerLane<int32_t> cells;
        PerLane<uint32_t> begins;
        PerLane<bool> is_zero;
        each([&](uint32_t lane) {
            const bool inside = first + lane < tile.count;
            cells[lane] = inside ? cell_of(block, tile, scale, first + lane) : 0;
            begins[lane] = static_cast<uint32_t>(grid_low_bits(cells[lane]));
            is_zero[lane] = inside && cells[lane] == 0;
        });
        const uint32_t bits = sums_before(begins), zeros = lanes_where(is_zero);
        each([&](uint32_t lane) {
            if (first + lane >= tile.count) return;
            const int32_t cell = cells[lane];
            uint32_t word;
            if (is_zero[lane]) {
                const uint32_t field = zero_at + popcount(zeros & ((1u << lane) - 1));
                word = zero_word(bits_at(zero_fields, field * kZeroBits, kZeroBits), e);
            } else {
                word = grid_word(cell, bits_at(low, low_at + begins[lane], grid_low_bits(cell)), e);
            }
            block.dst[tile.first + first + lane] = word;
        });
        low_at += bits;
        zero_at += popcount(zeros);
    }
}

NACD_GPU uint32_t word_of(const Block& block, const Tile& tile, float step, float inverse, uint32_t low, uint32_t i) {
    const uint32_t p = tile.mode == kRawTile ? 0 : predicted(block, tile, i);
    if (tile.mode == kRawTile) return low << block.zero_bits;
    if (tile.mode == kSameTile) return p;
    const int shift = fixed_width(block, tile.mode);
    return tile.mode >= kStepTile ? step_word(tile.symbols[i], low, shift, p, step, inverse)
                                  : integer_word(tile.symbols[i], low, shift, p, block.zero_bits);
}

NACD_GPU Status write_tiles(const Block& block, Shared& shared, uint32_t warp, uint32_t warps) {
    for (uint32_t t = warp; t < block.tiles; t += warps) {
        const Tile tile = tile_of(block, shared, t);
        if (tile.mode < kGridTiles && !block.base_only) {
            write_grid(block, shared, tile, shared.low[t], shared.zeros[t]);
        } else if (tile.mode < kGridTiles) {
            const int e = tile.mode - kGridBias;
            each([&](uint32_t lane) {
                for (uint32_t i = lane; i < tile.count; i += kLanes)
                    block.dst[tile.first + i] = grid_middle(cell_of(block, tile, power_of_two(-e), i), e);
            });
        } else {
            const int width = fixed_width(block, tile.mode);
            const float step = shared.steps[t], inverse = reciprocal(step);
            const uint8_t* low = block.payload + shared.at.low;
            each([&](uint32_t lane) {
                NACD_UNROLL
                for (uint32_t i = lane; i < tile.count; i += kLanes) {
                    const uint32_t at = shared.low[t] + i * static_cast<uint32_t>(width);
                    const uint32_t bits = width == 0 ? 0 : bits_at(low, at, width);
                    block.dst[tile.first + i] = word_of(block, tile, step, inverse, bits, i);
                }
            });
        }
    }
    return Status::ok;
}

// ---- phase 6: exceptions

// Of two with one index the later stays, as everywhere: they fall to one warp, which takes 32 exceptions at a time, and of
// those the last.
NACD_GPU Status write_exceptions(const Block& block, Shared& shared, uint32_t warp, uint32_t warps) {
    Status status = Status::ok;
    const uint8_t* exceptions = block.payload + shared.at.exceptions;
    for (uint32_t first = 0; first < shared.at.exception_count; first += kLanes) {
        PerLane<uint32_t> indices;
        each([&](uint32_t lane) {
            const bool inside = first + lane < shared.at.exception_count;
            indices[lane] = inside ? load_bytes(exceptions + (first + lane) * kExceptionBytes, 2) : kBlock;
            if (inside && indices[lane] >= block.count) status = Status::bad_stream;
        });
        PerLane<bool> is_last = are_last(indices);
        each([&](uint32_t lane) {
            const uint32_t index = indices[lane];
            if (index < block.count && index % warps == warp && is_last[lane])
                block.dst[index] = load_bytes(exceptions + (first + lane) * kExceptionBytes + 2, 4);
        });
        in_order();
    }
    return status;
}

}  // namespace nacd::gpu
