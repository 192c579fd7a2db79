// Canonical Huffman codes of residuals, at most kCodeBits long, lowest bit first.
#pragma once

#include <cstddef>
#include <cstdint>

#include "format.h"

namespace nacd {

inline constexpr size_t kTableSize = size_t{1} << kCodeBits;
inline constexpr int kEntrySymbols = 6;

// What kCodeBits bits of a stream decode to: up to six symbols in bytes 0 .. 5, the bits they take in byte 6 and
// their number in byte 7, so that one store and two additions take a decoder on.
using TableEntry = uint64_t;

struct Code {
    uint16_t bits;   // lowest first
    uint16_t width;  // 0: the symbol has no code
};

// Optimal lengths up to kCodeBits for `counts`, 0 where the count is 0; a single symbol takes one bit.
void huffman_lengths(const uint64_t counts[kSymbols], uint8_t lengths[kSymbols]) noexcept;

// Codes in the order of (length, symbol). False where the lengths make no prefix code.
bool huffman_codes(const uint8_t lengths[kSymbols], Code codes[kSymbols]) noexcept;

// False as huffman_codes. Bits that no code begins with decode to one symbol 0 of kCodeBits bits.
bool huffman_table(const uint8_t lengths[kSymbols], TableEntry table[kTableSize]) noexcept;

}  // namespace nacd
