// The trajectory codec's core: raw pointers in, status codes out. No Python, no torch, no exceptions.
#pragma once

#include <cstddef>
#include <cstdint>

#include "format.h"

namespace nacd {

// "major.minor.patch", that of the package the library was built with. Static storage.
const char* version() noexcept;

enum class Status : int {
    ok = 0,
    bad_argument,    // a pointer, size or option that the caller got wrong
    truncated,       // fewer bytes than the header says
    bad_magic,
    bad_version,
    bad_header,      // a field outside its limits
    bad_checksum,    // bytes changed since they were written
    bad_table,       // Huffman code lengths that make no prefix code
    bad_block,       // sections that do not fill the block exactly
    bad_tile,        // an unknown mode
    bad_stream,      // a stream that is too short, or a value outside its limits
    bad_words,       // decoded words that are not those that were encoded
    no_space,        // dst_capacity is below encode_bound
    no_memory,
};

// A sentence without a full stop; static storage.
const char* describe(Status status) noexcept;

// What the machine runs: "avx2" or "portable". `isa` asks for one by name; a null or empty name takes the best.
// Null where the one asked for is not available.
struct Kernels;
const Kernels* kernels(const char* isa) noexcept;
const char* name(const Kernels* kernels) noexcept;

// One run of tiles in bounded-error mode: values are multiples of `step`, each within `tolerance` of its weight.
struct StepRequest {
    uint64_t first_tile;
    float step;       // 2^-126 .. 2^126
    float tolerance;  // >= 0; 0 keeps a value only where it is the multiple itself
};

struct EncodeOptions {
    Predictor predictor = Predictor::none;
    uint8_t zero_bits = 0;             // 0 for float32; 16 for bfloat16, widened to 32 bits
    bool fit_alpha = false;            // least squares over the frame instead of `alpha`
    float alpha = 0;
    const StepRequest* runs = nullptr; // lossless where there are none
    size_t run_count = 0;
    int threads = 1;
    const Kernels* kernels = nullptr;  // null: the best
};

struct EncodeResult {
    size_t bytes = 0;
    float alpha = 0;
    uint64_t exceptions = 0;  // weights stored apart, in full
    double max_error = 0;     // the largest |decoded - weight|; 0 in lossless mode
};

// Bytes that encode may need for `count` weights in `runs` runs; 0 where count is above the limit.
size_t encode_bound(uint64_t count, size_t runs) noexcept;

// Codes words [count] against references a, b [count] (null where the predictor takes none) into dst.
Status encode(const uint32_t* words, const uint32_t* a, const uint32_t* b, uint64_t count, const EncodeOptions& options,
              uint8_t* dst, size_t dst_capacity, EncodeResult* result) noexcept;

struct FrameInfo {
    FrameHeader header;
    size_t head_bytes;  // where the first block's payload begins
};

// Reads a frame's head: src needs head_bytes bytes, not the blocks. With fewer than a header, or than the head:
// Status::truncated, and head_bytes says how many are needed (0: not known yet). The checksum is verified.
Status read_head(const uint8_t* src, size_t src_bytes, FrameInfo* info) noexcept;

// The bytes [*begin, *end) of the frame that hold blocks [first, first + blocks).
Status block_range(const uint8_t* head, const FrameInfo& info, uint64_t first, uint64_t blocks, uint64_t* begin,
                   uint64_t* end) noexcept;

struct DecodeOptions {
    int threads = 1;
    bool verify = false;     // compare the decoded words with their checksum, too
    bool base_only = false;  // cells without their low bits: approximate, cheaper, never with `verify`
    const Kernels* kernels = nullptr;
};

// Decodes blocks [first, first + blocks): head from read_head, payload the bytes of block_range, readable for kSlack
// bytes more. a, b, dst begin at weight first * kBlock. dst is meaningful only if this returns Status::ok.
Status decode(const uint8_t* head, const FrameInfo& info, const uint8_t* payload, size_t payload_bytes, uint64_t first,
              uint64_t blocks, const uint32_t* a, const uint32_t* b, uint32_t* dst, const DecodeOptions& options) noexcept;

// The largest error of decode with base_only, over the frame's blocks in `payload` as above; 0 where all is exact.
Status base_error(const uint8_t* head, const FrameInfo& info, const uint8_t* payload, size_t payload_bytes,
                  uint64_t first, uint64_t blocks, double* error) noexcept;

// CRC-32C (Castagnoli) of data, continued from `crc`; 0 starts one.
uint32_t crc32c(uint32_t crc, const void* data, size_t bytes) noexcept;

}  // namespace nacd
