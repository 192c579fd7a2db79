// Between a frame and its blocks: a block taken apart, what coding one needs, and the kernels that do it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "codec.h"
#include "format.h"
#include "huffman.h"

namespace nacd {

inline constexpr size_t divide_up(size_t x, size_t y) { return (x + y - 1) / y; }
inline constexpr size_t zero_bytes(size_t zeros) { return divide_up(zeros * kZeroBits, 8); }
inline constexpr bool has_symbols(uint8_t tile) { return tile != kSameTile && tile != kRawTile; }

// The parts of a block's payload, within it and without gaps.
struct BlockView {
    size_t count, tiles, streams;   // weights, ceil(count / kTile), ceil(tiles / kStreamTiles)
    const uint8_t* modes;           // [tiles]
    const uint8_t* alphas;          // [tiles], null unless the predictor is linear
    const uint8_t* low;             // [low_bytes]
    size_t low_bytes;
    const uint8_t* zero_fields;     // [zeros] of kZeroBits bits
    size_t zeros;
    const uint8_t* exceptions;      // [exception_count] of kExceptionBytes bytes
    size_t exception_count;
    const uint8_t* stream_tables;   // [streams]
    const uint8_t* stream_sizes;    // [streams] u16
    const uint8_t* symbols;         // the streams, one behind the other
};

Status view_block(const uint8_t* payload, size_t bytes, size_t count, const FrameHeader& header, BlockView* view) noexcept;

// What decoding any block of a frame needs.
struct DecodeFrame {
    Predictor predictor;
    int zero_bits;
    float alpha;
    const StepRun* runs;
    size_t run_count;
    bool base_only;
    const TableEntry* tables;  // [header.tables x kTableSize]
};

// The last of `runs`, in ascending order, that begins at or before `tile`, counted in the frame; null if there is none.
template <class Run>
const Run* run_at(const Run* runs, size_t count, size_t tile) {
    const Run* end = std::upper_bound(runs, runs + count, tile, [](size_t t, const Run& run) { return t < run.first_tile; });
    return end == runs ? nullptr : end - 1;
}

// What encoding any block of a frame needs.
struct EncodeFrame {
    Predictor predictor;
    int zero_bits;
    float alpha;
    const StepRequest* runs;
    size_t run_count;
};

// A block's sections as encode_block leaves them; the arrays are the caller's.
struct BlockParts {
    uint8_t modes[kBlockTiles];
    uint8_t alphas[kBlockTiles];
    uint8_t* low;         // room for low_bound bytes
    size_t low_bytes;
    uint32_t* zeros;      // [kBlock] fields
    size_t zero_count;
    uint8_t* exceptions;  // room for exception_bound bytes
    size_t exception_count;
    int8_t* symbols;      // [count]: those of tiles with symbols, one behind the other
    size_t stream_symbols[kBlockStreams];  // how many of them are in each stream
    double max_error;
};

inline constexpr size_t kTileExceptions = 64;  // a tile with more is stored raw
inline constexpr size_t kLowBound = kBlock * 4 + 64;
inline constexpr size_t kExceptionBound = kBlockTiles * kTileExceptions * kExceptionBytes;

// The kernels of one instruction set. Its functions are declared here for block_decode.cpp and block_encode.cpp, which
// are compiled once for each, NACD_ISA being the namespace.
struct Kernels {
    const char* name;
    // first_tile: of the block in the frame, for its step. a, b: null where the predictor takes none.
    Status (*decode_block)(const DecodeFrame& frame, const BlockView& block, size_t first_tile, const uint32_t* a,
                           const uint32_t* b, uint32_t* dst);
    void (*encode_block)(const EncodeFrame& frame, size_t first_tile, const uint32_t* words, const uint32_t* a,
                         const uint32_t* b, size_t count, BlockParts* parts);
    // Adds the symbols to the histogram.
    void (*count_symbols)(const int8_t* symbols, size_t count, uint64_t histogram[kSymbols]);
    // Returns the stream's bytes; dst has room for 8 more.
    size_t (*pack_symbols)(const Code codes[kSymbols], const int8_t* symbols, size_t count, uint8_t* dst);
};

#define NACD_DECLARE_KERNELS(isa)                                                                                    \
    namespace isa {                                                                                                  \
    Status decode_block(const DecodeFrame&, const BlockView&, size_t, const uint32_t*, const uint32_t*, uint32_t*);  \
    void encode_block(const EncodeFrame&, size_t, const uint32_t*, const uint32_t*, const uint32_t*, size_t,         \
                      BlockParts*);                                                                                  \
    void count_symbols(const int8_t*, size_t, uint64_t[kSymbols]);                                                   \
    size_t pack_symbols(const Code[kSymbols], const int8_t*, size_t, uint8_t*);                                      \
    inline constexpr Kernels kKernels{#isa, decode_block, encode_block, count_symbols, pack_symbols};                \
    }

NACD_DECLARE_KERNELS(portable)
#ifdef NACD_HAVE_AVX2
NACD_DECLARE_KERNELS(avx2)
#endif

}  // namespace nacd
