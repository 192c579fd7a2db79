# clang-tidy over what CMake compiles of csrc/, on JOBS processes: `make lint`. .clang-tidy says which checks.
# Where no compiler is found it says so and that is all.
set -eu
build=build/lint python=${PYTHON:-python3}
PATH=$(cd "$(dirname "$python")" && pwd):$PATH   # the environment's clang-tidy, cmake and ninja
mkdir -p "$build"
if ! cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_EXPORT_COMPILE_COMMANDS=ON -DNACD_REPLAY=ON \
    -DPython_EXECUTABLE="$python" -Dnanobind_ROOT="$("$python" -m nanobind --cmake_dir)" > "$build/cmake.log" 2>&1; then
    cat "$build/cmake.log" >&2
    if command -v "${CXX:-c++}" > /dev/null; then exit 1; fi
    echo "WARNING: no C++ compiler: csrc/ is NOT checked by clang-tidy" >&2
    [ "${NACD_NATIVE:-}" != require ]
    exit
fi
# Without the analyzer where it would walk through nanobind, which takes as long as everything else.
files=$(sed -n 's|.*"file": "\(.*/csrc/.*\.cpp\)".*|\1|p' "$build/compile_commands.json" | sort -u)
for file in $files; do
    case $file in
        */bind*) echo "--checks=-clang-analyzer-* $file" ;;
        *) echo "--quiet $file" ;;
    esac
done | xargs -P "${JOBS:-2}" -L 1 clang-tidy -p "$build" --quiet
