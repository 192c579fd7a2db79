# Builds the core and the fuzz targets with AddressSanitizer and UBSan and runs them on csrc/fuzz/corpus: `make sanitize`.
# With CXX or the first compiler that has the sanitizers; where none has, it says so and that is all.
set -eu
build=build/sanitize
PATH=$(cd "$(dirname "${PYTHON:-python3}")" && pwd):$PATH   # the environment's cmake and ninja
mkdir -p "$build"

echo 'int main() { return 0; }' > "$build/probe.cpp"
compiler=
for candidate in ${CXX:-} c++ g++ clang++; do
    if "$candidate" -std=c++20 -fsanitize=address,undefined "$build/probe.cpp" -o "$build/probe" 2> "$build/probe.log" &&
        "$build/probe"; then
        compiler=$candidate
        break
    fi
done
if [ -z "$compiler" ]; then
    echo "WARNING: no compiler with -fsanitize=address,undefined: the fuzz corpus is NOT replayed" >&2
    [ "${NACD_NATIVE:-}" != require ]
    exit
fi

cmake -S . -B "$build" -G Ninja -DCMAKE_CXX_COMPILER="$compiler" -DCMAKE_BUILD_TYPE=RelWithDebInfo -DNACD_MODULE=OFF \
    -DNACD_REPLAY=ON -DNACD_SANITIZE=address,undefined > "$build/cmake.log" || { cat "$build/cmake.log"; exit 1; }
cmake --build "$build" > "$build/build.log" || { cat "$build/build.log"; exit 1; }
for target in decode encode scan; do
    "$build/csrc/fuzz/fuzz_$target" "csrc/fuzz/corpus/$target" 2> "$build/$target.log" || {
        tail -n 40 "$build/$target.log"
        exit 1
    }
done
