#!/usr/bin/env bash
# Gathers what gpu_session.py needs on a machine that reaches nothing and has Python 3.12 (x86-64),
# torch 2.11, torchvision, accelerate, torchmetrics, safetensors, scipy, matplotlib, requests, httpx,
# rich, pytest and their needs: the missing wheels, in .wheels/. Then prints the commands to run there.
#
#     benchmarks/gpu_wheels.sh
set -euo pipefail
cd "$(dirname "$0")/.."

# Each named with its missing needs, as --no-deps fetches none; one version of each.
wheels=(
    diffusers==0.42.1 importlib-metadata==10.2.0 lazy-importer==0.1.0
    tyro==1.0.17 docstring-parser==0.18.0 typeguard==4.6.1
    pydantic==2.14.4 pydantic-core==2.50.5 annotated-types==0.8.0 typing-inspection==0.4.5
    typing-extensions==4.16.0
)
platforms=()
for name in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do
    platforms+=(--platform "${name}_x86_64")
done
rm -rf .wheels
python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
    --python-version 3.12 --implementation cp "${platforms[@]}" -d .wheels "${wheels[@]}"

limit=$((64 * 1024 * 1024))
tree=$(git ls-files -z --cached --others --exclude-standard | xargs -0 du -bc | tail -n 1 | cut -f 1)
carried=$(du -bc .wheels/* | tail -n 1 | cut -f 1)
echo "working tree $((tree / 1024)) kB, .wheels $((carried / 1024)) kB, of $((limit / 1024)) kB at most"
if ((tree + carried > limit)); then
    echo "error: more than 64 MiB travel; take something out" >&2
    exit 2
fi
cat <<'END'
carry: .wheels
command, in the repository's folder there, with 600 seconds:
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .wheels/*.whl && export PYTHONPATH=/tmp/site PYTHONUNBUFFERED=1 && python3 benchmarks/gpu_session.py --minutes 9 --stages tests speed small sampling --out_dir "${OUT:-results}"
then, while data and compiled networks are still there:
export PYTHONPATH=/tmp/site PYTHONUNBUFFERED=1 && python3 benchmarks/gpu_session.py --minutes 3 --stages recipes --out_dir "${OUT:-results}"
END
