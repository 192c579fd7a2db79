// What codec_decode.cpp and codec_encode.cpp share: threads, the floating-point environment, and where a frame's parts lie.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "block.h"
#include "codec.h"
#include "format.h"
#include "weight.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#else
#include <cfenv>
#endif

namespace nacd {

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

inline size_t block_count(uint64_t count) { return divide_up(count, kBlock); }
inline size_t weights_in(uint64_t count, uint64_t block) {
    return static_cast<size_t>(std::min<uint64_t>(kBlock, count - block * kBlock));
}

inline size_t runs_at(uint32_t tables) { return sizeof(FrameHeader) + tables * kLengthBytes; }
inline size_t directory_at(uint32_t tables, uint32_t runs) { return runs_at(tables) + size_t{runs} * sizeof(StepRun); }
inline size_t head_bytes(uint32_t tables, uint32_t runs, uint32_t blocks) {
    return directory_at(tables, runs) + size_t{blocks} * sizeof(BlockEntry);
}

// The most bytes of a block's payload that encode makes.
inline constexpr size_t kBlockBound = sizeof(BlockHeader) + 2 * kBlockTiles + kLowBound + zero_bytes(kBlock) +
                               kExceptionBound + kBlockStreams * 3 + kBlock * kCodeBits / 8 + 64;
static_assert(kBlockBound <= kMaxBlockBytes);

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

inline uint32_t head_crc(const uint8_t* head, size_t bytes) {
    constexpr uint32_t zero = 0;
    constexpr size_t field = offsetof(FrameHeader, crc);
    uint32_t crc = crc32c(0, head, field);
    crc = crc32c(crc, &zero, sizeof zero);
    return crc32c(crc, head + field + sizeof zero, bytes - field - sizeof zero);
}

inline bool checksum_matters() {
#ifdef FUZZING_BUILD_MODE_UNSAFE_FOR_PRODUCTION
    return false;  // a fuzzer could not get past one
#else
    return true;
#endif
}

inline BlockEntry entry_of(const uint8_t* head, const FrameHeader& header, uint64_t block) {
    return read_at<BlockEntry>(head + directory_at(header.tables, header.runs) + block * sizeof(BlockEntry));
}

inline void read_lengths(const uint8_t* head, uint32_t table, uint8_t lengths[kSymbols]) {
    const uint8_t* packed = head + sizeof(FrameHeader) + table * kLengthBytes;
    for (size_t s = 0; s < kSymbols; ++s) lengths[s] = packed[s / 2] >> (s % 2 * 4) & 15;
}

// Steps from 2^-126 to 2^126: they and their inverses are normal. By their bits, for a thread may take subnormals for 0.
inline bool valid_step(float step) { return bits_of(step) >= 0x00800000u && bits_of(step) <= 0x7e800000u; }

inline bool references_missing(Predictor predictor, const uint32_t* a, const uint32_t* b) {
    return (predictor != Predictor::none && a == nullptr) || (predictor == Predictor::linear && b == nullptr);
}

}  // namespace nacd
