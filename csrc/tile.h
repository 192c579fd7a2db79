// One tile on its way out of a block, for block_decode.cpp and its loops in AVX2.
#pragma once

#include <cstddef>
#include <cstdint>

#include "format.h"
#include "weight.h"

namespace nacd::NACD_ISA {

// Where a block's sections have been read up to.
struct Cursor {
    const uint8_t* low;
    uint64_t low_position;
    const uint8_t* zero_fields;
    size_t zero, zeros;
};

// What a tile is decoded with: its references, count <= kTile, and the numbers its mode byte stands for.
struct Tile {
    Predictor predictor;
    int zero_bits;
    float alpha;
    const uint32_t* a;
    const uint32_t* b;
    const int8_t* symbols;
    uint32_t* dst;
    size_t count;

    uint32_t predicted(size_t i) const {
        return predict(predictor, alpha, zero_bits, a == nullptr ? 0 : a[i], b == nullptr ? 0 : b[i]);
    }
};

}  // namespace nacd::NACD_ISA
