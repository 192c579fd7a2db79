// What the fuzz targets share: a check, numbers from the end of an input, arrays of exactly their size, made-up weights.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

// Unlike assert, in every build.
#define FUZZ_CHECK(condition)                                                                  \
    do {                                                                                       \
        if (!(condition)) {                                                                    \
            std::fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition);     \
            std::abort();                                                                      \
        }                                                                                      \
    } while (false)

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace nacd::fuzz {

// Heap memory of exactly `size` elements, of any value: AddressSanitizer sees the first byte behind it.
template <class T>
std::unique_ptr<T[]> exactly(size_t size) {
    return std::unique_ptr<T[]>(new T[size]);
}

// The options of a run stand behind its data, so that a seed's data can be a real frame or file.
class Options {
public:
    Options(const uint8_t* data, size_t size) : data_(data), size_(size) {}

    // The next of the input's last bytes; zeros where it has no more.
    template <class T>
    T take() {
        T value{};
        const size_t bytes = size_ < sizeof value ? size_ : sizeof value;
        size_ -= bytes;
        if (bytes > 0) std::memcpy(&value, data_ + size_, bytes);
        return value;
    }

    const uint8_t* data() const { return data_; }
    size_t size() const { return size_; }  // of the data before the options

private:
    const uint8_t* data_;
    size_t size_;
};

inline uint32_t scramble(uint32_t x) {
    x *= 0x9e3779b1u;
    x ^= x >> 15;
    x *= 0x85ebca77u;
    return x ^ x >> 13;
}

// A weight of magnitude 2^-7 .. 2^-3, of either sign; make_corpus.py makes the same.
inline uint32_t made_up_weight(uint32_t seed, size_t i) {
    const uint32_t x = scramble(seed + static_cast<uint32_t>(i));
    return (x & 0x807fffffu) | (120 + (x >> 24 & 3)) << 23;
}

}  // namespace nacd::fuzz
