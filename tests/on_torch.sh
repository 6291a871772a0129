#!/usr/bin/env bash
# Runs the tests under another version of torch, in a virtual environment of its own.
#
#     tests/on_torch.sh 2.9.1
#     tests/on_torch.sh 2.11.0 -q tests/test_model.py
#
# The environment is ${TMPDIR:-/tmp}/on_torch-VERSION or ON_TORCH_HOME. It is made by PYTHON (python3)
# and kept: the next call finds everything installed. Torch brings gigabytes of CUDA libraries where
# its ordinary build does.
set -euo pipefail

usage='usage: [ON_TORCH_HOME=FOLDER] [PYTHON=python3] tests/on_torch.sh VERSION [ARGUMENTS OF PYTEST]'
case ${1:-} in
    -h | --help)
        echo "$usage"
        exit 0
        ;;
    '' | *[!0-9.]*)
        echo "$usage" >&2
        exit 2
        ;;
esac
version=$1
shift
if [ $# -eq 0 ]; then
    set -- -q -n 2 --dist worksteal tests
fi

root=$(cd "$(dirname "$0")/.." && pwd)
home=${ON_TORCH_HOME:-${TMPDIR:-/tmp}/on_torch-$version}
if [ ! -x "$home/bin/python" ]; then
    "${PYTHON:-python3}" -m venv "$home"
fi

# All that the lists ask for but the torch that they pin; they include each other.
wanted=$home/requirements_without_torch.txt
cat "$root"/requirements.txt "$root"/{data,records,tests}/requirements.txt |
    grep -v -e '^-' -e '^torch==' > "$wanted"
"$home/bin/python" -m pip install --quiet --disable-pip-version-check "torch==$version" -r "$wanted"

cd "$root"
exec "$home/bin/python" -m pytest "$@"
