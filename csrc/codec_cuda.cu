// The GPU's side of codec_cuda.h: one thread block decodes one block of 65,536 weights by the phases of block_gpu.h.
//
// By hand, for its registers and spills:
//     nvcc -std=c++20 -O3 --fmad=false -Xptxas -v -gencode arch=compute_90,code=sm_90 -cubin -o /dev/null csrc/codec_cuda.cu
#include "codec_cuda.h"

#include <cuda_runtime.h>

#include "block_gpu.h"

namespace nacd::gpu {

namespace {

constexpr int kThreads = kWarps * kLanes;
constexpr int kThreadBlocks = 3;  // on a multiprocessor: while one's first warp decodes symbols, the others write words

__global__ void __launch_bounds__(kThreads, kThreadBlocks) decode_blocks(const Launch launch, int32_t* status) {
    extern __shared__ __align__(16) uint8_t memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const Block block = block_of(launch, blockIdx.x);
    const uint32_t warp = threadIdx.x / kLanes;

    // The barrier behind a phase; true, in every thread, if it failed in one.
    const auto failed = [=](Status phase) {
        if (phase != Status::ok) atomicCAS(status, 0, static_cast<int32_t>(phase));
        return __syncthreads_or(phase != Status::ok) != 0;
    };
    if (failed(open_block(block, shared, warp, kWarps))) return;
    if (failed(decode_symbols(block, shared, warp, kWarps))) return;
    if (failed(measure_tiles(block, shared, warp, kWarps))) return;
    if (failed(place_tiles(block, shared, warp, kWarps))) return;
    if (failed(write_tiles(block, shared, warp, kWarps))) return;
    failed(write_exceptions(block, shared, warp, kWarps));
}

}  // namespace

const char* unusable() noexcept {
    int devices = 0;
    const cudaError_t error = cudaGetDeviceCount(&devices);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

const char* launch(const Launch& launch, uint32_t blocks, size_t shared_bytes, int32_t* status, void* stream) noexcept {
    if (blocks == 0) return nullptr;
    const auto shared = static_cast<int>(shared_bytes);
    cudaError_t error = cudaFuncSetAttribute(decode_blocks, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error == cudaSuccess) {
        decode_blocks<<<blocks, kThreads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(launch, status);
        error = cudaGetLastError();
    }
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace nacd::gpu
