#include "huffman.h"

#include <algorithm>
#include <array>

namespace nacd {

namespace {

uint16_t reversed(uint32_t bits, int width) {
    uint32_t out = 0;
    for (int i = 0; i < width; ++i) out |= ((bits >> i) & 1) << (width - 1 - i);
    return static_cast<uint16_t>(out);
}

}  // namespace

// Package-merge (Larmore and Hirschberg, 1990): kCodeBits rounds, each pairing the cheapest packages of the round before
// and merging them with the symbols. A symbol's length is the number of rounds whose chosen packages hold it.
void huffman_lengths(const uint64_t counts[kSymbols], uint8_t lengths[kSymbols]) noexcept {
    std::array<uint16_t, kSymbols> symbols;
    size_t n = 0;
    for (size_t s = 0; s < kSymbols; ++s) {
        lengths[s] = 0;
        if (counts[s] > 0) symbols[n++] = static_cast<uint16_t>(s);
    }
    if (n == 0) return;
    if (n == 1) {
        lengths[symbols[0]] = 1;
        return;
    }
    std::stable_sort(symbols.begin(), symbols.begin() + static_cast<ptrdiff_t>(n),
                     [&](uint16_t x, uint16_t y) { return counts[x] < counts[y]; });

    // leaf[round][i]: item i of that round's sorted list is a symbol, not a package.
    static thread_local std::array<std::array<bool, 2 * kSymbols>, kCodeBits> leaf;
    std::array<uint64_t, 2 * kSymbols> previous, current;
    size_t previous_size = 0;
    for (int round = 0; round < kCodeBits; ++round) {
        const size_t packages = previous_size / 2;
        size_t i = 0, j = 0, size = 0;
        while (i < n || j < packages) {
            const uint64_t package = j < packages ? previous[2 * j] + previous[2 * j + 1] : UINT64_MAX;
            const bool symbol = i < n && counts[symbols[i]] <= package;
            leaf[static_cast<size_t>(round)][size] = symbol;
            current[size++] = symbol ? counts[symbols[i++]] : (++j, package);
        }
        previous = current;
        previous_size = size;
    }
    size_t chosen = 2 * n - 2;
    for (int round = kCodeBits - 1; round >= 0; --round) {
        size_t symbols_in = 0;
        for (size_t i = 0; i < chosen; ++i) symbols_in += leaf[static_cast<size_t>(round)][i];
        for (size_t i = 0; i < symbols_in; ++i) ++lengths[symbols[i]];
        chosen = 2 * (chosen - symbols_in);
    }
}

bool huffman_codes(const uint8_t lengths[kSymbols], Code codes[kSymbols]) noexcept {
    uint32_t next[kCodeBits + 2] = {};
    for (size_t s = 0; s < kSymbols; ++s) {
        if (lengths[s] > kCodeBits) return false;
        if (lengths[s] > 0) ++next[lengths[s] + 1];
    }
    uint32_t code = 0;
    for (int width = 1; width <= kCodeBits; ++width) {
        code = (code + next[width]) << 1;  // next[width]: how many codes are one bit shorter
        next[width] = code;
    }
    for (size_t s = 0; s < kSymbols; ++s) {
        const int width = lengths[s];
        codes[s] = {};
        if (width == 0) continue;
        const uint32_t bits = next[width]++;
        if (bits >> width) return false;  // more codes than the length has room for
        codes[s] = {reversed(bits, width), static_cast<uint16_t>(width)};
    }
    return true;
}

bool huffman_table(const uint8_t lengths[kSymbols], TableEntry table[kTableSize]) noexcept {
    Code codes[kSymbols];
    if (!huffman_codes(lengths, codes)) return false;
    std::array<uint16_t, kTableSize> single;  // symbol << 8 | width
    single.fill(kCodeBits);
    for (size_t s = 0; s < kSymbols; ++s) {
        if (codes[s].width == 0) continue;
        for (size_t i = codes[s].bits; i < kTableSize; i += size_t{1} << codes[s].width)
            single[i] = static_cast<uint16_t>(s << 8 | codes[s].width);
    }
    for (size_t i = 0; i < kTableSize; ++i) {
        uint64_t entry = 0;
        int bits = 0, count = 0;
        while (count < kEntrySymbols) {
            const uint16_t next = single[i >> bits];
            const int width = next & 0xff;
            if (bits + width > kCodeBits) break;
            entry |= static_cast<uint64_t>(next >> 8) << (8 * count++);
            bits += width;
        }
        table[i] = entry | static_cast<uint64_t>(bits) << 48 | static_cast<uint64_t>(count) << 56;
    }
    return true;
}

}  // namespace nacd
