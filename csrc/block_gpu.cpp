// The host's side of block_gpu.h: plans, checksums, and its phases run on the host for tests.
#include "block_gpu.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <vector>

#include "codec_cuda.h"
#include "frame.h"

namespace nacd::gpu {

namespace {

bool make_table(const uint8_t lengths[kSymbols], Entry table[kTableSize]) {
    alignas(64) TableEntry six[kTableSize];
    if (!huffman_table(lengths, six)) return false;
    for (size_t i = 0; i < kTableSize; ++i) {
        auto count = static_cast<uint32_t>(six[i] >> 56), bits = static_cast<uint32_t>(six[i] >> 48 & 0xff);
        for (; count > kMostSymbols; --count) bits -= lengths[six[i] >> (8 * (count - 1)) & 0xff];
        table[i] = static_cast<uint32_t>(six[i] & 0xffffff) | bits << 24 | count << 28;
    }
    return true;
}

}  // namespace

size_t plan_bytes(const FrameInfo& info, uint64_t blocks) noexcept {
    return plan_places_at(info.header.tables, info.header.runs) + blocks * sizeof(Place);
}

size_t shared_bytes(const FrameInfo& info) noexcept { return shared_bytes(info.header.tables); }

Status make_plan(const uint8_t* head, const FrameInfo& info, uint64_t first, uint64_t blocks, uint8_t* plan) noexcept {
    const FrameHeader& h = info.header;
    uint64_t begin = 0, end = 0;
    if (const Status status = block_range(head, info, first, blocks, &begin, &end); status != Status::ok) return status;
    const Plan fixed{first,       static_cast<uint32_t>(blocks), h.runs, h.alpha, h.predictor,
                     h.zero_bits, static_cast<uint16_t>(h.tables)};
    std::memcpy(plan, &fixed, sizeof fixed);
    for (uint32_t k = 0; k < h.tables; ++k) {
        uint8_t* lengths = plan + plan_lengths_at(h.tables) + k * kSymbols;
        read_lengths(head, k, lengths);
        Entry table[kTableSize];
        if (!make_table(lengths, table)) return Status::bad_table;
        std::memcpy(plan + sizeof(Plan) + k * sizeof table, table, sizeof table);
    }
    std::memcpy(plan + plan_runs_at(h.tables), head + runs_at(h.tables), h.runs * sizeof(StepRun));
    uint64_t offset = 0;
    for (uint64_t i = 0; i < blocks; ++i) {
        const uint32_t bytes = entry_of(head, h, first + i).bytes;
        const uint64_t count = std::min<uint64_t>(kBlock, h.count - (first + i) * kBlock);
        const Place place{offset, bytes, static_cast<uint32_t>(count)};
        std::memcpy(plan + plan_places_at(h.tables, h.runs) + i * sizeof place, &place, sizeof place);
        offset += bytes;
    }
    return Status::ok;
}

Status check_payload(const uint8_t* head, const FrameInfo& info, const uint8_t* payload, size_t payload_bytes,
                     uint64_t first, uint64_t blocks) noexcept {
    uint64_t begin = 0, end = 0;
    if (const Status status = block_range(head, info, first, blocks, &begin, &end); status != Status::ok) return status;
    if (end - begin != payload_bytes) return Status::truncated;
    for (uint64_t i = first; i < first + blocks; ++i) {
        const BlockEntry entry = entry_of(head, info.header, i);
        if (checksum_matters() && crc32c(0, payload, entry.bytes) != entry.payload_crc) return Status::bad_checksum;
        payload += entry.bytes;
    }
    return Status::ok;
}

namespace {

using Phase = Status (*)(const Block& block, Shared& shared, uint32_t warp, uint32_t warps);
constexpr Phase kPhases[] = {open_block, decode_symbols, measure_tiles, place_tiles, write_tiles, write_exceptions};

Status decode_block(const Launch& launch, uint64_t i, Shared& shared) {
    const Block block = block_of(launch, i);
    for (const Phase phase : kPhases) {
        Status status = Status::ok;
        for (uint32_t warp = 0; warp < kWarps; ++warp)
            if (const Status other = phase(block, shared, warp, kWarps); status == Status::ok) status = other;
        if (status != Status::ok) return status;
    }
    return Status::ok;
}

}  // namespace

Status decode_emulated(const uint8_t* head, const FrameInfo& info, const uint8_t* payload, size_t payload_bytes,
                       uint64_t first, uint64_t blocks, const uint32_t* a, const uint32_t* b, uint32_t* dst,
                       bool base_only) noexcept {
    Status status = check_payload(head, info, payload, payload_bytes, first, blocks);
    if (status != Status::ok) return status;
    if (references_missing(static_cast<Predictor>(info.header.predictor), a, b)) return Status::bad_argument;
    const FloatEnvironment environment;
    try {
        std::vector<uint64_t> plan(plan_bytes(info, blocks) / 8);  // aligned as on the GPU, all three
        std::vector<uint32_t> copy((payload_bytes + kGpuSlack + 3) / 4);
        std::vector<uint64_t> shared((shared_bytes(info) + 7) / 8);
        auto* bytes = reinterpret_cast<uint8_t*>(copy.data());
        if (payload_bytes > 0) std::memcpy(bytes, payload, payload_bytes);
        status = make_plan(head, info, first, blocks, reinterpret_cast<uint8_t*>(plan.data()));
        const Launch launch{reinterpret_cast<const uint8_t*>(plan.data()), bytes, a, b, dst, base_only};
        for (uint64_t i = 0; i < blocks && status == Status::ok; ++i) status = decode_block(launch, i, *reinterpret_cast<Shared*>(shared.data()));
    } catch (const std::bad_alloc&) {
        return Status::no_memory;
    }
    return status;
}

}  // namespace nacd::gpu
