// The Python module nacd_fast._codec: a thin layer over codec.h. Its types are declared in nacd_fast/_codec.pyi.
//
// Arrays are one-dimensional, contiguous and on the CPU; words are uint32. The GIL is released while coding.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "codec.h"
#include "codec_cuda.h"
#include "records.h"

namespace nb = nanobind;

namespace {

using Words = nb::ndarray<const uint32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using MutableWords = nb::ndarray<uint32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using OwnedBytes = nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>, nb::c_contig>;
using MaybeWords = std::optional<Words>;

void check(nacd::Status status) {
    if (status == nacd::Status::ok) return;
    if (status == nacd::Status::no_memory) throw std::bad_alloc();
    throw nb::value_error(nacd::describe(status));
}

const nacd::Kernels* find_kernels(const std::string& isa) {
    const nacd::Kernels* found = nacd::kernels(isa.c_str());
    if (found == nullptr) throw nb::value_error(("no kernels named '" + isa + "' on this machine").c_str());
    return found;
}

const uint32_t* reference(const MaybeWords& words, size_t count, const char* name) {
    if (!words) return nullptr;
    if (words->size() != count)
        throw nb::value_error((std::string("reference ") + name + " has " + std::to_string(words->size()) +
                               " words, must have " + std::to_string(count)).c_str());
    return words->data();
}

using Run = std::tuple<uint64_t, float, float>;

std::tuple<OwnedBytes, float, uint64_t, double> encode(const Words& words, const MaybeWords& a, const MaybeWords& b,
                                                       int predictor, std::optional<float> alpha, int zero_bits,
                                                       const std::vector<Run>& runs, int threads, const std::string& isa) {
    if (predictor < 0 || predictor > 2) throw nb::value_error("predictor must be 0, 1 or 2");
    if (zero_bits != 0 && zero_bits != 16) throw nb::value_error("zero_bits must be 0 or 16");
    std::vector<nacd::StepRequest> requests;
    requests.reserve(runs.size());
    for (const auto& [first_tile, step, tolerance] : runs) requests.push_back({first_tile, step, tolerance});
    nacd::EncodeOptions options;
    options.predictor = static_cast<nacd::Predictor>(predictor);
    options.zero_bits = static_cast<uint8_t>(zero_bits);
    options.fit_alpha = !alpha.has_value();
    options.alpha = alpha.value_or(0.0f);
    options.runs = requests.data();
    options.run_count = requests.size();
    options.threads = threads;
    options.kernels = find_kernels(isa);
    const size_t count = words.size();
    const uint32_t *pa = reference(a, count, "a"), *pb = reference(b, count, "b");

    nacd::EncodeResult result;
    std::unique_ptr<uint8_t[]> frame;
    {
        const nb::gil_scoped_release released;
        const size_t bound = nacd::encode_bound(count, requests.size());
        const std::unique_ptr<uint8_t[]> room(new uint8_t[bound]);  // touched only as far as it is filled
        const nacd::Status status = nacd::encode(words.data(), pa, pb, count, options, room.get(), bound, &result);
        if (status == nacd::Status::ok) {
            frame.reset(new uint8_t[result.bytes]);
            std::memcpy(frame.get(), room.get(), result.bytes);
        }
        if (status != nacd::Status::ok) result.bytes = static_cast<size_t>(status);
    }
    if (!frame) check(static_cast<nacd::Status>(result.bytes));
    uint8_t* data = frame.release();
    nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<uint8_t*>(p); });
    return {OwnedBytes(data, {result.bytes}, owner), result.alpha, result.exceptions, result.max_error};
}

nacd::FrameInfo head_of(const Bytes& head) {
    nacd::FrameInfo info;
    check(nacd::read_head(head.data(), head.size(), &info));
    return info;
}

// (count, bytes, head_bytes, predictor, zero_bits, alpha, blocks, runs)
std::tuple<uint64_t, uint64_t, uint64_t, int, int, float, uint32_t, uint32_t> read_head(const Bytes& head) {
    const nacd::FrameInfo info = head_of(head);
    const nacd::FrameHeader& h = info.header;
    return {h.count, h.bytes, info.head_bytes, h.predictor, h.zero_bits, h.alpha, h.blocks, h.runs};
}

std::tuple<uint64_t, uint64_t> block_range(const Bytes& head, uint64_t first, uint64_t blocks) {
    uint64_t begin = 0, end = 0;
    check(nacd::block_range(head.data(), head_of(head), first, blocks, &begin, &end));
    return {begin, end};
}

// The payload with kSlack bytes behind it: the caller's where it has them, else a copy.
struct Payload {
    const uint8_t* data;
    std::unique_ptr<uint8_t[]> copy;
    Payload(const Bytes& source, size_t bytes) : data(source.data()) {
        if (bytes > source.size()) throw nb::value_error(nacd::describe(nacd::Status::truncated));
        if (source.size() - bytes >= nacd::kSlack) return;
        copy.reset(new uint8_t[bytes + nacd::kSlack]());
        if (bytes > 0) std::memcpy(copy.get(), source.data(), bytes);
        data = copy.get();
    }
};

// How many words the blocks have; an error where `out` has another number.
size_t words_in(const nacd::FrameInfo& info, uint64_t first, uint64_t blocks, const MutableWords& out) {
    if (first > info.header.blocks || blocks > info.header.blocks - first)
        throw nb::value_error("blocks outside the frame");
    const uint64_t begin = first * nacd::kBlock, end = std::min<uint64_t>(info.header.count, (first + blocks) * nacd::kBlock);
    const size_t count = blocks == 0 ? 0 : end - begin;
    if (out.size() != count)
        throw nb::value_error(("out has " + std::to_string(out.size()) + " words, must have " + std::to_string(count)).c_str());
    return count;
}

void decode(const Bytes& head, const Bytes& payload, uint64_t payload_bytes, uint64_t first, uint64_t blocks,
            const MaybeWords& a, const MaybeWords& b, const MutableWords& out, int threads, bool verify, bool base_only,
            const std::string& isa) {
    const nacd::FrameInfo info = head_of(head);
    const size_t count = words_in(info, first, blocks, out);
    const uint32_t *pa = reference(a, count, "a"), *pb = reference(b, count, "b");
    const nacd::DecodeOptions options{threads, verify, base_only, find_kernels(isa)};
    const Payload padded(payload, payload_bytes);
    nacd::Status status;
    {
        const nb::gil_scoped_release released;
        status = nacd::decode(head.data(), info, padded.data, payload_bytes, first, blocks, pa, pb, out.data(), options);
    }
    check(status);
}

// As decode, by the GPU's functions on the host: for tests.
void decode_emulated(const Bytes& head, const Bytes& payload, uint64_t payload_bytes, uint64_t first, uint64_t blocks,
                     const MaybeWords& a, const MaybeWords& b, const MutableWords& out, bool base_only) {
    const nacd::FrameInfo info = head_of(head);
    const size_t count = words_in(info, first, blocks, out);
    const uint32_t *pa = reference(a, count, "a"), *pb = reference(b, count, "b");
    if (payload_bytes > payload.size()) check(nacd::Status::truncated);
    nacd::Status status;
    {
        const nb::gil_scoped_release released;
        status = nacd::gpu::decode_emulated(head.data(), info, payload.data(), payload_bytes, first, blocks, pa, pb,
                                            out.data(), base_only);
    }
    check(status);
}

double base_error(const Bytes& head, const Bytes& payload, uint64_t payload_bytes, uint64_t first, uint64_t blocks) {
    const nacd::FrameInfo info = head_of(head);
    if (payload_bytes > payload.size()) check(nacd::Status::truncated);
    double error = 0;
    check(nacd::base_error(head.data(), info, payload.data(), payload_bytes, first, blocks, &error));
    return error;
}

uint32_t crc32c(const Bytes& data, uint32_t crc) {
    const nb::gil_scoped_release released;
    return nacd::crc32c(crc, data.data(), data.size());
}

bool read_descriptor(void* context, uint64_t offset, void* dst, size_t bytes) {
    const int descriptor = *static_cast<const int*>(context);
    auto* out = static_cast<uint8_t*>(dst);
    while (bytes > 0) {
        const ssize_t got = ::pread(descriptor, out, bytes, static_cast<off_t>(offset));
        if (got <= 0) return false;
        out += got, offset += static_cast<uint64_t>(got), bytes -= static_cast<size_t>(got);
    }
    return true;
}

// (offset, kind, step, ref_a, ref_b, frame_bytes, payload_bytes, payload_crc, header_crc)
using RecordTuple = std::tuple<uint64_t, int, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint32_t, uint32_t>;

// (records, end of the last one, status, its sentence)
std::tuple<std::vector<RecordTuple>, uint64_t, int, std::string> scan(int descriptor, uint64_t file_bytes) {
    struct Found {
        std::vector<RecordTuple> records;
        bool no_memory = false;
    } found;
    const auto add = [](void* context, const nacd::RecordHeader& h) {
        auto& to = *static_cast<Found*>(context);
        try {
            to.records.emplace_back(h.offset, h.kind, h.step, h.ref_a, h.ref_b, h.frame_bytes, h.payload_bytes,
                                    h.payload_crc, h.header_crc);
        } catch (const std::bad_alloc&) {
            to.no_memory = true;
        }
    };
    uint64_t end = 0;
    nacd::RecordStatus status;
    {
        const nb::gil_scoped_release released;
        status = nacd::scan({&read_descriptor, &descriptor, file_bytes}, add, &found, &end);
    }
    if (found.no_memory) throw std::bad_alloc();
    return {std::move(found.records), end, static_cast<int>(status), nacd::describe(status)};
}

}  // namespace

NB_MODULE(_codec, m) {
    m.doc() = "The trajectory codec's native core.";
    m.attr("BLOCK") = nacd::kBlock;
    m.attr("TILE") = nacd::kTile;
    m.attr("SLACK") = nacd::kSlack;
    m.def("version", &nacd::version, "Version of the package that the module was built with.");
    m.def("kernels", [] { return nacd::name(nacd::kernels(nullptr)); }, "The kernels that this machine takes by default.");
    m.def("encode", &encode, nb::arg("words"), nb::arg("a").none(), nb::arg("b").none(), nb::arg("predictor"),
          nb::arg("alpha").none(), nb::arg("zero_bits"), nb::arg("runs"), nb::arg("threads"), nb::arg("isa"));
    m.def("read_head", &read_head, nb::arg("head"));
    m.def("block_range", &block_range, nb::arg("head"), nb::arg("first"), nb::arg("blocks"));
    m.def("decode", &decode, nb::arg("head"), nb::arg("payload"), nb::arg("payload_bytes"), nb::arg("first"),
          nb::arg("blocks"), nb::arg("a").none(), nb::arg("b").none(), nb::arg("out"), nb::arg("threads"),
          nb::arg("verify"), nb::arg("base_only"), nb::arg("isa"));
    m.def("decode_emulated", &decode_emulated, nb::arg("head"), nb::arg("payload"), nb::arg("payload_bytes"),
          nb::arg("first"), nb::arg("blocks"), nb::arg("a").none(), nb::arg("b").none(), nb::arg("out"),
          nb::arg("base_only"));
    m.def("base_error", &base_error, nb::arg("head"), nb::arg("payload"), nb::arg("payload_bytes"), nb::arg("first"),
          nb::arg("blocks"));
    m.def("crc32c", &crc32c, nb::arg("data"), nb::arg("crc") = 0);
    m.def("scan", &scan, nb::arg("descriptor"), nb::arg("file_bytes"));
}
