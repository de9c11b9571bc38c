#!/bin/sh
# How far a plain LoRA is from the demo model's HDMoLE adapters, for each accent on its two samples.
# Writes assets/results/export.json, from which docs/models.md has its figures.
set -e
out=$(mktemp -d)
for method in hdmole hdmole-extended; do
  for accent in british caribbean french german indian mandarin scottish spanish; do
    .venv/bin/hdmole export --accent $accent --method $method --speech assets/demo/samples/manifest.jsonl --out "$out/$method-$accent"
  done
done
.venv/bin/python -c "
import json, sys
from pathlib import Path
found = [json.loads(file.read_text()) for file in sorted(Path(sys.argv[1]).glob('*/export.json'))]
Path('assets/results/export.json').write_text(json.dumps(found, indent=1) + '\n')
" "$out"
rm -r "$out"
