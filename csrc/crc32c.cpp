// CRC-32C: the SSE4.2 instruction on three lanes at once where the machine has it, else a table of eight bytes a step.
#include <array>
#include <cstring>

#include "codec.h"

#if defined(__x86_64__)
#include <nmmintrin.h>
#endif

namespace nacd {

namespace {

constexpr uint32_t kPolynomial = 0x82f63b78;  // Castagnoli, reflected

using Table = std::array<std::array<uint32_t, 256>, 8>;

constexpr Table make_table() {
    Table table{};
    for (uint32_t i = 0; i < 256; ++i) {
        uint32_t crc = i;
        for (int bit = 0; bit < 8; ++bit) crc = crc & 1 ? crc >> 1 ^ kPolynomial : crc >> 1;
        table[0][i] = crc;
    }
    for (size_t k = 1; k < 8; ++k)
        for (uint32_t i = 0; i < 256; ++i) table[k][i] = table[k - 1][i] >> 8 ^ table[0][table[k - 1][i] & 0xff];
    return table;
}

constexpr Table kTable = make_table();

uint32_t by_table(uint32_t crc, const uint8_t* p, size_t n) {
    for (; n >= 8; n -= 8, p += 8) {
        uint64_t x;
        std::memcpy(&x, p, 8);
        x ^= crc;
        crc = 0;
        for (size_t k = 0; k < 8; ++k) crc ^= kTable[7 - k][x >> (8 * k) & 0xff];
    }
    for (; n > 0; --n) crc = crc >> 8 ^ kTable[0][(crc ^ *p++) & 0xff];
    return crc;
}

#if defined(__x86_64__)
// The instruction takes 3 cycles and one can start each cycle, so three lanes of kLane bytes run at once. crc(A B C) is
// crc(A) moved on over the bytes of B and C, and so on: a linear map, one table of 4 x 256 words a distance.
constexpr size_t kLane = 4096;

using Shift = std::array<std::array<uint32_t, 256>, 4>;

constexpr Shift make_shift(size_t bytes) {
    std::array<uint32_t, 32> columns{};  // what `bytes` zero bytes make of each single bit: squaring the one-byte map
    std::array<uint32_t, 32> power{};
    for (size_t i = 0; i < 32; ++i) {
        columns[i] = uint32_t{1} << i;
        power[i] = columns[i] >> 8 ^ kTable[0][columns[i] & 0xff];
    }
    const auto apply = [](const std::array<uint32_t, 32>& map, uint32_t x) {
        uint32_t y = 0;
        for (size_t i = 0; i < 32; ++i) y ^= (x >> i & 1) ? map[i] : 0;
        return y;
    };
    for (size_t left = bytes; left > 0; left >>= 1) {
        if (left & 1)
            for (auto& column : columns) column = apply(power, column);
        const auto once = power;
        for (size_t i = 0; i < 32; ++i) power[i] = apply(once, once[i]);
    }
    Shift shift{};
    for (size_t k = 0; k < 4; ++k)
        for (uint32_t i = 0; i < 256; ++i) shift[k][i] = apply(columns, i << (8 * k));
    return shift;
}

constexpr Shift kOneLane = make_shift(kLane), kTwoLanes = make_shift(2 * kLane);

uint32_t move_on(const Shift& shift, uint32_t crc) {
    return shift[0][crc & 0xff] ^ shift[1][crc >> 8 & 0xff] ^ shift[2][crc >> 16 & 0xff] ^ shift[3][crc >> 24];
}

__attribute__((target("sse4.2"))) uint32_t by_instruction(uint32_t crc, const uint8_t* p, size_t n) {
    const auto load = [](const uint8_t* q) {
        uint64_t x;
        std::memcpy(&x, q, 8);
        return x;
    };
    for (; n >= 3 * kLane; n -= 3 * kLane, p += 3 * kLane) {
        uint64_t x = crc, y = 0, z = 0;
        for (size_t i = 0; i < kLane; i += 8) {
            x = _mm_crc32_u64(x, load(p + i));
            y = _mm_crc32_u64(y, load(p + kLane + i));
            z = _mm_crc32_u64(z, load(p + 2 * kLane + i));
        }
        crc = move_on(kTwoLanes, static_cast<uint32_t>(x)) ^ move_on(kOneLane, static_cast<uint32_t>(y)) ^
              static_cast<uint32_t>(z);
    }
    uint64_t x = crc;
    for (; n >= 8; n -= 8, p += 8) x = _mm_crc32_u64(x, load(p));
    for (crc = static_cast<uint32_t>(x); n > 0; --n) crc = _mm_crc32_u8(crc, *p++);
    return crc;
}

const bool has_instruction = __builtin_cpu_supports("sse4.2");
#else
constexpr bool has_instruction = false;
uint32_t by_instruction(uint32_t crc, const uint8_t* p, size_t n) { return by_table(crc, p, n); }
#endif

}  // namespace

uint32_t crc32c(uint32_t crc, const void* data, size_t bytes) noexcept {
    const auto* p = static_cast<const uint8_t*>(data);
    return ~(has_instruction ? by_instruction(~crc, p, bytes) : by_table(~crc, p, bytes));
}

}  // namespace nacd
