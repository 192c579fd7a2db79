// One block on a GPU: decoded by the warps of one thread block, in phases with a barrier behind each.
//
// The ordinary compiler builds the same functions for tests (block_gpu.cpp). So a warp's work is written lane by lane:
// each(f) calls f(lane), on the GPU once in every lane, on the host for 32 lanes in turn; PerLane holds what a lane
// keeps between two such calls; lanes exchange values through the functions below and nothing else.
//
// Whatever bytes a block holds, nothing outside its payload (and kGpuSlack bytes), its words and its references is
// touched: sizes and indices are checked where they are read, bit positions before the first is used.
#pragma once

#include <algorithm>
#include <bit>
#include <cstring>
#include <memory>

#include "codec.h"
#include "format.h"
#include "huffman.h"
#include "weight.h"

#ifdef __CUDACC__
#define NACD_GPU __device__ inline
#define NACD_UNROLL _Pragma("unroll 4")
#else
#define NACD_GPU inline
#define NACD_UNROLL
#endif

namespace nacd::gpu {

inline constexpr uint32_t kLanes = 32;
inline constexpr uint32_t kWarps = 8;  // of a thread block
static_assert(kBlockStreams == kLanes, "one lane decodes one stream");

// Bits are read in aligned words: a payload may be read this far past its end, and begins at a multiple of 4 bytes.
inline constexpr size_t kGpuSlack = 8;

// ---- lanes

#ifdef __CUDACC__

template <class T>
struct PerLane {
    T value;
    __device__ T& operator[](uint32_t) { return value; }
};

template <class F>
__device__ inline void each(F f) {
    f(threadIdx.x % kLanes);
}

__device__ inline uint32_t sum(PerLane<uint32_t>& x) { return __reduce_add_sync(~0u, x.value); }

// Each lane's value becomes the sum of those before it; returns the sum of all.
__device__ inline uint32_t sums_before(PerLane<uint32_t>& x) {
    uint32_t upto = x.value;
    for (uint32_t distance = 1; distance < kLanes; distance *= 2) {
        const uint32_t other = __shfl_up_sync(~0u, upto, distance);
        if (threadIdx.x % kLanes >= distance) upto += other;
    }
    x.value = upto - x.value;
    return __shfl_sync(~0u, upto, kLanes - 1);
}

// A bit for each lane whose value is true.
__device__ inline uint32_t lanes_where(PerLane<bool>& x) { return __ballot_sync(~0u, x.value); }

// In the last lane of those that have the same value: true.
__device__ inline PerLane<bool> are_last(PerLane<uint32_t>& x) {
    return {__match_any_sync(~0u, x.value) >> threadIdx.x % kLanes == 1};
}

// What a lane stored before, the others' stores behind this follow.
__device__ inline void in_order() { __syncwarp(); }

__device__ inline uint32_t popcount(uint32_t x) { return static_cast<uint32_t>(__popc(x)); }

__device__ inline uint32_t load_word(const uint8_t* p) { return __ldg(reinterpret_cast<const uint32_t*>(p)); }

__device__ inline void store_word(int8_t* p, uint32_t x) { *reinterpret_cast<uint32_t*>(p) = x; }

__device__ inline float reciprocal(float x) { return __frcp_rn(x); }

#else

template <class T>
struct PerLane {
    T values[kLanes];
    T& operator[](uint32_t lane) { return values[lane]; }
};

template <class F>
void each(F f) {
    for (uint32_t lane = 0; lane < kLanes; ++lane) f(lane);
}

inline uint32_t sum(PerLane<uint32_t>& x) {
    uint32_t total = 0;
    each([&](uint32_t lane) { total += x[lane]; });
    return total;
}

inline uint32_t sums_before(PerLane<uint32_t>& x) {
    uint32_t total = 0;
    each([&](uint32_t lane) {
        const uint32_t value = x[lane];
        x[lane] = total;
        total += value;
    });
    return total;
}

inline uint32_t lanes_where(PerLane<bool>& x) {
    uint32_t mask = 0;
    each([&](uint32_t lane) { mask |= static_cast<uint32_t>(x[lane]) << lane; });
    return mask;
}

inline PerLane<bool> are_last(PerLane<uint32_t>& x) {
    PerLane<bool> last;
    each([&](uint32_t lane) {
        last[lane] = std::find(x.values + lane + 1, x.values + kLanes, x[lane]) == x.values + kLanes;
    });
    return last;
}

inline void in_order() {}

inline uint32_t popcount(uint32_t x) { return static_cast<uint32_t>(std::popcount(x)); }

inline uint32_t load_word(const uint8_t* p) {
    uint32_t x;
    std::memcpy(&x, std::assume_aligned<4>(p), sizeof x);
    return x;
}

inline void store_word(int8_t* p, uint32_t x) { std::memcpy(std::assume_aligned<4>(p), &x, sizeof x); }

inline float reciprocal(float x) { return 1.0f / x; }

#endif

NACD_GPU uint32_t least(uint32_t x, uint32_t y) { return x < y ? x : y; }
NACD_GPU uint32_t rounded_up(uint32_t x, uint32_t y) { return (x + y - 1) / y; }
NACD_GPU uint32_t aligned_down(const uint8_t* p) { return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(p) & 3); }

// ---- a launch

// Up to three symbols a lookup: symbols in bytes 0 .. 2, bits taken in the low half of byte 3, their number above it.
using Entry = uint32_t;
inline constexpr int kMostSymbols = 3;

struct Place {
    uint64_t offset;  // in the payload of the launch
    uint32_t bytes;
    uint32_t count;   // weights
};

// What a launch knows of its frame, checked by the host: this, then tables [tables x kTableSize], code lengths
// [tables x kSymbols], runs [runs], places [blocks].
struct Plan {
    uint64_t first;   // block in the frame
    uint32_t blocks;
    uint32_t runs;
    float alpha;
    uint8_t predictor;
    uint8_t zero_bits;
    uint16_t tables;
};
static_assert(sizeof(Plan) == 24 && sizeof(Place) == 16);

inline constexpr size_t kTableBytes = kTableSize * sizeof(Entry);
static_assert(sizeof(Plan) % 8 == 0 && kTableBytes % 8 == 0 && kSymbols % 8 == 0);

NACD_HD constexpr size_t plan_lengths_at(size_t tables) { return sizeof(Plan) + tables * kTableBytes; }
NACD_HD constexpr size_t plan_runs_at(size_t tables) { return plan_lengths_at(tables) + tables * kSymbols; }
NACD_HD constexpr size_t plan_places_at(size_t tables, size_t runs) { return plan_runs_at(tables) + runs * sizeof(StepRun); }

// Everything here lies where the code runs. a, b (null where the predictor takes none) and dst begin with the first
// block's words; dst overlaps neither.
struct Launch {
    const uint8_t* plan;     // at a multiple of 8 bytes
    const uint8_t* payload;  // of the plan's blocks
    const uint32_t* a;
    const uint32_t* b;
    uint32_t* dst;
    bool base_only;
};

// One block's share of it.
struct Block {
    const uint8_t* payload;
    uint32_t bytes, count, tiles, streams;
    uint64_t first_tile;  // in the frame
    const uint32_t* a;
    const uint32_t* b;
    uint32_t* dst;
    Predictor predictor;
    int zero_bits;
    float alpha;
    bool base_only;
    const Entry* entries;  // of `tables` tables
    const uint8_t* lengths;
    uint32_t tables;
    const StepRun* runs;
    uint32_t run_count;
};

NACD_GPU Block block_of(const Launch& launch, uint64_t i) {
    const Plan plan = *reinterpret_cast<const Plan*>(launch.plan);
    const uint8_t* places = launch.plan + plan_places_at(plan.tables, plan.runs);
    const Place place = reinterpret_cast<const Place*>(places)[i];
    const uint64_t first = i * kBlock;
    const uint32_t tiles = rounded_up(place.count, kTile);
    return {launch.payload + place.offset,
            place.bytes, place.count, tiles, rounded_up(tiles, kStreamTiles),
            (plan.first + i) * kBlockTiles,
            launch.a == nullptr ? nullptr : launch.a + first,
            launch.b == nullptr ? nullptr : launch.b + first,
            launch.dst + first,
            static_cast<Predictor>(plan.predictor), plan.zero_bits, plan.alpha, launch.base_only,
            reinterpret_cast<const Entry*>(launch.plan + sizeof(Plan)),
            launch.plan + plan_lengths_at(plan.tables), plan.tables,
            reinterpret_cast<const StepRun*>(launch.plan + plan_runs_at(plan.tables)), plan.runs};
}

// Weights in tile t.
NACD_GPU uint32_t weights_in(const Block& block, uint32_t t) {
    const auto first = static_cast<uint32_t>(t * kTile);
    return least(kTile, block.count - first);
}

// Offsets of a block's sections from its payload, and their sizes.
struct Sections {
    uint32_t modes, alphas;
    uint32_t low, low_bytes;
    uint32_t zero_fields, zeros;
    uint32_t exceptions, exception_count;
    uint32_t stream_tables, stream_sizes, symbols;
};

// A stream's symbols. Lanes write theirs at about the same pace: an odd number of words keeps them in different banks.
inline constexpr uint32_t kStreamStride = kStreamTiles * kTile + 4;

// The block in the GPU's shared memory; the frame's tables follow.
struct Shared {
    int8_t symbols[kBlockStreams * kStreamStride];  // of tiles that have them, one behind the other in each stream
    Sections at;
    uint8_t stream_tables[kBlockStreams];
    uint32_t stream_begins[kBlockStreams];  // from the payload
    uint32_t stream_bytes[kBlockStreams];
    float alphas[kBlockTiles];
    float steps[kBlockTiles];
    uint32_t low[kBlockTiles];    // bits of the tile; then, where they begin
    uint32_t zeros[kBlockTiles];  // zero fields, likewise
    uint8_t modes[kBlockTiles];

    NACD_GPU Entry* entries() { return reinterpret_cast<Entry*>(this + 1); }
};

inline constexpr size_t shared_bytes(size_t tables) { return sizeof(Shared) + tables * kTableBytes; }
static_assert(3 * (shared_bytes(1) + 1024) <= 228 * 1024, "three thread blocks on a multiprocessor of sm_90");
static_assert(2 * (shared_bytes(kMaxTables) + 1024) <= 228 * 1024, "two, at least");
static_assert(shared_bytes(kMaxTables) <= 99 * 1024, "what every GPU from sm_80 on has");

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
    const uint32_t skip = aligned_down(stream);
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
    const uint32_t bytes = aligned_down(byte), skip = 8 * bytes + position % 8;
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
