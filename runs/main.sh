#!/bin/sh
# The headline comparison, on the work folder that `hdmole demo build` leaves; goes on where it was cut off.
set -e
accelerate launch --cpu --num_machines 1 --num_processes "${PROCESSES:-2}" --mixed_precision no --dynamo_backend no \
    -m hdmole.cli compare --config runs/main.toml --out results/main --readme docs/compare.md
mkdir -p assets/results/main
cp results/main/summary.json results/main/utterances.parquet results/main/routing.parquet assets/results/main/
