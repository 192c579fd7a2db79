// Any words against any references with any options: what is encoded is decoded to the same bits, or to within the
// tolerance asked for; both kernels write the same bytes; a bad option is an error.
//
// Input: segments of weights as 8-byte commands, one behind the other, then the options.
#include <algorithm>
#include <cmath>
#include <vector>

#include "../codec.h"
#include "../weight.h"
#include "fuzz.h"

namespace {

using namespace nacd;
using namespace nacd::fuzz;

constexpr size_t kMostWeights = kBlock + kTile + 1;

struct Snapshots {
    std::vector<uint32_t> words, a, b;
};

// One command: kind, how many weights, a parameter. The kinds are what trajectories are made of, and what breaks codecs.
void add_segment(const uint8_t command[8], Snapshots& to) {
    const uint8_t kind = command[0], exponent = command[1];
    uint16_t length;
    uint32_t x;
    std::memcpy(&length, command + 2, 2);
    std::memcpy(&x, command + 4, 4);
    const size_t begin = to.words.size(), end = std::min(begin + length % (length < 0x8000 ? 700 : 8192) + 1, kMostWeights);
    for (size_t i = begin; i < end; ++i) {
        const uint32_t random = scramble(x + static_cast<uint32_t>(i)), near = made_up_weight(x, i);
        // a change of 2^-exponent of the weight, and of other sizes at single places
        const uint32_t noise = scramble(random) >> (exponent & 31);
        uint32_t word = near + noise, a = near, b = near + 2 * noise;
        switch (kind % 8) {
            case 0: break;                                              // moves smoothly
            case 1: word = a = b = x; break;                            // does not move
            case 2: word = random, a = scramble(random), b = ~a; break; // any bits
            case 3: word = random >> 9 | (random & 1) << 31; break;     // subnormals and zeros, of weights
            case 4: word = near + (random % 61 == 0 ? noise : 0), b = near; break;  // moves at few places
            case 5: word |= random % 7 == 0 ? 0x7f800000u : 0; break;   // NaN and infinity
            case 6: a |= random % 67 == 0 ? 0x7f800000u : 0, b ^= random & 0x80000000u; break;
            default: word = bits_of(std::ldexp(std::nearbyint(float_of(near) * 4096), exponent % 64 - 44)); break;
        }
        to.words.push_back(word), to.a.push_back(a), to.b.push_back(b);
    }
}

std::vector<uint8_t> encode_with(const char* isa, const Snapshots& s, EncodeOptions options, Status* status,
                                 EncodeResult* result) {
    options.kernels = kernels(isa);
    const size_t bound = encode_bound(s.words.size(), options.run_count);
    const auto room = exactly<uint8_t>(bound);
    *status = encode(s.words.data(), s.a.data(), s.b.data(), s.words.size(), options, room.get(), bound, result);
    FUZZ_CHECK(*status != Status::ok || result->bytes <= bound);
    return *status == Status::ok ? std::vector<uint8_t>(room.get(), room.get() + result->bytes) : std::vector<uint8_t>();
}

Status decode_with(const char* isa, const std::vector<uint8_t>& frame, const FrameInfo& info, const Snapshots& s,
                   bool verify, bool base_only, uint32_t* words) {
    const size_t bytes = frame.size() - info.head_bytes;
    const auto payload = exactly<uint8_t>(bytes + kSlack);
    std::copy(frame.begin() + static_cast<ptrdiff_t>(info.head_bytes), frame.end(), payload.get());
    return decode(frame.data(), info, payload.get(), bytes, 0, info.header.blocks, s.a.data(), s.b.data(), words,
                  {1, verify, base_only, kernels(isa)});
}

// Within the tolerance of its tile's run, or the same bits; returns the largest error.
double check_words(const Snapshots& s, const uint32_t* decoded, const std::vector<StepRequest>& runs) {
    double largest = 0;
    for (size_t i = 0; i < s.words.size(); ++i) {
        if (decoded[i] == s.words[i]) continue;
        double tolerance = -1;
        for (const StepRequest& run : runs)
            if (run.first_tile <= i / kTile) tolerance = static_cast<double>(run.tolerance);
        const double error = std::fabs(static_cast<double>(float_of(decoded[i])) - static_cast<double>(float_of(s.words[i])));
        FUZZ_CHECK(tolerance > 0 && error <= tolerance);
        largest = std::max(largest, error);
    }
    return largest;
}

// The base layer is as near as it says; integer, same and raw tiles are exact in it.
void check_base(const std::vector<uint8_t>& frame, const FrameInfo& info, const Snapshots& s, const uint32_t* decoded) {
    const auto base = exactly<uint32_t>(s.words.size());
    FUZZ_CHECK(decode_with("portable", frame, info, s, false, true, base.get()) == Status::ok);
    double bound = 0;
    FUZZ_CHECK(base_error(frame.data(), info, frame.data() + info.head_bytes, frame.size() - info.head_bytes, 0,
                          info.header.blocks, &bound) == Status::ok);
    for (size_t i = 0; i < s.words.size(); ++i)
        FUZZ_CHECK(base[i] == decoded[i] ||
                   std::fabs(static_cast<double>(float_of(base[i])) - static_cast<double>(float_of(decoded[i]))) <= bound);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    Options input(data, size);
    const auto flags = input.take<uint8_t>();
    EncodeOptions options;
    options.predictor = static_cast<Predictor>(flags & 3);
    options.zero_bits = flags & 4 ? 16 : 0;
    options.fit_alpha = (flags & 8) != 0;
    options.alpha = input.take<float>();
    std::vector<StepRequest> runs;
    for (int k = flags >> 4 & 3; k > 0; --k) {
        const auto first = input.take<uint8_t>();
        const auto step = input.take<float>(), tolerance = input.take<float>();
        runs.push_back({first, step, flags & 64 ? step / 2 * 0.999f : flags & 128 ? 0 : tolerance});
    }
    options.runs = runs.data(), options.run_count = runs.size();
    Snapshots s;
    for (size_t i = 0; i + 8 <= input.size() && s.words.size() < kMostWeights; i += 8) add_segment(input.data() + i, s);
    if (options.zero_bits == 16)
        for (auto* words : {&s.words, &s.a, &s.b})
            for (uint32_t& word : *words) word &= 0xffff0000u;

    Status status, other;
    EncodeResult result, other_result;
    const auto frame = encode_with("portable", s, options, &status, &result);
    const auto vector = encode_with(nullptr, s, options, &other, &other_result);
    FUZZ_CHECK(status == other && frame == vector);
    if (status == Status::no_space) FUZZ_CHECK(encode_bound(s.words.size(), runs.size()) == 0);
    if (status != Status::ok) {
        FUZZ_CHECK(status == Status::bad_argument || status == Status::no_space);
        return 0;
    }

    FrameInfo info;
    FUZZ_CHECK(read_head(frame.data(), frame.size(), &info) == Status::ok);
    FUZZ_CHECK(info.header.bytes == frame.size() && info.header.count == s.words.size());
    const auto words = exactly<uint32_t>(s.words.size()), fast = exactly<uint32_t>(s.words.size());
    FUZZ_CHECK(decode_with("portable", frame, info, s, true, false, words.get()) == Status::ok);
    FUZZ_CHECK(decode_with(nullptr, frame, info, s, true, false, fast.get()) == Status::ok);
    FUZZ_CHECK(std::equal(words.get(), words.get() + s.words.size(), fast.get()));
    FUZZ_CHECK(check_words(s, words.get(), runs) <= result.max_error);
    check_base(frame, info, s, words.get());
    return 0;
}
