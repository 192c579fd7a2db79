// Any bytes as a frame: its head, then its blocks against references that the input asks for. Nothing outside the
// payload and its slack is read, nothing outside dst written, both kernels agree, a block alone is as in the whole frame,
// and what the GPU's decoder does not refuse, it decodes to the same.
//
// Input: the frame, then its options.
#include <algorithm>
#include <vector>

#include "../codec.h"
#include "../codec_cuda.h"
#include "../weight.h"
#include "fuzz.h"

namespace {

using namespace nacd;
using namespace nacd::fuzz;

constexpr uint64_t kMostWeights = kBlock + kTile + 1;  // two blocks; one run stays below a few milliseconds

enum class References : uint8_t { made_up, any_bits, zero, none };

struct Run {
    std::unique_ptr<uint32_t[]> a, b;
    bool finite = true;  // no NaN among the references: what comes of one in a linear prediction is not defined
};

Run make_references(References kind, uint32_t seed, int zero_bits, size_t count, const Options& input) {
    Run run;
    if (kind == References::none) return run;
    run.a = exactly<uint32_t>(count), run.b = exactly<uint32_t>(count);
    std::fill_n(run.a.get(), count, 0), std::fill_n(run.b.get(), count, 0);
    for (size_t i = 0; i < count && kind == References::made_up; ++i) {
        run.a[i] = made_up_weight(seed, i) >> zero_bits << zero_bits;
        run.b[i] = made_up_weight(seed + 0x10000000u, i) >> zero_bits << zero_bits;
    }
    const size_t words = input.size() / 4;
    for (size_t i = 0; i < count && kind == References::any_bits && words > 0; ++i) {
        std::memcpy(&run.a[i], input.data() + 4 * ((i + seed) % words), 4);
        std::memcpy(&run.b[i], input.data() + 4 * ((i * 3 + seed) % words), 4);
        run.finite = run.finite && is_finite(run.a[i]) && is_finite(run.b[i]);
    }
    return run;
}

// Blocks [first, first + blocks) of the frame, from a copy of their bytes that begins anywhere and has only its slack.
Status decode_copy(const uint8_t* frame, const FrameInfo& info, size_t offset, uint64_t first, uint64_t blocks,
                   const Run& run, const DecodeOptions& options, std::unique_ptr<uint32_t[]>* words, size_t* count) {
    uint64_t begin = 0, end = 0;
    FUZZ_CHECK(block_range(frame, info, first, blocks, &begin, &end) == Status::ok);
    FUZZ_CHECK(info.head_bytes <= begin && begin <= end && end <= info.header.bytes);
    const auto head = exactly<uint8_t>(info.head_bytes);
    std::memcpy(head.get(), frame, info.head_bytes);
    const auto payload = exactly<uint8_t>(offset + (end - begin) + kSlack);
    // in the slack, what follows in the frame: where a stream lies about its size, its last symbols come from there
    const size_t copied = std::min<uint64_t>(end - begin + kSlack, info.header.bytes - begin);
    std::memcpy(payload.get() + offset, frame + begin, copied);
    std::memset(payload.get() + offset + copied, 0, end - begin + kSlack - copied);
    const size_t at = first * kBlock;
    *count = std::min<uint64_t>(info.header.count, (first + blocks) * kBlock) - at;
    *words = exactly<uint32_t>(*count);
    // references that end where theirs do
    const auto a = exactly<uint32_t>(*count), b = exactly<uint32_t>(*count);
    if (run.a && *count > 0) {
        std::memcpy(a.get(), run.a.get() + at, *count * 4);
        std::memcpy(b.get(), run.b.get() + at, *count * 4);
    }
    double error = 0;
    const Status viewed = base_error(head.get(), info, payload.get() + offset, end - begin, first, blocks, &error);
    const Status status = decode(head.get(), info, payload.get() + offset, end - begin, first, blocks,
                                 run.a ? a.get() : nullptr, run.b ? b.get() : nullptr, words->get(), options);
    FUZZ_CHECK(status != Status::ok || viewed == Status::ok);
    return status;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    Options input(data, size);
    const auto flags = input.take<uint8_t>();
    const auto first = input.take<uint8_t>(), blocks = input.take<uint8_t>();
    const auto kind = static_cast<References>(input.take<uint8_t>() & 3);
    const auto seed = input.take<uint32_t>();
    const uint8_t* frame = input.data();

    FrameInfo info;
    const Status status = read_head(frame, input.size(), &info);
    if (status == Status::truncated && info.head_bytes > 0) FUZZ_CHECK(info.head_bytes > input.size());
    if (status != Status::ok) return 0;
    FUZZ_CHECK(info.head_bytes <= input.size() && info.head_bytes <= info.header.bytes);
    uint64_t begin = 0, end = 0;
    FUZZ_CHECK((block_range(frame, info, first, blocks, &begin, &end) == Status::ok) ==
               (uint64_t{first} + blocks <= info.header.blocks));
    if (info.header.count > kMostWeights || info.header.bytes > input.size()) return 0;

    const auto count = static_cast<size_t>(info.header.count);
    const Run run = make_references(kind, seed, info.header.zero_bits, count, input);
    const DecodeOptions options{1, (flags & 1) != 0, (flags & 2) != 0, kernels("portable")};
    DecodeOptions fast = options;
    fast.kernels = kernels(nullptr);
    const size_t offset = flags >> 2 & 7;
    std::unique_ptr<uint32_t[]> words, other;
    size_t n = 0, m = 0;
    const Status whole = decode_copy(frame, info, offset, 0, info.header.blocks, run, options, &words, &n);
    const Status vector = decode_copy(frame, info, offset, 0, info.header.blocks, run, fast, &other, &m);
    FUZZ_CHECK(n == count && m == count);
    const bool defined = run.finite || info.header.predictor != static_cast<uint8_t>(Predictor::linear);
    if (defined) {
        FUZZ_CHECK(whole == vector);
        FUZZ_CHECK(whole != Status::ok || std::equal(words.get(), words.get() + n, other.get()));
    }
    const auto payload = exactly<uint8_t>(info.header.bytes - info.head_bytes);
    std::memcpy(payload.get(), frame + info.head_bytes, info.header.bytes - info.head_bytes);
    const Status emulated = gpu::decode_emulated(frame, info, payload.get(), info.header.bytes - info.head_bytes, 0,
                                                 info.header.blocks, run.a.get(), run.b.get(), other.get(),
                                                 options.base_only && !options.verify);
    if (emulated == Status::ok && whole != Status::bad_words && whole != Status::bad_argument) {
        FUZZ_CHECK(whole == Status::ok);
        FUZZ_CHECK(!defined || std::equal(words.get(), words.get() + n, other.get()));
    }
    if (info.header.blocks == 0) return 0;
    const uint64_t one = first % info.header.blocks;
    const Status part = decode_copy(frame, info, 0, one, 1, run, options, &other, &m);
    if (whole == Status::ok) {
        FUZZ_CHECK(part == Status::ok);
        FUZZ_CHECK(std::equal(other.get(), other.get() + m, words.get() + one * kBlock));
    }
    return 0;
}
