// A warp's work, written once for the GPU and for the host, where it is tested.
//
// each(f) calls f(lane), on the GPU once in every lane, on the host for 32 lanes in turn. PerLane holds what a lane keeps
// between two such calls; lanes exchange values through the functions below and nothing else.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <memory>

#ifdef __CUDACC__
#define NACD_GPU __device__ inline
#define NACD_UNROLL _Pragma("unroll 4")
#else
#define NACD_GPU inline
#define NACD_UNROLL
#endif

namespace nacd::gpu {

inline constexpr uint32_t kLanes = 32;

#ifdef __CUDACC__

template <class T>
struct PerLane {
    T value;
    __device__ T& operator[](uint32_t) { return value; }
};

template <class F>
__device__ inline void each(F f) {
    f(threadIdx.x % kLanes);
}

__device__ inline uint32_t sum(PerLane<uint32_t>& x) { return __reduce_add_sync(~0u, x.value); }

// Each lane's value becomes the sum of those before it; returns the sum of all.
__device__ inline uint32_t sums_before(PerLane<uint32_t>& x) {
    uint32_t upto = x.value;
    for (uint32_t distance = 1; distance < kLanes; distance *= 2) {
        const uint32_t other = __shfl_up_sync(~0u, upto, distance);
        if (threadIdx.x % kLanes >= distance) upto += other;
    }
    x.value = upto - x.value;
    return __shfl_sync(~0u, upto, kLanes - 1);
}

// A bit for each lane whose value is true.
__device__ inline uint32_t lanes_where(PerLane<bool>& x) { return __ballot_sync(~0u, x.value); }

// In the last lane of those that have the same value: true.
__device__ inline PerLane<bool> are_last(PerLane<uint32_t>& x) {
    return {__match_any_sync(~0u, x.value) >> threadIdx.x % kLanes == 1};
}

// What a lane stored before, the others' stores behind this follow.
__device__ inline void in_order() { __syncwarp(); }

__device__ inline uint32_t popcount(uint32_t x) { return static_cast<uint32_t>(__popc(x)); }

__device__ inline uint32_t load_word(const uint8_t* p) { return __ldg(reinterpret_cast<const uint32_t*>(p)); }

__device__ inline void store_word(int8_t* p, uint32_t x) { *reinterpret_cast<uint32_t*>(p) = x; }

__device__ inline float reciprocal(float x) { return __frcp_rn(x); }

#else

template <class T>
struct PerLane {
    T values[kLanes];
    T& operator[](uint32_t lane) { return values[lane]; }
};

template <class F>
void each(F f) {
    for (uint32_t lane = 0; lane < kLanes; ++lane) f(lane);
}

inline uint32_t sum(PerLane<uint32_t>& x) {
    uint32_t total = 0;
    each([&](uint32_t lane) { total += x[lane]; });
    return total;
}

inline uint32_t sums_before(PerLane<uint32_t>& x) {
    uint32_t total = 0;
    each([&](uint32_t lane) {
        const uint32_t value = x[lane];
        x[lane] = total;
        total += value;
    });
    return total;
}

inline uint32_t lanes_where(PerLane<bool>& x) {
    uint32_t mask = 0;
    each([&](uint32_t lane) { mask |= static_cast<uint32_t>(x[lane]) << lane; });
    return mask;
}

inline PerLane<bool> are_last(PerLane<uint32_t>& x) {
    PerLane<bool> last;
    each([&](uint32_t lane) {
        last[lane] = std::find(x.values + lane + 1, x.values + kLanes, x[lane]) == x.values + kLanes;
    });
    return last;
}

inline void in_order() {}

inline uint32_t popcount(uint32_t x) { return static_cast<uint32_t>(std::popcount(x)); }

inline uint32_t load_word(const uint8_t* p) {
    uint32_t x;
    std::memcpy(&x, std::assume_aligned<4>(p), sizeof x);
    return x;
}

inline void store_word(int8_t* p, uint32_t x) { std::memcpy(std::assume_aligned<4>(p), &x, sizeof x); }

inline float reciprocal(float x) { return 1.0f / x; }

#endif

NACD_GPU uint32_t least(uint32_t x, uint32_t y) { return x < y ? x : y; }
NACD_GPU uint32_t rounded_up(uint32_t x, uint32_t y) { return (x + y - 1) / y; }
NACD_GPU uint32_t bytes_into_word(const uint8_t* p) { return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(p) & 3); }

}  // namespace nacd::gpu
