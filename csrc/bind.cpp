// The Python module nacd_fast._codec: a thin layer over codec.h. Its types are declared in nacd_fast/_codec.pyi.
#include <nanobind/nanobind.h>

#include "codec.h"

NB_MODULE(_codec, m) {
    m.doc() = "The trajectory codec's native core.";
    m.def("version", &nacd::version, "Version of the package that the module was built with.");
}
