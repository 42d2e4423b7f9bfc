#!/usr/bin/env bash
# Installs hpa-ext with its CUDA kernels where there is no CUDA toolkit: the compiler comes from PyPI.
#
#   scripts/install_with_pypi_nvcc.sh [TOOLKIT] [argument of pip install ...]
#
# TOOLKIT is a folder for the compiler (default: build/cuda-toolkit, 250 MB; kept and used again). PYTHON chooses the
# interpreter that pip belongs to (default: python3). CUDAARCHS chooses architectures, as for any build with CMake.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
toolkit=$(realpath -m "${1:-build/cuda-toolkit}")
shift || true

root=$toolkit/nvidia/cu13
if [ ! -e "$root/lib64" ]; then
    # One release for all: ptxas refuses what an nvcc of another release hands to it. cuobjdump and the like are not needed.
    "$python" -m pip install --quiet --upgrade --no-deps --target "$toolkit" \
        'nvidia-cuda-nvcc==13.0.*' 'nvidia-nvvm==13.0.*' 'nvidia-cuda-crt==13.0.*' \
        'nvidia-cuda-runtime==13.0.*' 'nvidia-cuda-cccl==13.0.*'
    # What a toolkit has and the wheels lack: the name of the library folder that nvcc and CMake look for, and the name
    # without a version that a linker looks for.
    ln -sfn libcudart.so.13 "$root/lib/libcudart.so"
    ln -sfn lib "$root/lib64"
fi

export CUDACXX=$root/bin/nvcc HPA_CUDA=ON
exec "$python" -m pip install . "$@"
