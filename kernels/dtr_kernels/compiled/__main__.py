"""Build the kernels ahead of time: for images whose serving stage has no compiler."""

import sys

from dtr_kernels.compiled.build import BuildError, build


def main() -> int:
    try:
        print(build())
    except BuildError as error:
        print(f"dtr_kernels: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
