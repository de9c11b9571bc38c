#!/bin/sh
# The paper's tables, on the work folder that `hdmole demo build` leaves; one core. It goes on where it was cut off.
set -e
hdmole demo recognisers
hdmole compare --config runs/paper.toml --out results/paper --readme docs/compare.md
mkdir -p assets/results/paper
cp results/paper/summary.json results/paper/utterances.parquet results/paper/routing.parquet assets/results/paper/
