// Any bytes as a trajectory file: the scan's records lie in the file one behind the other, what they end at is scanned
// to the same records again, and so is every shorter file to those of them that it holds.
//
// Input: the file, then its options.
#include <algorithm>
#include <vector>

#include "../records.h"
#include "fuzz.h"

namespace {

using namespace nacd;
using namespace nacd::fuzz;

struct File {
    const uint8_t* data;
    uint64_t bytes;
    uint64_t readable;  // reads beyond it fail, as those of a bad disk do
};

bool read(void* context, uint64_t offset, void* dst, size_t bytes) {
    const auto* file = static_cast<const File*>(context);
    FUZZ_CHECK(offset <= file->bytes && bytes <= file->bytes - offset);
    if (offset + bytes > file->readable) return false;
    if (bytes > 0) std::memcpy(dst, file->data + offset, bytes);
    return true;
}

struct Found {
    std::vector<RecordHeader> records;
    uint64_t end = 0;
    RecordStatus status = RecordStatus::ok;
};

Found scan_file(const uint8_t* data, uint64_t bytes, uint64_t readable) {
    File file{data, bytes, readable};
    Found found;
    const auto keep = [](void* context, const RecordHeader& header) {
        static_cast<std::vector<RecordHeader>*>(context)->push_back(header);
    };
    found.status = scan({read, &file, bytes}, keep, &found.records, &found.end);
    uint64_t at = 0;
    for (const RecordHeader& record : found.records) {
        FUZZ_CHECK(record.offset == at && record.frame_bytes <= record.payload_bytes);
        FUZZ_CHECK(record_bytes(record.payload_bytes) <= bytes - at);
        at += record_bytes(record.payload_bytes);
    }
    FUZZ_CHECK(found.end == at && at <= bytes);
    FUZZ_CHECK(found.status != RecordStatus::ok || at == bytes);
    return found;
}

bool equal(const RecordHeader& x, const RecordHeader& y) { return std::memcmp(&x, &y, sizeof x) == 0; }

bool begins_with(const std::vector<RecordHeader>& records, const std::vector<RecordHeader>& begin) {
    return begin.size() <= records.size() && std::equal(begin.begin(), begin.end(), records.begin(), equal);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    Options input(data, size);
    const auto cut = input.take<uint16_t>(), readable = input.take<uint16_t>();
    const Found whole = scan_file(input.data(), input.size(), input.size());
    scan_file(input.data(), input.size(), std::min<size_t>(readable, input.size()));

    // a record before the last one has its header and commit word checked, but not its payload
    const Found again = scan_file(input.data(), whole.end, whole.end);
    FUZZ_CHECK(begins_with(whole.records, again.records));
    FUZZ_CHECK(again.records.size() + 1 >= whole.records.size());
    const uint64_t shorter = input.size() == 0 ? 0 : cut % input.size();
    const Found part = scan_file(input.data(), shorter, shorter);
    FUZZ_CHECK(begins_with(whole.records, part.records));
    for (size_t i = part.records.size(); i < whole.records.size(); ++i) {
        const RecordHeader& record = whole.records[i];
        // missing: it is not all there, or the last one that is all there has a payload that changed
        FUZZ_CHECK(record.offset + record_bytes(record.payload_bytes) > shorter || i == part.records.size());
    }
    return 0;
}
