// The trajectory codec's core: raw pointers in, status codes out. No Python, no torch, no exceptions.
#pragma once

namespace nacd {

// "major.minor.patch", that of the package the library was built with. Static storage.
const char* version() noexcept;

}  // namespace nacd
