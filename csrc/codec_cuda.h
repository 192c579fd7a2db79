// Frames on a GPU. The host checks the head and the payload's checksums and makes a plan; the GPU checks and decodes the
// blocks, one a thread block (block_gpu.h). The GPU's memory is the caller's: nothing is allocated here.
#pragma once

#include <cstddef>
#include <cstdint>

#include "codec.h"

namespace nacd::gpu {

struct Launch;

// The bytes of a plan, and of the shared memory that a thread block takes with it.
size_t plan_bytes(const FrameInfo& info, uint64_t blocks) noexcept;
size_t shared_bytes(const FrameInfo& info) noexcept;

// What decoding blocks [first, first + blocks) needs of the head, into plan_bytes.
Status make_plan(const uint8_t* head, const FrameInfo& info, uint64_t first, uint64_t blocks, uint8_t* plan) noexcept;

// Compares the blocks' payload with its checksums. On the host: the bytes come from a file, so a CPU has them in its
// cache anyway, and its instruction sums them up faster than they are copied to a GPU.
Status check_payload(const uint8_t* head, const FrameInfo& info, const uint8_t* payload, size_t payload_bytes,
                     uint64_t first, uint64_t blocks) noexcept;

// What the GPU does with a plan, on the host: for tests. Takes what decode takes, payload without slack.
Status decode_emulated(const uint8_t* head, const FrameInfo& info, const uint8_t* payload, size_t payload_bytes,
                       uint64_t first, uint64_t blocks, const uint32_t* a, const uint32_t* b, uint32_t* dst,
                       bool base_only) noexcept;

// The rest is only in the module that is built with nvcc.

// Why CUDA cannot be used on this machine; null where it can.
const char* unusable() noexcept;

// Starts the decoding of `blocks` blocks on the current device and returns. `status` is on the GPU, 0 before the first
// launch: the status of a block that failed is stored there, and stays. Returns what CUDA has against it, or null.
const char* launch(const Launch& launch, uint32_t blocks, size_t shared_bytes, int32_t* status, void* stream) noexcept;

}  // namespace nacd::gpu
