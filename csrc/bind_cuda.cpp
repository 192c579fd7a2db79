// The Python module nacd_fast._codec_cuda: a thin layer over codec_cuda.h. Its types are declared in
// nacd_fast/_codec_cuda.pyi. A module of its own, so that nothing of CUDA can stop the other from loading.
//
// Host arrays are one-dimensional and contiguous; what lies on the GPU comes as addresses, which codec_cuda.py checks.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/tuple.h>

#include <cstdint>
#include <new>
#include <tuple>

#include "block_gpu.h"
#include "codec_cuda.h"

namespace nb = nanobind;

namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using OwnedBytes = nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>, nb::c_contig>;

void check(nacd::Status status) {
    if (status == nacd::Status::ok) return;
    if (status == nacd::Status::no_memory) throw std::bad_alloc();
    throw nb::value_error(nacd::describe(status));
}

nacd::FrameInfo head_of(const Bytes& head) {
    nacd::FrameInfo info;
    check(nacd::read_head(head.data(), head.size(), &info));
    return info;
}

// (plan, begin, end, shared_bytes): the blocks' payload is [begin, end) of the frame.
std::tuple<OwnedBytes, uint64_t, uint64_t, size_t> plan(const Bytes& head, uint64_t first, uint64_t blocks) {
    const nacd::FrameInfo info = head_of(head);
    uint64_t begin = 0, end = 0;
    check(nacd::block_range(head.data(), info, first, blocks, &begin, &end));
    const size_t bytes = nacd::gpu::plan_bytes(info, blocks);
    auto* data = new uint8_t[bytes];
    nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<uint8_t*>(p); });
    check(nacd::gpu::make_plan(head.data(), info, first, blocks, data));
    return {OwnedBytes(data, {bytes}, owner), begin, end, nacd::gpu::shared_bytes(info)};
}

void check_payload(const Bytes& head, const Bytes& payload, uint64_t first, uint64_t blocks) {
    const nacd::FrameInfo info = head_of(head);
    nacd::Status status;
    {
        const nb::gil_scoped_release released;
        status = nacd::gpu::check_payload(head.data(), info, payload.data(), payload.size(), first, blocks);
    }
    check(status);
}

void launch(uintptr_t plan, uintptr_t payload, uintptr_t a, uintptr_t b, uintptr_t dst, bool base_only, uint32_t blocks,
            size_t shared_bytes, uintptr_t status, uintptr_t stream) {
    const nacd::gpu::Launch launch{
        reinterpret_cast<const uint8_t*>(plan), reinterpret_cast<const uint8_t*>(payload),
        reinterpret_cast<const uint32_t*>(a),   reinterpret_cast<const uint32_t*>(b),
        reinterpret_cast<uint32_t*>(dst),       base_only};
    const char* error = nacd::gpu::launch(launch, blocks, shared_bytes, reinterpret_cast<int32_t*>(status),
                                          reinterpret_cast<void*>(stream));
    if (error != nullptr) nb::raise("decoding on the GPU did not start: %s", error);
}

}  // namespace

NB_MODULE(_codec_cuda, m) {
    m.doc() = "The trajectory codec's decoder for NVIDIA GPUs.";
    m.attr("SLACK") = nacd::gpu::kGpuSlack;
    m.attr("MOST_SHARED_BYTES") = nacd::gpu::shared_bytes(nacd::kMaxTables);
    m.def("version", &nacd::version, "Version of the package that the module was built with.");
    m.def("unusable", &nacd::gpu::unusable, "Why CUDA cannot be used on this machine; None where it can.");
    m.def("describe", [](int status) { return nacd::describe(static_cast<nacd::Status>(status)); }, nb::arg("status"));
    m.def("plan", &plan, nb::arg("head"), nb::arg("first"), nb::arg("blocks"));
    m.def("check_payload", &check_payload, nb::arg("head"), nb::arg("payload"), nb::arg("first"), nb::arg("blocks"));
    m.def("launch", &launch, nb::arg("plan"), nb::arg("payload"), nb::arg("a"), nb::arg("b"), nb::arg("dst"),
          nb::arg("base_only"), nb::arg("blocks"), nb::arg("shared_bytes"), nb::arg("status"), nb::arg("stream"));
}
