// The scan of a file of records. Every length is checked against the file before it is used.
#include "records.h"

#include <algorithm>
#include <cstring>

#include "codec.h"

namespace nacd {

const char* describe(RecordStatus status) noexcept {
    switch (status) {
        case RecordStatus::ok: return "ok";
        case RecordStatus::torn: return "a record that was not written to its end";
        case RecordStatus::bad_magic: return "not a record";
        case RecordStatus::bad_version: return "a record of a version that this build does not read";
        case RecordStatus::bad_header: return "a record's field outside its limits";
        case RecordStatus::bad_checksum: return "a record's header that changed since it was written";
        case RecordStatus::bad_commit: return "a commit word that is not its record's";
        case RecordStatus::bad_payload: return "a record's payload that changed since it was written";
        case RecordStatus::unreadable: return "bytes that cannot be read";
    }
    return "an unknown status";
}

namespace {

#ifdef FUZZING_BUILD_MODE_UNSAFE_FOR_PRODUCTION
constexpr bool kChecksums = false;  // a fuzzer could not get past one
#else
constexpr bool kChecksums = true;
#endif

bool read_at(const Source& source, uint64_t offset, void* dst, size_t bytes) {
    return offset <= source.bytes && bytes <= source.bytes - offset && source.read(source.context, offset, dst, bytes);
}

bool all_zero(const uint8_t* data, size_t bytes) {
    return std::all_of(data, data + bytes, [](uint8_t x) { return x == 0; });
}

// The pages whose part of [begin, end) is all zeros: those that the file system never wrote, and those of zeros.
uint64_t zero_parts(const Source& source, uint64_t begin, uint64_t end) {
    uint8_t page[kPage];
    uint64_t parts = 0;
    while (begin < end) {
        const auto bytes = static_cast<size_t>(std::min<uint64_t>(end - begin, kPage - begin % kPage));
        if (!read_at(source, begin, page, bytes)) return parts;
        parts += all_zero(page, bytes) ? 1 : 0;
        begin += bytes;
    }
    return parts;
}

// Whether a page of the record was never written; its header was.
bool has_hole(const Source& source, const RecordHeader& header) {
    const uint64_t end = header.offset + record_bytes(header.payload_bytes);
    return zero_parts(source, header.offset, end) > header.zero_pages;
}

RecordStatus check(const RecordHeader& h, uint64_t offset) {
    if (h.magic != kRecordMagic) return RecordStatus::bad_magic;
    if (h.version != kRecordVersion) return RecordStatus::bad_version;
    if (kChecksums && crc32c(0, &h, offsetof(RecordHeader, header_crc)) != h.header_crc) return RecordStatus::bad_checksum;
    const bool frame = h.kind == static_cast<uint8_t>(RecordKind::frame);
    const bool known = frame || h.kind == static_cast<uint8_t>(RecordKind::schema) ||
                       h.kind == static_cast<uint8_t>(RecordKind::seal);
    if (!known || h.reserved != 0 || h.offset != offset || h.payload_bytes > kMaxPayloadBytes ||
        h.frame_bytes > h.payload_bytes || h.step > kMaxRecordStep || h.zero_pages > padded(h.payload_bytes) / kPage)
        return RecordStatus::bad_header;
    if (!frame && (h.frame_bytes != 0 || h.ref_a != kNoStep)) return RecordStatus::bad_header;
    if (h.ref_a == kNoStep && h.ref_b != kNoStep) return RecordStatus::bad_header;
    return RecordStatus::ok;
}

// Fewer bytes than a header, at the end of the file.
RecordStatus check_stub(const Source& source, uint64_t offset) {
    uint8_t stub[sizeof(RecordHeader)];
    const auto bytes = static_cast<size_t>(source.bytes - offset);
    if (!read_at(source, offset, stub, bytes)) return RecordStatus::unreadable;
    const uint32_t magic = kRecordMagic;
    const bool begun = std::memcmp(stub, &magic, std::min(bytes, sizeof magic)) == 0;
    return begun || zero_parts(source, offset, source.bytes) > 0 ? RecordStatus::torn : RecordStatus::bad_magic;
}

// The record at `offset`, which is below the end of the file.
RecordStatus read_record(const Source& source, uint64_t offset, RecordHeader* header) {
    const uint64_t left = source.bytes - offset;
    if (left < sizeof *header) return check_stub(source, offset);
    if (!read_at(source, offset, header, sizeof *header)) return RecordStatus::unreadable;
    if (const RecordStatus status = check(*header, offset); status != RecordStatus::ok)
        return zero_parts(source, offset, offset + sizeof *header) > 0 ? RecordStatus::torn : status;
    const uint64_t bytes = record_bytes(header->payload_bytes);
    if (bytes > left) return RecordStatus::torn;
    uint64_t commit = 0;
    if (!read_at(source, offset + bytes - kCommitBytes, &commit, sizeof commit)) return RecordStatus::unreadable;
    if (!kChecksums || commit == commit_word(*header)) return RecordStatus::ok;
    return has_hole(source, *header) ? RecordStatus::torn : RecordStatus::bad_commit;
}

RecordStatus check_payload(const Source& source, const RecordHeader& header) {
    uint8_t chunk[16 * kPage];
    const uint64_t begin = header.offset + sizeof header;
    uint32_t crc = 0;
    for (uint64_t done = 0; done < header.payload_bytes;) {
        const auto bytes = static_cast<size_t>(std::min<uint64_t>(header.payload_bytes - done, sizeof chunk));
        if (!read_at(source, begin + done, chunk, bytes)) return RecordStatus::unreadable;
        crc = crc32c(crc, chunk, bytes);
        done += bytes;
    }
    uint8_t padding[8] = {};
    const auto rest = static_cast<size_t>(padded(header.payload_bytes) - header.payload_bytes);
    if (!read_at(source, begin + header.payload_bytes, padding, rest)) return RecordStatus::unreadable;
    if ((!kChecksums || crc == header.payload_crc) && all_zero(padding, rest)) return RecordStatus::ok;
    return has_hole(source, header) ? RecordStatus::torn : RecordStatus::bad_payload;
}

}  // namespace

RecordStatus scan(const Source& source, void (*found)(void* context, const RecordHeader& header), void* context,
                  uint64_t* end) noexcept {
    RecordHeader last{}, next{};
    RecordStatus status = RecordStatus::ok;
    uint64_t at = 0;
    bool any = false;
    while (at < source.bytes && (status = read_record(source, at, &next)) == RecordStatus::ok) {
        if (any) found(context, last);
        last = next;
        any = true;
        at += record_bytes(next.payload_bytes);
    }
    *end = at;
    if (!any) return status;
    if (const RecordStatus payload = check_payload(source, last); payload != RecordStatus::ok) {
        *end = last.offset;
        return payload;
    }
    found(context, last);
    return status;
}

}  // namespace nacd
