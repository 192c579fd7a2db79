// What a GPU is given to decode blocks: the host's plan of a launch, a block's share of it, and its shared memory.
#pragma once

#include <cstddef>
#include <cstdint>

#include "format.h"
#include "huffman.h"
#include "lanes.h"
#include "weight.h"

namespace nacd::gpu {

inline constexpr uint32_t kWarps = 8;  // of a thread block
static_assert(kBlockStreams == kLanes, "one lane decodes one stream");

// Bits are read in aligned words: a payload may be read this far past its end, and begins at a multiple of 4 bytes.
inline constexpr size_t kGpuSlack = 8;

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

}  // namespace nacd::gpu
