// The codec on the CPU: the reference that every other backend is measured against.
#include "codec.h"

namespace nacd {

const char* version() noexcept { return NACD_VERSION; }

}  // namespace nacd
