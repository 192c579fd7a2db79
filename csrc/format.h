// The byte layout of a frame, in C++; FORMAT.md says the same in prose. Little-endian, no padding between fields.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

namespace nacd {

static_assert(std::endian::native == std::endian::little, "the format is read and written in place");

inline constexpr uint32_t kFrameMagic = 0x4d52464e;  // "NFRM"
inline constexpr uint16_t kFrameVersion = 1;

inline constexpr size_t kTile = 512;             // weights that share a mode
inline constexpr size_t kBlock = 65536;          // weights that are decoded together
inline constexpr size_t kStreamTiles = 4;        // tiles of one symbol stream: 32 streams a full block
inline constexpr size_t kBlockTiles = kBlock / kTile;
inline constexpr size_t kBlockStreams = kBlockTiles / kStreamTiles;

inline constexpr size_t kSymbols = 256;          // residuals -128 .. 127, as bytes
inline constexpr int kCodeBits = 11;             // the longest Huffman code
inline constexpr size_t kLengthBytes = kSymbols / 2;  // code lengths of a table, two a byte
inline constexpr size_t kMaxTables = 4;          // codes of a frame; each stream takes one
inline constexpr int kZeroBits = 27;             // the field of a weight in the zero cell: sign, 3 of exponent, mantissa
inline constexpr size_t kExceptionBytes = 6;     // u16 index in the block, u32 word

inline constexpr uint32_t kMaxBlockBytes = 1 << 20;  // of a block's payload
inline constexpr uint64_t kMaxCount = uint64_t{1} << 40;  // weights in a frame

// A frame may be read this far past its end: the hot loops check bounds once a tile, not once a weight.
inline constexpr size_t kSlack = 4096;
static_assert(kSlack >= kStreamTiles * kTile * kCodeBits / 8 + 64 && kSlack >= kTile * 4 + 64);

// none: 0. previous: a. linear: a + alpha_t (b - a), each operation rounded; alpha_t = alpha + tile's byte / 128.
enum class Predictor : uint8_t { none = 0, previous = 1, linear = 2 };
inline constexpr float kAlphaUnit = 1.0f / 128;

// One byte a tile: the mode, with its exponent or shift.
//     0 .. 191  grid     cells of 2^(value - 118)
//   192 .. 216  integer  shift 0 .. 24
//   217         same     the prediction itself
//   218         raw      the words
//   219 .. 234  step     multiples of the run's step, shift 0 .. 15
inline constexpr int kGridTiles = 192, kGridBias = 118;
inline constexpr int kIntegerTile = 192, kMaxIntegerShift = 24;
inline constexpr int kSameTile = 217, kRawTile = 218;
inline constexpr int kStepTile = 219, kMaxStepShift = 15;
inline constexpr int kTileEnd = kStepTile + kMaxStepShift + 1;

struct FrameHeader {
    uint32_t magic;
    uint16_t version;
    uint8_t predictor;   // Predictor
    uint8_t zero_bits;   // low bits of every word that are zero: 0 for float32, 16 for bfloat16
    uint64_t count;      // weights
    uint64_t bytes;      // the whole frame
    float alpha;         // of the linear predictor; 0 otherwise
    uint32_t blocks;     // ceil(count / kBlock)
    uint32_t runs;       // step runs; 0 where no tile is of mode step
    uint32_t tables;     // 1 .. kMaxTables
    uint32_t reserved;   // 0
    uint32_t crc;        // CRC-32C of the head (header, code lengths, runs, directory) with this field zero
};
static_assert(sizeof(FrameHeader) == 48);

// Tiles from first_tile on, up to the next run, quantise with this step.
struct StepRun {
    uint32_t first_tile;
    float step;
};
static_assert(sizeof(StepRun) == 8);

struct BlockEntry {
    uint32_t bytes;        // of the block's payload
    uint32_t payload_crc;  // CRC-32C of the payload
    uint32_t words_crc;    // CRC-32C of the decoded words
};
static_assert(sizeof(BlockEntry) == 12);

// A block's payload: this, then modes [T], alphas [T] (linear predictor only), low bits, zero fields, exceptions, stream
// tables [u8 x S], stream sizes [u16 x S], streams.
struct BlockHeader {
    uint32_t low_bytes;
    uint32_t zeros;
    uint32_t exceptions;
};
static_assert(sizeof(BlockHeader) == 12);

}  // namespace nacd
