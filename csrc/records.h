// The records of a trajectory file, and the scan that finds them; FORMAT.md, "File", says the same in prose. Little-
// endian, no padding between fields. No Python, no exceptions: status codes out.
#pragma once

#include <cstddef>
#include <cstdint>

namespace nacd {

inline constexpr uint32_t kRecordMagic = 0x4345524e;  // "NREC"
inline constexpr uint16_t kRecordVersion = 1;
inline constexpr uint64_t kNoStep = ~uint64_t{0};
inline constexpr uint64_t kMaxPayloadBytes = uint64_t{1} << 44;
inline constexpr uint64_t kMaxRecordStep = uint64_t{1} << 62;
inline constexpr uint64_t kCommit = 0x74696d6d6f63a55a;  // mixed into the commit word, so that it is not zero
inline constexpr size_t kCommitBytes = 8;
inline constexpr size_t kPage = 4096;  // what a file system writes at once

enum class RecordKind : uint8_t { schema = 1, frame = 2, seal = 3 };

struct RecordHeader {
    uint32_t magic;
    uint16_t version;
    uint8_t kind;            // RecordKind
    uint8_t reserved;        // 0
    uint64_t offset;         // of the record in its file
    uint64_t payload_bytes;  // behind this header; then zeros up to a multiple of 8, then the commit word
    uint64_t frame_bytes;    // of the payload: the frame, which begins it
    uint64_t step;
    uint64_t ref_a, ref_b;   // the steps of the frame's references, or kNoStep
    uint64_t zero_pages;     // the file's whole pages in payload and zeros that are all zeros
    uint32_t payload_crc;    // CRC-32C of the payload
    uint32_t header_crc;     // CRC-32C of the fields above
};
static_assert(sizeof(RecordHeader) == 72);

constexpr uint64_t padded(uint64_t payload_bytes) { return (payload_bytes + 7) / 8 * 8; }
constexpr uint64_t record_bytes(uint64_t payload_bytes) {
    return sizeof(RecordHeader) + padded(payload_bytes) + kCommitBytes;
}
constexpr uint64_t commit_word(const RecordHeader& header) {
    return (uint64_t{header.payload_crc} << 32 | header.header_crc) ^ kCommit;
}

enum class RecordStatus : int {
    ok = 0,
    torn,          // the file ends in a record that was not written to its end
    bad_magic,
    bad_version,
    bad_header,    // a field outside its limits
    bad_checksum,  // a header that changed since it was written
    bad_commit,    // a commit word that is not the record's
    bad_payload,   // a last record whose payload changed
    unreadable,    // the file could not be read there
};

// A sentence without a full stop; static storage.
const char* describe(RecordStatus status) noexcept;

// Where bytes come from. read fills dst with bytes [offset, offset + bytes), which lie below `bytes`; false: it cannot.
struct Source {
    bool (*read)(void* context, uint64_t offset, void* dst, size_t bytes);
    void* context;
    uint64_t bytes;  // of the file
};

// Calls found for each whole record, in the order of the file, and sets *end behind the last one. Headers and commit
// words are checked, and the payload of the last record: each record is on the disk before the next one is begun.
// ok: the records fill the file. torn: what follows *end was not written to its end and never counted. Else: damage
// at *end.
RecordStatus scan(const Source& source, void (*found)(void* context, const RecordHeader& header), void* context,
                  uint64_t* end) noexcept;

}  // namespace nacd
