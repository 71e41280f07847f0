#!/usr/bin/env bash
# Build and check the site in _docs/: bash docs/build_site.sh [preview]. A preview rebuilds on change.
set -euo pipefail
cd "$(dirname "$0")/.."
bash docs/get_mathjax.sh
[ "${1:-}" = preview ] && exec sphinx-autobuild -c docs nbs _docs --watch docs --port 8000
rm -rf _docs _doctrees
sphinx-build -W --keep-going -n -q -j auto -d _doctrees -c docs nbs _docs
python docs/check_site.py _docs
