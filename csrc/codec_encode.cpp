// Frames: encoding on threads. Blocks are encoded by the kernels of block_encode.cpp, in two passes: modes, residuals and
// low bits; then, with the codes that suit the whole frame, the symbol streams.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <vector>

#include "block.h"
#include "codec.h"
#include "frame.h"
#include "huffman.h"
#include "weight.h"

namespace nacd {

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

// Whether each decoded word is its weight, or within its tile's tolerance of it.
bool all_within(const EncodeOptions& options, size_t first_tile, const uint32_t* words, const uint32_t* decoded,
                size_t count) {
    for (size_t begin = 0; begin < count; begin += kTile) {
        const StepRequest* run = run_at(options.runs, options.run_count, first_tile + begin / kTile);
        const double tolerance = run == nullptr ? 0 : static_cast<double>(run->tolerance);
        for (size_t i = begin; i < std::min(count, begin + kTile); ++i) {
            if (decoded[i] == words[i]) continue;
            const double error = static_cast<double>(float_of(decoded[i])) - static_cast<double>(float_of(words[i]));
            if (tolerance == 0 || !(std::fabs(error) <= tolerance)) return false;
        }
    }
    return true;
}

// In bounded-error mode the words that a reader will see are not those that came in: their checksum, and the promise that
// every one is within its bound, need a decoder.
template <class Place>
Status checksum_decoded(const Kernels& isa, const EncodeOptions& options, const FrameHeader& header,
                        const Tables& codes, const uint32_t* words, const uint32_t* a, const uint32_t* b, const Place& place,
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
        if (status != Status::ok) return status;
        if (!all_within(options, i * kBlockTiles, words + at, scratch.words.data(), count)) return Status::bad_words;
        states[i].words_crc = crc32c(0, scratch.words.data(), count * 4);
        return Status::ok;
    });
}

// The median over tiles of the least-squares alpha: a few weights beyond all others must not spoil the frame's. Every
// seventh tile is enough, for each tile refines it.
float fit_alpha(const uint32_t* w, const uint32_t* a, const uint32_t* b, uint64_t count) noexcept {
    const FloatEnvironment environment;
    constexpr uint64_t stride = 7;
    std::vector<float> alphas;
    try {
        for (uint64_t begin = 0; begin < count; begin += stride * kTile) {
            double xy = 0, xx = 0;
            for (uint64_t i = begin; i < std::min(count, begin + kTile); ++i) {
                const double x = static_cast<double>(float_of(b[i])) - static_cast<double>(float_of(a[i]));
                const double y = static_cast<double>(float_of(w[i])) - static_cast<double>(float_of(a[i]));
                xy += x * y, xx += x * x;
            }
            if (const auto alpha = static_cast<float>(xy / xx); std::isfinite(alpha)) alphas.push_back(alpha);
        }
    } catch (const std::bad_alloc&) {
        return 0;  // a worse fit is still right
    }
    if (alphas.empty()) return 0;
    const auto middle = alphas.begin() + static_cast<ptrdiff_t>(alphas.size() / 2);
    std::nth_element(alphas.begin(), middle, alphas.end());
    return *middle;
}

bool valid_runs(const EncodeOptions& options, uint64_t count) {
    if (options.run_count > divide_up(count, kTile)) return false;
    if (options.run_count > 0 && (options.runs == nullptr || options.zero_bits != 0)) return false;
    int64_t last = -1;
    for (size_t k = 0; k < options.run_count; ++k) {
        const StepRequest& run = options.runs[k];
        if (run.first_tile > UINT32_MAX || static_cast<int64_t>(run.first_tile) <= last) return false;
        if (!valid_step(run.step) || !(run.tolerance >= 0)) return false;
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
    if (options.run_count > 0) status = checksum_decoded(*isa, options, header, tables, words, a, b, place, states);
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
