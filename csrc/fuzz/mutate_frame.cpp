// libFuzzer's mutator for frames: after a mutation it mostly makes the sizes fit again, so that what lies behind the
// checks of head and sections is reached. The checks themselves see the rest.
#include <algorithm>
#include <cmath>

#include "../frame.h"
#include "fuzz.h"

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size);

namespace {

using namespace nacd;
using namespace nacd::fuzz;

constexpr size_t kOptionBytes = 8;  // behind the frame: see fuzz_decode.cpp
constexpr uint64_t kMostWeights = kBlock + kTile + 1;

// Drops codes until the lengths fit.
void repair_lengths(uint8_t* packed) {
    size_t claimed = 0;
    for (size_t s = 0; s < kSymbols; ++s) {
        const int shift = s % 2 == 0 ? 0 : 4, length = packed[s / 2] >> shift & 15;
        if (length == 0) continue;
        const size_t claim = length > kCodeBits ? kTableSize + 1 : kTableSize >> length;
        if (claimed + claim > kTableSize)
            packed[s / 2] = static_cast<uint8_t>(packed[s / 2] & ~(15 << shift));
        else
            claimed += claim;
    }
}

// Sizes that fill the block: each at most what is left, the last stream all of it.
void repair_block(uint8_t* block, size_t bytes, size_t count, const FrameHeader& header) {
    const size_t tiles = divide_up(count, kTile), streams = divide_up(tiles, kStreamTiles);
    const size_t alphas = header.predictor == static_cast<uint8_t>(Predictor::linear) ? tiles : 0;
    const size_t least = sizeof(BlockHeader) + tiles + alphas + 3 * streams;
    if (bytes < least) return;
    size_t left = bytes - least;
    auto sizes = read_at<BlockHeader>(block);
    const auto fit = [&](uint32_t wanted, size_t unit, size_t most) {
        const size_t n = std::min<size_t>({wanted, most, left * 8 / unit});
        left -= std::min(left, divide_up(n * unit, 8));
        return static_cast<uint32_t>(n);
    };
    sizes.low_bytes = fit(sizes.low_bytes, 8, left);
    sizes.zeros = fit(sizes.zeros, kZeroBits, count);
    sizes.exceptions = fit(sizes.exceptions, 8 * kExceptionBytes, count);
    write_at(block, sizes);
    for (size_t t = 0; t < tiles; ++t) {
        uint8_t& mode = block[sizeof(BlockHeader) + t];
        mode = static_cast<uint8_t>(mode % kTileEnd);
        if (mode < kGridTiles && header.zero_bits != 0) mode = static_cast<uint8_t>(kIntegerTile + mode % 25);
        if (mode >= kStepTile && header.runs == 0) mode = kRawTile;
    }
    uint8_t* at = block + sizeof(BlockHeader) + tiles + alphas + sizes.low_bytes + zero_bytes(sizes.zeros) +
                  sizes.exceptions * kExceptionBytes;
    for (size_t s = 0; s < streams; ++s, ++at) *at = static_cast<uint8_t>(*at % header.tables);
    for (size_t s = 0; s < streams; ++s) {
        const size_t size = s + 1 == streams ? left : std::min<size_t>(read_at<uint16_t>(at + 2 * s), left);
        write_at(at + 2 * s, static_cast<uint16_t>(size));
        left -= size;
    }
}

void repair_frame(uint8_t* frame, size_t size) {
    if (size < sizeof(FrameHeader)) return;
    auto header = read_at<FrameHeader>(frame);
    header.magic = kFrameMagic, header.version = kFrameVersion, header.reserved = 0;
    header.predictor = static_cast<uint8_t>(header.predictor % 3);
    header.zero_bits = header.zero_bits >= 8 ? 16 : 0;
    if (header.count > kMostWeights) header.count %= 5 * kStreamTiles * kTile;  // small: executions are many
    header.blocks = static_cast<uint32_t>(block_count(header.count));
    if (header.tables < 1 || header.tables > kMaxTables) header.tables = header.tables % kMaxTables + 1;
    if (header.runs > divide_up(header.count, kTile) || header.zero_bits != 0) header.runs = 0;
    if (header.predictor != static_cast<uint8_t>(Predictor::linear) || !std::isfinite(header.alpha)) header.alpha = 0;
    size_t at = head_bytes(header.tables, header.runs, header.blocks);
    if (at > size) return;
    for (uint32_t k = 0; k < header.tables; ++k) repair_lengths(frame + sizeof(FrameHeader) + k * kLengthBytes);
    uint32_t next = 0;
    for (uint32_t k = 0; k < header.runs; ++k) {
        uint8_t* place = frame + runs_at(header.tables) + k * sizeof(StepRun);
        auto run = read_at<StepRun>(place);
        run.first_tile = std::max(next, run.first_tile & 255);
        next = run.first_tile + 1;
        if (!(run.step > 1e-30f && run.step < 1e30f)) run.step = 0.001f;
        write_at(place, run);
    }
    for (uint32_t i = 0; i < header.blocks; ++i) {
        uint8_t* place = frame + directory_at(header.tables, header.runs) + i * sizeof(BlockEntry);
        auto entry = read_at<BlockEntry>(place);
        if (i + 1 == header.blocks || entry.bytes > size - at) entry.bytes = static_cast<uint32_t>(size - at);
        write_at(place, entry);
        repair_block(frame + at, entry.bytes, weights_in(header.count, i), header);
        at += entry.bytes;
    }
    header.bytes = at;
    write_at(frame, header);
}

}  // namespace

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size, unsigned seed) {
    size = LLVMFuzzerMutate(data, size, max_size);
    if (seed % 8 != 0 && size > kOptionBytes) repair_frame(data, size - kOptionBytes);
    return size;
}
