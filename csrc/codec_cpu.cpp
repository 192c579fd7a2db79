// Frames on the CPU: heads, checks and threads around the blocks of block_cpu.cpp.
#include "codec.h"

#include <atomic>
#include <cmath>
#include <cstring>
#include <new>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "block.h"
#include "weight.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#else
#include <cfenv>
#endif

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
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("bmi");
    if (avx2 && (any || std::strcmp(isa, kAvx2.name) == 0)) return &kAvx2;
#endif
    return any || std::strcmp(isa, kPortable.name) == 0 ? &kPortable : nullptr;
}

const char* name(const Kernels* kernels) noexcept { return kernels->name; }

namespace {

// Rounding to nearest and subnormals kept, whatever the thread was set to: a predicted weight must not depend on it.
class FloatEnvironment {
public:
#if defined(__x86_64__)
    FloatEnvironment() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
    ~FloatEnvironment() { _mm_setcsr(saved_); }

private:
    unsigned saved_;
#else
    FloatEnvironment() { std::fegetenv(&saved_), std::fesetenv(FE_DFL_ENV); }
    ~FloatEnvironment() { std::fesetenv(&saved_); }

private:
    std::fenv_t saved_;
#endif
public:
    FloatEnvironment(const FloatEnvironment&) = delete;
    FloatEnvironment& operator=(const FloatEnvironment&) = delete;
};

// Calls work(i, scratch) for i < count on up to `threads` threads, the caller's among them, each with a Scratch of its
// own; stops at the first failure. A thread that the system refuses is done without.
template <class Scratch, class Work>
Status for_each(uint64_t count, int threads, const Work& work) noexcept {
    std::atomic<uint64_t> next{0};
    std::atomic<int> failed{0};
    const auto loop = [&]() noexcept {
        const FloatEnvironment environment;
        Scratch scratch;
        if (!scratch.ok()) {
            failed = static_cast<int>(Status::no_memory);
            return;
        }
        for (uint64_t i; failed == 0 && (i = next.fetch_add(1)) < count;)
            if (const Status status = work(i, scratch); status != Status::ok) failed = static_cast<int>(status);
    };
    const uint64_t wanted = std::min<uint64_t>(static_cast<uint64_t>(threads < 1 ? 1 : threads), count);
    std::vector<std::thread> helpers;
    try {
        helpers.reserve(wanted);
        while (helpers.size() + 1 < wanted) helpers.emplace_back(loop);
    } catch (const std::system_error&) {
    } catch (const std::bad_alloc&) {
    }
    loop();
    for (auto& helper : helpers) helper.join();
    return static_cast<Status>(failed.load());
}

struct NoScratch {
    bool ok() const { return true; }
};

size_t block_count(uint64_t count) { return divide_up(count, kBlock); }
size_t weights_in(uint64_t count, uint64_t block) {
    return static_cast<size_t>(std::min<uint64_t>(kBlock, count - block * kBlock));
}

size_t runs_at(uint32_t tables) { return sizeof(FrameHeader) + tables * kLengthBytes; }
size_t directory_at(uint32_t tables, uint32_t runs) { return runs_at(tables) + size_t{runs} * sizeof(StepRun); }
size_t head_bytes(uint32_t tables, uint32_t runs, uint32_t blocks) {
    return directory_at(tables, runs) + size_t{blocks} * sizeof(BlockEntry);
}

// The most bytes of a block's payload.
constexpr size_t kBlockBound = sizeof(BlockHeader) + 2 * kBlockTiles + kLowBound + zero_bytes(kBlock) +
                               kExceptionBound + kBlockStreams * 3 + kBlock * kCodeBits / 8 + 64;

template <class T>
T read_at(const uint8_t* p) {
    T x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

template <class T>
void write_at(uint8_t* p, const T& x) {
    std::memcpy(p, &x, sizeof x);
}

uint32_t head_crc(const uint8_t* head, size_t bytes) {
    constexpr uint32_t zero = 0;
    constexpr size_t field = offsetof(FrameHeader, crc);
    uint32_t crc = crc32c(0, head, field);
    crc = crc32c(crc, &zero, sizeof zero);
    return crc32c(crc, head + field + sizeof zero, bytes - field - sizeof zero);
}

bool checksum_matters() {
#ifdef FUZZING_BUILD_MODE_UNSAFE_FOR_PRODUCTION
    return false;  // a fuzzer could not get past one
#else
    return true;
#endif
}

BlockEntry entry_of(const uint8_t* head, const FrameHeader& header, uint64_t block) {
    return read_at<BlockEntry>(head + directory_at(header.tables, header.runs) + block * sizeof(BlockEntry));
}

void read_lengths(const uint8_t* head, uint32_t table, uint8_t lengths[kSymbols]) {
    const uint8_t* packed = head + sizeof(FrameHeader) + table * kLengthBytes;
    for (size_t s = 0; s < kSymbols; ++s) lengths[s] = packed[s / 2] >> (s % 2 * 4) & 15;
}

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
        if (int64_t{run.first_tile} <= last || !(run.step > 0) || !std::isfinite(run.step) ||
            !std::isfinite(1.0f / run.step))
            return false;
        last = run.first_tile;
    }
    uint64_t bytes = head_size;
    for (uint64_t i = 0; i < h.blocks; ++i) {
        const BlockEntry entry = entry_of(head, h, i);
        if (entry.bytes > kBlockBound) return false;
        bytes += entry.bytes;
    }
    return bytes == h.bytes;
}

bool references_missing(Predictor predictor, const uint32_t* a, const uint32_t* b) {
    return (predictor != Predictor::none && a == nullptr) || (predictor == Predictor::linear && b == nullptr);
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

// ---- encoding

size_t encode_bound(uint64_t count, size_t runs) noexcept {
    if (count > kMaxCount || runs > divide_up(count, kTile)) return 0;
    const size_t blocks = block_count(count);
    return head_bytes(kMaxTables, static_cast<uint32_t>(runs), static_cast<uint32_t>(blocks)) + blocks * kBlockBound;
}

namespace {

// Zero fields and exceptions of one block, before they are packed.
struct EncodeScratch {
    std::vector<uint32_t> zeros;
    std::vector<uint8_t> exceptions;
    EncodeScratch() noexcept {
        try {
            zeros.resize(kBlock);
            exceptions.resize(kExceptionBound);
        } catch (const std::bad_alloc&) {
        }
    }
    bool ok() const { return !exceptions.empty(); }
};

struct WordScratch {
    std::vector<uint32_t> words;
    WordScratch() noexcept {
        try {
            words.resize(kBlock);
        } catch (const std::bad_alloc&) {
        }
    }
    bool ok() const { return !words.empty(); }
};

// What the second pass, which needs the frame's codes, must know of a block.
struct BlockState {
    size_t prefix_bytes;  // everything before the stream tables, in place
    size_t bytes;
    size_t streams;
    size_t stream_symbols[kBlockStreams];
    float stream_spread[kBlockStreams];  // the mean magnitude of the stream's symbols
    uint8_t stream_tables[kBlockStreams];
    uint64_t exceptions;
    uint32_t words_crc;
    double max_error;
};

uint8_t* write_zero_fields(const uint32_t* zeros, size_t count, uint8_t* out) {
    uint64_t pending = 0;
    int filled = 0;
    for (size_t i = 0; i < count; ++i) {
        pending |= uint64_t{zeros[i]} << filled;
        for (filled += kZeroBits; filled >= 8; filled -= 8, pending >>= 8) *out++ = static_cast<uint8_t>(pending);
    }
    if (filled > 0) *out++ = static_cast<uint8_t>(pending);
    return out;
}

// Everything of the block that does not depend on the codes, into dst; the symbols of its tiles into `symbols`.
void encode_prefix(const Kernels& isa, const EncodeFrame& frame, uint64_t block, const uint32_t* words,
                   const uint32_t* a, const uint32_t* b, size_t count, EncodeScratch& scratch, uint8_t* dst,
                   int8_t* symbols, BlockState* state) {
    const size_t tiles = divide_up(count, kTile), alphas = frame.predictor == Predictor::linear ? tiles : 0;
    BlockParts parts;
    parts.low = dst + sizeof(BlockHeader) + tiles + alphas;
    parts.zeros = scratch.zeros.data();
    parts.exceptions = scratch.exceptions.data();
    parts.symbols = symbols;
    isa.encode_block(frame, block * kBlockTiles, words, a, b, count, &parts);

    write_at(dst, BlockHeader{static_cast<uint32_t>(parts.low_bytes), static_cast<uint32_t>(parts.zero_count),
                              static_cast<uint32_t>(parts.exception_count)});
    std::memcpy(dst + sizeof(BlockHeader), parts.modes, tiles);
    std::memcpy(dst + sizeof(BlockHeader) + tiles, parts.alphas, alphas);
    uint8_t* out = write_zero_fields(parts.zeros, parts.zero_count, parts.low + parts.low_bytes);
    std::memcpy(out, parts.exceptions, parts.exception_count * kExceptionBytes);
    state->prefix_bytes = static_cast<size_t>(out - dst) + parts.exception_count * kExceptionBytes;
    state->streams = divide_up(tiles, kStreamTiles);
    std::memcpy(state->stream_symbols, parts.stream_symbols, sizeof state->stream_symbols);
    for (size_t s = 0; s < state->streams; ++s) {
        const size_t n = state->stream_symbols[s];
        uint64_t sum = 0;
        for (size_t i = 0; i < n; ++i) sum += magnitude(symbols[i]);
        state->stream_spread[s] = n == 0 ? 0.0f : static_cast<float>(sum) / static_cast<float>(n);
        state->stream_tables[s] = 0;
        symbols += n;
    }
    state->exceptions = parts.exception_count;
    state->words_crc = crc32c(0, words, count * 4);
    state->max_error = parts.max_error;
}

// The block's streams behind its prefix; returns the block's bytes.
size_t encode_streams(const Kernels& isa, const Code (*codes)[kSymbols], const BlockState& state,
                      const int8_t* symbols, uint8_t* dst) {
    std::memcpy(dst + state.prefix_bytes, state.stream_tables, state.streams);
    uint8_t* sizes = dst + state.prefix_bytes + state.streams;
    uint8_t* out = sizes + 2 * state.streams;
    for (size_t s = 0; s < state.streams; ++s) {
        const size_t bytes = isa.pack_symbols(codes[state.stream_tables[s]], symbols, state.stream_symbols[s], out);
        write_at(sizes + 2 * s, static_cast<uint16_t>(bytes));
        out += bytes;
        symbols += state.stream_symbols[s];
    }
    return static_cast<size_t>(out - dst);
}

// Several tables leave the cache that one stays in: they must save this share of the frame.
constexpr double kTableGain = 0.01;

// The frame's codes, and each stream's among them: one code for all, or kMaxTables for streams of about the same spread,
// where that saves enough.
struct Tables {
    uint32_t count = 1;
    uint8_t lengths[kMaxTables][kSymbols];
    Code codes[kMaxTables][kSymbols];
};

using Histograms = uint64_t[kMaxTables][kSymbols];

double coded_bits(const uint64_t histogram[kSymbols], const uint8_t lengths[kSymbols]) {
    double bits = 0;
    for (size_t s = 0; s < kSymbols; ++s) bits += static_cast<double>(histogram[s]) * lengths[s];
    return bits;
}

Status choose_tables(const Kernels& isa, const int8_t* symbols, std::vector<BlockState>& states, Tables* tables) {
    std::vector<float> spreads;
    try {
        for (const BlockState& state : states)
            for (size_t s = 0; s < state.streams; ++s)
                if (state.stream_symbols[s] > 0) spreads.push_back(state.stream_spread[s]);
    } catch (const std::bad_alloc&) {
        return Status::no_memory;
    }
    std::sort(spreads.begin(), spreads.end());
    const auto class_of = [&](float spread) {  // by quartile
        size_t k = 0;
        while (k + 1 < kMaxTables && spread > spreads[spreads.size() * (k + 1) / kMaxTables]) ++k;
        return static_cast<uint8_t>(k);
    };
    Histograms histograms = {};
    uint64_t all[kSymbols] = {};
    double other_bits = 0;
    for (size_t i = 0; i < states.size(); ++i) {
        const int8_t* at = symbols + i * kBlock;
        other_bits += 8.0 * static_cast<double>(states[i].prefix_bytes);
        for (size_t s = 0; s < states[i].streams; ++s) {
            const size_t n = states[i].stream_symbols[s];
            if (n == 0) continue;
            isa.count_symbols(at, n, histograms[class_of(states[i].stream_spread[s])]);
            at += n;
        }
    }
    for (const auto& histogram : histograms)
        for (size_t s = 0; s < kSymbols; ++s) all[s] += histogram[s];
    uint8_t one[kSymbols];
    huffman_lengths(all, one);
    const double bits = coded_bits(all, one);
    double split_bits = 8.0 * static_cast<double>((kMaxTables - 1) * kLengthBytes);
    for (size_t k = 0; k < kMaxTables; ++k) {
        huffman_lengths(histograms[k], tables->lengths[k]);
        split_bits += coded_bits(histograms[k], tables->lengths[k]);
    }
    if (bits - split_bits > kTableGain * (bits + other_bits)) {
        tables->count = kMaxTables;
        for (BlockState& state : states)
            for (size_t s = 0; s < state.streams; ++s)
                if (state.stream_symbols[s] > 0) state.stream_tables[s] = class_of(state.stream_spread[s]);
    } else {
        std::memcpy(tables->lengths[0], one, sizeof one);
    }
    for (uint32_t k = 0; k < tables->count; ++k)
        if (!huffman_codes(tables->lengths[k], tables->codes[k])) return Status::bad_table;
    return Status::ok;
}

// In bounded-error mode the words that a reader will see are not those that came in: their checksum needs a decoder.
template <class Place>
Status checksum_decoded(const Kernels& isa, const EncodeOptions& options, const FrameHeader& header,
                        const Tables& codes, const uint32_t* a, const uint32_t* b, const Place& place,
                        std::vector<BlockState>& states) {
    std::vector<StepRun> runs;
    std::vector<TableEntry> tables;
    try {
        runs.reserve(options.run_count);
        tables.resize(codes.count * kTableSize);
    } catch (const std::bad_alloc&) {
        return Status::no_memory;
    }
    for (size_t k = 0; k < options.run_count; ++k)
        runs.push_back({static_cast<uint32_t>(options.runs[k].first_tile), options.runs[k].step});
    for (uint32_t k = 0; k < codes.count; ++k)
        if (!huffman_table(codes.lengths[k], &tables[k * kTableSize])) return Status::bad_table;
    const DecodeFrame frame{options.predictor, options.zero_bits, header.alpha, runs.data(), runs.size(), false,
                            tables.data()};
    return for_each<WordScratch>(states.size(), options.threads, [&](uint64_t i, WordScratch& scratch) {
        const size_t count = weights_in(header.count, i), at = i * kBlock;
        BlockView view;
        Status status = view_block(place(i), states[i].bytes, count, header, &view);
        if (status == Status::ok)
            status = isa.decode_block(frame, view, i * kBlockTiles, a == nullptr ? nullptr : a + at,
                                      b == nullptr ? nullptr : b + at, scratch.words.data());
        states[i].words_crc = crc32c(0, scratch.words.data(), count * 4);
        return status;
    });
}

float fit_alpha(const uint32_t* w, const uint32_t* a, const uint32_t* b, uint64_t count) {
    const FloatEnvironment environment;
    constexpr uint64_t stride = 7;  // tiles refine it: a sample is enough
    double xy = 0, xx = 0;
    for (uint64_t i = 0; i < count; i += stride) {
        const double x = static_cast<double>(float_of(b[i])) - static_cast<double>(float_of(a[i]));
        const double y = static_cast<double>(float_of(w[i])) - static_cast<double>(float_of(a[i]));
        if (std::isfinite(x) && std::isfinite(y)) xy += x * y, xx += x * x;
    }
    const auto alpha = static_cast<float>(xy / xx);
    return std::isfinite(alpha) ? alpha : 0.0f;
}

bool valid_runs(const EncodeOptions& options, uint64_t count) {
    if (options.run_count > divide_up(count, kTile)) return false;
    if (options.run_count > 0 && (options.runs == nullptr || options.zero_bits != 0)) return false;
    int64_t last = -1;
    for (size_t k = 0; k < options.run_count; ++k) {
        const StepRequest& run = options.runs[k];
        if (run.first_tile > UINT32_MAX || static_cast<int64_t>(run.first_tile) <= last) return false;
        if (!(run.step > 0) || !std::isfinite(run.step) || !std::isfinite(1.0f / run.step)) return false;
        if (!(run.tolerance >= 0)) return false;
        last = static_cast<int64_t>(run.first_tile);
    }
    return true;
}

bool low_bits_are_zero(const uint32_t* words, uint64_t count) {
    uint32_t any = 0;
    for (uint64_t i = 0; i < count; ++i) any |= words[i] & 0xffffu;
    return any == 0;
}

}  // namespace

Status encode(const uint32_t* words, const uint32_t* a, const uint32_t* b, uint64_t count, const EncodeOptions& options,
              uint8_t* dst, size_t dst_capacity, EncodeResult* result) noexcept {
    if (dst == nullptr || result == nullptr || (count > 0 && words == nullptr)) return Status::bad_argument;
    if (count > 0 && references_missing(options.predictor, a, b)) return Status::bad_argument;
    if (options.predictor > Predictor::linear || (options.zero_bits != 0 && options.zero_bits != 16) ||
        !std::isfinite(options.alpha) || count > kMaxCount || !valid_runs(options, count))
        return Status::bad_argument;
    if (options.zero_bits == 16) {
        if (!low_bits_are_zero(words, count)) return Status::bad_argument;
        if (options.predictor != Predictor::none && !low_bits_are_zero(a, count)) return Status::bad_argument;
        if (options.predictor == Predictor::linear && !low_bits_are_zero(b, count)) return Status::bad_argument;
    }
    if (dst_capacity < encode_bound(count, options.run_count)) return Status::no_space;

    const Kernels* isa = options.kernels == nullptr ? kernels(nullptr) : options.kernels;
    const uint64_t blocks = block_count(count);
    EncodeFrame frame{options.predictor, options.zero_bits, 0, options.runs, options.run_count};
    if (options.predictor == Predictor::linear)
        frame.alpha = options.fit_alpha ? fit_alpha(words, a, b, count) : options.alpha;
    std::vector<BlockState> states;
    std::vector<int8_t> symbols;
    try {
        states.resize(blocks);
        symbols.resize(count);
    } catch (const std::bad_alloc&) {
        return Status::no_memory;
    }
    const auto runs = static_cast<uint32_t>(options.run_count);
    uint8_t* const first_place = dst + head_bytes(kMaxTables, runs, static_cast<uint32_t>(blocks));
    const auto place = [&](uint64_t block) { return first_place + block * kBlockBound; };

    Status status = for_each<EncodeScratch>(blocks, options.threads, [&](uint64_t i, EncodeScratch& scratch) {
        const uint64_t at = i * kBlock;
        encode_prefix(*isa, frame, i, words + at, a == nullptr ? nullptr : a + at, b == nullptr ? nullptr : b + at,
                      weights_in(count, i), scratch, place(i), symbols.data() + at, &states[i]);
        return Status::ok;
    });
    if (status != Status::ok) return status;

    Tables tables;
    status = choose_tables(*isa, symbols.data(), states, &tables);
    if (status != Status::ok) return status;
    status = for_each<NoScratch>(blocks, options.threads, [&](uint64_t i, NoScratch&) {
        states[i].bytes = encode_streams(*isa, tables.codes, states[i], symbols.data() + i * kBlock, place(i));
        return Status::ok;
    });
    if (status != Status::ok) return status;

    FrameHeader header{kFrameMagic, kFrameVersion, static_cast<uint8_t>(options.predictor), options.zero_bits, count,
                       0, frame.alpha, static_cast<uint32_t>(blocks), runs, tables.count, 0, 0};
    if (options.run_count > 0) status = checksum_decoded(*isa, options, header, tables, a, b, place, states);
    if (status != Status::ok) return status;

    const size_t head_size = head_bytes(tables.count, runs, static_cast<uint32_t>(blocks));
    uint8_t* out = dst + head_size;
    uint8_t* directory = dst + directory_at(tables.count, runs);
    *result = {};
    for (uint64_t i = 0; i < blocks; ++i) {
        std::memmove(out, place(i), states[i].bytes);
        const BlockEntry entry{static_cast<uint32_t>(states[i].bytes), crc32c(0, out, states[i].bytes), states[i].words_crc};
        write_at(directory + i * sizeof(BlockEntry), entry);
        out += states[i].bytes;
        result->exceptions += states[i].exceptions;
        result->max_error = std::max(result->max_error, states[i].max_error);
    }
    for (size_t k = 0; k < options.run_count; ++k)
        write_at(dst + runs_at(tables.count) + k * sizeof(StepRun),
                 StepRun{static_cast<uint32_t>(options.runs[k].first_tile), options.runs[k].step});
    for (uint32_t k = 0; k < tables.count; ++k)
        for (size_t s = 0; s < kSymbols; s += 2)
            dst[sizeof(FrameHeader) + k * kLengthBytes + s / 2] =
                static_cast<uint8_t>(tables.lengths[k][s] | tables.lengths[k][s + 1] << 4);
    result->bytes = static_cast<size_t>(out - dst);
    result->alpha = frame.alpha;
    header.bytes = result->bytes;
    write_at(dst, header);
    header.crc = head_crc(dst, head_size);
    write_at(dst, header);
    return Status::ok;
}

}  // namespace nacd
