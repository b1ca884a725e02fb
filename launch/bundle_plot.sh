#!/usr/bin/env bash
# Makes fslora_jax/report/plot.min.js anew: those parts of Observable Plot and D3 that the report's page draws with.
# usage: launch/bundle_plot.sh      (needs npm; only for a newer version of Plot)
set -euo pipefail
cd "$(dirname "$0")/.."
target=$PWD/fslora_jax/report/plot.min.js
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
npm install --silent --no-save @observablehq/plot@0.6.17 esbuild@0.28.2
echo 'export { plot, areaY, dot, barX, gridX, gridY, lineY, link, pointer, pointerY, ruleX, ruleY, stackX, text, tip }
  from "@observablehq/plot";' > page.js
npx esbuild page.js --bundle --minify --format=iife --global-name=Plot --legal-comments=none --target=es2020 \
  --outfile=plot.min.js
{
  echo "/*! Observable Plot 0.6.17 and parts of D3 7, made by launch/bundle_plot.sh, under their licences:"
  for package in @observablehq/plot d3 d3-geo d3-scale-chromatic; do
    printf '\n%s\n' "$package"
    sed 's#https\?://##g; s#\*/##g' "node_modules/$package/LICENSE"
  done
  echo "*/"
  cat plot.min.js
} > "$target"
