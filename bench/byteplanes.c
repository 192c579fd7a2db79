/* Integer deltas of float bit patterns, whole or as four byte planes: what zstd and pcodec are given in bench_store.

   cc -O3 -march=native -shared -fPIC byteplanes.c -o byteplanes.so; peers_store.py does it.

   A float's bits are mapped to an integer of the same order (negative ones reversed), the previous snapshot's integer
   is subtracted modulo 2^32, and the sign is folded into the lowest bit: small steps of either sign become small
   unsigned numbers, and the high planes hold little. Everything is exact for every bit pattern. n counts weights. */

#include <stddef.h>
#include <stdint.h>

static inline uint32_t ordered(uint32_t bits) { return bits ^ ((uint32_t)((int32_t)bits >> 31) & 0x7fffffffu); }

static inline uint32_t fold(uint32_t d) { return (d << 1) ^ (uint32_t)((int32_t)d >> 31); }

static inline uint32_t unfold(uint32_t z) { return (z >> 1) ^ (0u - (z & 1)); }

void delta(const uint32_t *restrict weights, const uint32_t *restrict previous, uint32_t *restrict out, size_t n)
{
    for (size_t i = 0; i < n; i++) out[i] = ordered(weights[i]) - ordered(previous[i]);
}

void undelta(const uint32_t *restrict deltas, const uint32_t *restrict previous, uint32_t *restrict out, size_t n)
{
    for (size_t i = 0; i < n; i++) out[i] = ordered(deltas[i] + ordered(previous[i]));
}

/* planes [4, n]: the lowest bytes first. */
void split(const uint32_t *restrict weights, const uint32_t *restrict previous, uint8_t *restrict planes, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        uint32_t z = fold(ordered(weights[i]) - ordered(previous[i]));
        planes[i] = (uint8_t)z;
        planes[n + i] = (uint8_t)(z >> 8);
        planes[2 * n + i] = (uint8_t)(z >> 16);
        planes[3 * n + i] = (uint8_t)(z >> 24);
    }
}

void join(const uint8_t *restrict planes, const uint32_t *restrict previous, uint32_t *restrict out, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        uint32_t z = planes[i] | (uint32_t)planes[n + i] << 8 | (uint32_t)planes[2 * n + i] << 16
                     | (uint32_t)planes[3 * n + i] << 24;
        out[i] = ordered(unfold(z) + ordered(previous[i]));
    }
}
