# fuzz.sh TARGET SECONDS: libFuzzer with AddressSanitizer and UBSan: `make fuzz`. CXX: a clang that has it.
# Inputs that reach something new are kept in build/fuzz/TARGET, those that fail in build/fuzz/TARGET-*.
set -eu
target=$1 seconds=$2 build=build/fuzz
PATH=$(cd "$(dirname "${PYTHON:-python3}")" && pwd):$PATH   # the environment's cmake and ninja
mkdir -p "$build/$target"
cmake -S . -B "$build" -G Ninja -DCMAKE_CXX_COMPILER="${CXX:-clang++}" -DCMAKE_BUILD_TYPE=RelWithDebInfo \
    -DNACD_MODULE=OFF -DNACD_FUZZ=ON -DNACD_SANITIZE=address,undefined > "$build.log" || { cat "$build.log"; exit 1; }
cmake --build "$build" > "$build.log" || { cat "$build.log"; exit 1; }
exec "$build/csrc/fuzz/fuzz_$target" -max_total_time="$seconds" -max_len=16384 -timeout=10 -print_final_stats=1 \
    -artifact_prefix="$build/$target-" "$build/$target" "csrc/fuzz/corpus/$target"
