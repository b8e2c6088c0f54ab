#!/bin/sh
# Copies dagre (layout of directed graphs, MIT) from the version locked in package-lock.json to dagre.min.js, with its
# licence in front, so that the licence also stands in every page that carries the library. Needs npm.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp "$here/package.json" "$here/package-lock.json" "$work"
(cd "$work" && npm ci --ignore-scripts --no-audit --no-fund)
library="$work/node_modules/@dagrejs/dagre"
version=$(node -p "require('$library/package.json').version")
cp "$library/LICENSE" "$here/dagre.LICENSE"
{
  printf '/*! dagre %s with graphlib, https://github.com/dagrejs/dagre, MIT licence:\n' "$version"
  cat "$library/LICENSE"
  printf '*/\n'
  grep -v -e '^//# sourceMappingURL' -e '^/\*! For license' "$library/dist/dagre.min.js"
} > "$here/dagre.min.js"
