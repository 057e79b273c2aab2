"""Run the native code's own tests under the sanitizers, and fuzz it.

The same seed makes the same choices. A program prints how to repeat alone what it did last:
build/sanitize/SANITIZER/PROGRAM --seconds 0 --seed N.
"""

import os
import random
import shutil
import subprocess
import sys

import click

from scripts.lib.checkout import CHECKOUT

TOP = CHECKOUT / "build" / "sanitize"
LOG = TOP / "log"

COMMON = "-O1 -g -fno-omit-frame-pointer -fno-sanitize-recover=all -D_GLIBCXX_ASSERTIONS"
ADDRESS = "address,undefined"
FUZZERS = ("fuzz", "fuzz_channel", "fuzz_metadata")
ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_leaks=1:detect_stack_use_after_return=1:alloc_dealloc_mismatch=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "second_deadlock_stack=1",
}

HANG_SECONDS = 600
"""How long a program may take beyond its time before it counts as hanging."""


@click.command()
@click.option(
    "--seconds", type=click.IntRange(0), default=30, show_default=True, help="For each program."
)
@click.option("--seed", type=click.IntRange(0), help="Repeat the choices; random unless given.")
def main(seconds: int, seed: int | None) -> None:
    """Run the native code's own tests under the sanitizers, and fuzz it; status 1 if one fails."""
    seed = random.SystemRandom().getrandbits(30) if seed is None else seed
    compiler = "clang++" if has_sanitizers("clang++") else "g++"
    print(f"sanitize: {compiler}, {seconds} seconds each, seed {seed}", flush=True)
    TOP.mkdir(parents=True, exist_ok=True)
    choices: tuple[str, ...] = ("--seconds", str(seconds), "--seed", str(seed))
    failed = []

    tests: tuple[str, ...] = (
        "units",
        "stress",
        "threads",
        "faults",
        "resident_pages",
        "fast_path",
        "beside",
    )
    build(compiler, "address", f"-fsanitize={ADDRESS}", (*tests, *FUZZERS))
    failed += [name for name in tests if not passes(f"address/{name}", choices, seconds)]

    tests = ("threads", "stress", "fast_path", "beside")
    build(compiler, "thread", "-fsanitize=thread", tests)
    failed += [name for name in tests if not passes(f"thread/{name}", choices, seconds)]

    if compiler == "clang++":
        build(compiler, "fuzz", f"-fsanitize=fuzzer-no-link,{ADDRESS}", FUZZERS)
    for name in FUZZERS:
        if compiler == "clang++":
            passed = passes(f"fuzz/{name}", libfuzzer_options(name, seconds, seed), seconds)
        else:
            passed = passes(f"address/{name}", choices, seconds)
        failed += [] if passed else [name]

    for name in failed:
        print(f"sanitize: {name} failed", file=sys.stderr)
    sys.exit(1 if failed else 0)


def has_sanitizers(compiler: str) -> bool:
    """Tell whether a compiler is there with its sanitizers, which Debian's clang only recommends."""
    if shutil.which(compiler) is None:
        return False
    command = [compiler, "-x", "c++", "-", f"-fsanitize={ADDRESS}", "-o", os.devnull]
    return not subprocess.run(
        command, check=False, input=b"int main() {}", capture_output=True
    ).returncode


def build(compiler: str, sanitizer: str, flags: str, programs: tuple[str, ...]) -> None:
    """Compile the programs with a sanitizer; end with the compiler's output if that fails."""
    directory = TOP / sanitizer
    libfuzzer = "ON" if sanitizer == "fuzz" else "OFF"
    configure = [
        "cmake", "-S", str(CHECKOUT / "tests" / "native"), "-B", str(directory), "-G", "Ninja",
        "-DCMAKE_BUILD_TYPE=", f"-DLIBFUZZER={libfuzzer}", f"-DCMAKE_CXX_FLAGS={COMMON} {flags}",
    ]  # fmt: skip
    compile_ = ["cmake", "--build", str(directory), "--target", *programs]
    with LOG.open("wb") as log:
        for command in (configure, compile_):
            if subprocess.run(
                command, check=False, stdout=log, stderr=log, env=os.environ | {"CXX": compiler}
            ).returncode:
                sys.exit(f"sanitize: the build failed:\n{LOG.read_text()}")


def libfuzzer_options(program: str, seconds: int, seed: int) -> tuple[str, ...]:
    """Return arguments for libFuzzer, which clang++ has, with a corpus that lasts from run to run."""
    corpus = TOP / f"corpus-{program}"
    corpus.mkdir(exist_ok=True)
    return (
        f"-max_total_time={seconds}", f"-seed={seed}", "-timeout=60", "-max_len=8192",
        "-len_control=10", f"-artifact_prefix={TOP}/", str(corpus),
    )  # fmt: skip


def passes(program: str, arguments: tuple[str, ...], seconds: int) -> bool:
    """Run a program; print the last line of its output, or the last 40 if it fails or hangs."""
    command = [str(TOP / program), *arguments]
    print("==", *command, flush=True)
    with LOG.open("wb") as log:
        try:
            done = subprocess.run(
                command, check=False, stdout=log, stderr=subprocess.STDOUT,
                timeout=seconds + HANG_SECONDS, env=os.environ | ENVIRONMENT,
            )  # fmt: skip
            passed = done.returncode == 0
        except subprocess.TimeoutExpired:
            passed = False
    lines = LOG.read_text(errors="replace").splitlines()
    print(*lines[-1 if passed else -40 :], sep="\n", flush=True)
    return passed


if __name__ == "__main__":
    main(prog_name="scripts/run check/sanitize")
