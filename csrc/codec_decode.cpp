// Frames: reading heads, decoding on threads. Blocks are decoded by the kernels of block_decode.cpp.
#include <cmath>
#include <cstring>
#include <new>
#include <utility>
#include <vector>

#include "block.h"
#include "codec.h"
#include "frame.h"
#include "huffman.h"
#include "weight.h"

namespace nacd {

const char* version() noexcept { return NACD_VERSION; }

const char* describe(Status status) noexcept {
    switch (status) {
        case Status::ok: return "ok";
        case Status::bad_argument: return "an argument outside its limits";
        case Status::truncated: return "fewer bytes than its header says";
        case Status::bad_magic: return "not a frame";
        case Status::bad_version: return "a frame of a version that this build does not read";
        case Status::bad_header: return "a header field outside its limits";
        case Status::bad_checksum: return "a checksum that does not fit its bytes";
        case Status::bad_table: return "code lengths that make no prefix code";
        case Status::bad_block: return "block sections that do not fill the block";
        case Status::bad_tile: return "an unknown tile mode";
        case Status::bad_stream: return "a stream that does not fit its tiles";
        case Status::bad_words: return "decoded words that are not those that were encoded";
        case Status::no_space: return "too little room for the encoded frame";
        case Status::no_memory: return "out of memory";
    }
    return "an unknown status";
}

const Kernels* kernels(const char* isa) noexcept {
    const bool any = isa == nullptr || *isa == '\0';
#ifdef NACD_HAVE_AVX2
    const bool can = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("bmi");
    if (can && (any || std::strcmp(isa, avx2::kKernels.name) == 0)) return &avx2::kKernels;
#endif
    return any || std::strcmp(isa, portable::kKernels.name) == 0 ? &portable::kKernels : nullptr;
}

const char* name(const Kernels* kernels) noexcept { return kernels->name; }

namespace {

bool valid(const FrameHeader& h) {
    if (h.predictor > static_cast<uint8_t>(Predictor::linear) || (h.zero_bits != 0 && h.zero_bits != 16)) return false;
    if (h.count > kMaxCount || h.blocks != block_count(h.count) || !std::isfinite(h.alpha)) return false;
    if (h.predictor != static_cast<uint8_t>(Predictor::linear) && bits_of(h.alpha) != 0) return false;
    if (h.tables < 1 || h.tables > kMaxTables || h.reserved != 0) return false;
    return h.runs <= divide_up(h.count, kTile) && (h.runs == 0 || h.zero_bits == 0);
}

// Steps are positive and begin at rising tiles; the blocks' bytes add up to the frame's.
bool valid_sections(const uint8_t* head, const FrameHeader& h, size_t head_size) {
    int64_t last = -1;
    for (uint32_t k = 0; k < h.runs; ++k) {
        const auto run = read_at<StepRun>(head + runs_at(h.tables) + k * sizeof(StepRun));
        if (int64_t{run.first_tile} <= last || !valid_step(run.step)) return false;
        last = run.first_tile;
    }
    uint64_t bytes = head_size;
    for (uint64_t i = 0; i < h.blocks; ++i) {
        const BlockEntry entry = entry_of(head, h, i);
        if (entry.bytes > kMaxBlockBytes) return false;
        bytes += entry.bytes;
    }
    return bytes == h.bytes;
}

}  // namespace

Status view_block(const uint8_t* payload, size_t bytes, size_t count, const FrameHeader& header, BlockView* view) noexcept {
    view->count = count;
    view->tiles = divide_up(count, kTile);
    view->streams = divide_up(view->tiles, kStreamTiles);
    const bool linear = header.predictor == static_cast<uint8_t>(Predictor::linear);
    size_t left = bytes;
    const uint8_t* at = payload;
    const auto take = [&](size_t size) -> const uint8_t* {  // null where too little is left
        if (size > left) return nullptr;
        left -= size;
        return std::exchange(at, at + size);
    };
    const uint8_t* fixed = take(sizeof(BlockHeader));
    if (fixed == nullptr) return Status::bad_block;
    const auto sizes = read_at<BlockHeader>(fixed);
    if (sizes.zeros > count || sizes.exceptions > count) return Status::bad_block;
    view->low_bytes = sizes.low_bytes;
    view->zeros = sizes.zeros;
    view->exception_count = sizes.exceptions;
    view->modes = take(view->tiles);
    view->alphas = linear ? take(view->tiles) : nullptr;
    view->low = take(view->low_bytes);
    view->zero_fields = take(zero_bytes(view->zeros));
    view->exceptions = take(view->exception_count * kExceptionBytes);
    view->stream_tables = take(view->streams);
    view->stream_sizes = take(view->streams * 2);
    view->symbols = at;
    if (view->modes == nullptr || (linear && view->alphas == nullptr) || view->low == nullptr ||
        view->zero_fields == nullptr || view->exceptions == nullptr || view->stream_tables == nullptr ||
        view->stream_sizes == nullptr)
        return Status::bad_block;
    for (size_t s = 0; s < view->streams; ++s) {
        const auto size = read_at<uint16_t>(view->stream_sizes + 2 * s);
        if (take(size) == nullptr || view->stream_tables[s] >= header.tables) return Status::bad_block;
    }
    if (left != 0) return Status::bad_block;
    for (size_t t = 0; t < view->tiles; ++t) {
        const uint8_t mode = view->modes[t];
        if (mode >= kTileEnd || (mode < kGridTiles && header.zero_bits != 0)) return Status::bad_tile;
        if (mode >= kStepTile && header.runs == 0) return Status::bad_tile;
    }
    return Status::ok;
}

Status read_head(const uint8_t* src, size_t src_bytes, FrameInfo* info) noexcept {
    if (src == nullptr || info == nullptr) return Status::bad_argument;
    *info = {};
    if (src_bytes < sizeof(FrameHeader)) return Status::truncated;
    const auto header = read_at<FrameHeader>(src);
    if (header.magic != kFrameMagic) return Status::bad_magic;
    if (header.version != kFrameVersion) return Status::bad_version;
    if (!valid(header)) return Status::bad_header;
    info->header = header;
    info->head_bytes = head_bytes(header.tables, header.runs, header.blocks);
    if (header.bytes < info->head_bytes) return Status::bad_header;
    if (src_bytes < info->head_bytes) return Status::truncated;
    if (checksum_matters() && head_crc(src, info->head_bytes) != header.crc) return Status::bad_checksum;
    if (!valid_sections(src, header, info->head_bytes)) return Status::bad_header;
    return Status::ok;
}

Status block_range(const uint8_t* head, const FrameInfo& info, uint64_t first, uint64_t blocks, uint64_t* begin,
                   uint64_t* end) noexcept {
    if (first > info.header.blocks || blocks > info.header.blocks - first) return Status::bad_argument;
    uint64_t at = info.head_bytes;
    for (uint64_t i = 0; i < first; ++i) at += entry_of(head, info.header, i).bytes;
    *begin = at;
    for (uint64_t i = first; i < first + blocks; ++i) at += entry_of(head, info.header, i).bytes;
    *end = at;
    return Status::ok;
}

Status decode(const uint8_t* head, const FrameInfo& info, const uint8_t* payload, size_t payload_bytes, uint64_t first,
              uint64_t blocks, const uint32_t* a, const uint32_t* b, uint32_t* dst, const DecodeOptions& options) noexcept {
    const FrameHeader& header = info.header;
    const auto predictor = static_cast<Predictor>(header.predictor);
    uint64_t begin = 0, end = 0;
    if (const Status status = block_range(head, info, first, blocks, &begin, &end); status != Status::ok) return status;
    if (end - begin != payload_bytes) return Status::truncated;
    if (blocks == 0) return Status::ok;
    if (payload == nullptr || dst == nullptr || references_missing(predictor, a, b)) return Status::bad_argument;
    if (options.verify && options.base_only) return Status::bad_argument;

    const Kernels* isa = options.kernels == nullptr ? kernels(nullptr) : options.kernels;
    std::vector<TableEntry> tables;
    std::vector<StepRun> runs;
    std::vector<uint64_t> offsets;
    try {
        tables.resize(header.tables * kTableSize);
        runs.resize(header.runs);
        offsets.resize(blocks);
    } catch (const std::bad_alloc&) {
        return Status::no_memory;
    }
    for (uint32_t k = 0; k < header.tables; ++k) {
        uint8_t lengths[kSymbols];
        read_lengths(head, k, lengths);
        if (!huffman_table(lengths, &tables[k * kTableSize])) return Status::bad_table;
    }
    if (!runs.empty()) std::memcpy(runs.data(), head + runs_at(header.tables), runs.size() * sizeof(StepRun));
    const DecodeFrame frame{predictor, header.zero_bits, header.alpha, runs.data(), runs.size(), options.base_only,
                            tables.data()};
    uint64_t offset = 0;
    for (uint64_t i = 0; i < blocks; ++i) offset += entry_of(head, header, first + i).bytes, offsets[i] = offset;

    return for_each<NoScratch>(blocks, options.threads, [&](uint64_t i, NoScratch&) {
        const BlockEntry entry = entry_of(head, header, first + i);
        const uint8_t* src = payload + (offsets[i] - entry.bytes);
        if (checksum_matters() && crc32c(0, src, entry.bytes) != entry.payload_crc) return Status::bad_checksum;
        const size_t count = weights_in(header.count, first + i), at = i * kBlock;
        BlockView view;
        if (const Status status = view_block(src, entry.bytes, count, header, &view); status != Status::ok) return status;
        const Status status = isa->decode_block(frame, view, (first + i) * kBlockTiles, a == nullptr ? nullptr : a + at,
                                                b == nullptr ? nullptr : b + at, dst + at);
        if (status != Status::ok) return status;
        if (options.verify && crc32c(0, dst + at, count * 4) != entry.words_crc) return Status::bad_words;
        return Status::ok;
    });
}

Status base_error(const uint8_t* head, const FrameInfo& info, const uint8_t* payload, size_t payload_bytes,
                  uint64_t first, uint64_t blocks, double* error) noexcept {
    uint64_t begin = 0, end = 0;
    if (const Status status = block_range(head, info, first, blocks, &begin, &end); status != Status::ok) return status;
    if (end - begin != payload_bytes) return Status::truncated;
    *error = 0;
    for (uint64_t i = first; i < first + blocks; ++i) {
        const BlockEntry entry = entry_of(head, info.header, i);
        BlockView view;
        const Status status = view_block(payload, entry.bytes, weights_in(info.header.count, i), info.header, &view);
        if (status != Status::ok) return status;
        // half a cell, or a whole one around zero
        for (size_t t = 0; t < view.tiles; ++t)
            if (view.modes[t] < kGridTiles)
                *error = std::max(*error, std::ldexp(view.zeros > 0 ? 1.0 : 0.5, view.modes[t] - kGridBias));
        payload += entry.bytes;
    }
    return Status::ok;
}

}  // namespace nacd
