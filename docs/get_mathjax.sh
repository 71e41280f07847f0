#!/usr/bin/env bash
# Put MathJax (one version of it) into docs/_static/mathjax, so that no page asks another host for it. Needs npm, once.
set -euo pipefail
cd "$(dirname "$0")"
version=3.2.2
dest=_static/mathjax
[ "$(cat "$dest/VERSION" 2>/dev/null)" = "$version" ] && exit 0
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
(cd "$tmp" && npm pack --silent "mathjax@$version" > /dev/null && tar xzf "mathjax-$version.tgz")
rm -rf "$dest"
mkdir -p "$dest/output/chtml/fonts"
cp "$tmp/package/es5/tex-chtml-full.js" "$tmp/package/LICENSE" "$dest/"
cp -r "$tmp/package/es5/output/chtml/fonts/woff-v2" "$dest/output/chtml/fonts/"
echo "$version" > "$dest/VERSION"
