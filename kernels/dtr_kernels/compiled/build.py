"""Compile source/*.c for this machine, once, and keep the library where it is found again.

Environment:
    CC                   the compiler (default: the first of cc, gcc, clang on the PATH).
    DTR_KERNELS_MARCH    what to compile for instead of the machine at hand ("native"), as -march takes it.
    DTR_KERNELS_CACHE    folder for the library (default: a folder in this package, or, where that cannot be written,
                         the user's cache folder).
"""

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

SOURCE = Path(__file__).with_name("source")
FLAGS = ("-O3", "-std=gnu11", "-ffp-contract=fast", "-fno-math-errno", "-shared", "-fPIC")
# What not every compiler knows, most wanted first. Those without OpenMP run a call on one thread; the last compiles for
# the oldest machine of its kind, which is only taken where nobody has named another.
FLAG_CHOICES = (
    ("-march={march}", "-fopenmp"),
    ("-mcpu={march}", "-fopenmp"),
    ("-march={march}", "-Wno-unknown-pragmas"),
    ("-mcpu={march}", "-Wno-unknown-pragmas"),
    ("-Wno-unknown-pragmas",),
)
TIMEOUT = 300  # seconds


class BuildError(RuntimeError):
    """The kernels could not be compiled; the message is one line."""


def build() -> Path:
    """The library's file, compiled if it is not there yet.

    Its name holds a hash of sources, flags, compiler and processor, so that a changed source or another machine on the
    same disk gets its own. Processes that arrive at once wait for the first. Raises BuildError.
    """
    compiler = _compiler()
    named = os.environ.get("DTR_KERNELS_MARCH")
    march, choices = named or "native", FLAG_CHOICES[:-1] if named else FLAG_CHOICES
    sources = sorted(SOURCE.glob("*.[ch]"))
    parts = [path.read_bytes() for path in sources]
    parts += [repr(x).encode() for x in (FLAGS, FLAG_CHOICES, march, _version(compiler), _processor())]
    name = f"dtr_kernels-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:16]}.so"
    folder = _folder()
    library = folder / name
    if library.is_file():
        return library
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.is_file():
            _compile(compiler, march, choices, [path for path in sources if path.suffix == ".c"], library)
    return library


def _compile(
    compiler: str, march: str, choices: tuple[tuple[str, ...], ...], sources: list[Path], library: Path
) -> None:
    first_error = ""
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        partial = Path(scratch, library.name)
        for choice in choices:
            chosen = [flag.format(march=march) for flag in choice]
            command = [compiler, *FLAGS, *chosen, *map(str, sources), "-o", str(partial), "-lm"]
            try:
                result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
            except (OSError, subprocess.TimeoutExpired) as error:
                raise BuildError(f"{compiler} did not finish: {error}") from error
            if result.returncode == 0:
                os.replace(partial, library)
                if "-fopenmp" not in choice:
                    warnings.warn(f"dtr_kernels: {compiler} has no OpenMP, calls run on one thread", stacklevel=2)
                return
            output = result.stderr.splitlines() or ["no output"]
            first_error = first_error or next((line for line in output if "error" in line), output[0])
    raise BuildError(f"{compiler} failed: {first_error}{f' (DTR_KERNELS_MARCH={march})' if march != 'native' else ''}")


def _compiler() -> str:
    wanted = os.environ.get("CC")
    for name in [wanted] if wanted else ["cc", "gcc", "clang"]:
        found = shutil.which(name)
        if found:
            return found
    raise BuildError(f"no C compiler: {f'CC={wanted} is' if wanted else 'cc, gcc, clang are'} not on the PATH")


def _version(compiler: str) -> str:
    try:
        return subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{compiler} --version did not run: {error}") from error


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    kept = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return platform.machine() + "".join(sorted({line for line in lines if line.startswith(kept)}))


def _folder() -> Path:
    wanted = os.environ.get("DTR_KERNELS_CACHE")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "dtr-deploy")
    for folder in [Path(wanted)] if wanted else [Path(__file__).with_name("_build"), cache]:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    raise BuildError(f"no folder to keep the library in: {wanted or cache} cannot be written")
