// Runs a fuzz target on files, and on all files of folders: what a compiler without libFuzzer can do with a corpus.
#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <vector>

#include "fuzz.h"

int main(int argc, char** argv) {
    std::vector<std::filesystem::path> files;
    for (int i = 1; i < argc; ++i) {
        if (!std::filesystem::is_directory(argv[i])) {
            files.emplace_back(argv[i]);
            continue;
        }
        for (const auto& entry : std::filesystem::directory_iterator(argv[i]))
            if (entry.is_regular_file()) files.push_back(entry.path());
    }
    std::sort(files.begin(), files.end());
    for (const auto& file : files) {
        std::ifstream in(file, std::ios::binary);
        if (!in) {
            std::cerr << file << ": cannot be read\n";
            return 1;
        }
        const std::vector<char> bytes{std::istreambuf_iterator<char>(in), {}};
        // of exactly its size, so that the target's reads are seen, too
        const auto input = nacd::fuzz::exactly<uint8_t>(bytes.size());
        std::copy(bytes.begin(), bytes.end(), input.get());
        std::cerr << file.filename().string() << '\n';  // which one it was, should it stop here
        LLVMFuzzerTestOneInput(input.get(), bytes.size());
    }
    std::cout << argv[0] << ": " << files.size() << " files\n";
    return files.empty() ? 1 : 0;
}
