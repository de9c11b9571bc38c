#!/bin/sh
# Accents that conflict, on the base that `hdmole demo build` leaves; goes on where it was cut off.
set -e
hdmole demo conflicts --work build/demo --out build/conflicts
accelerate launch --cpu --num_machines 1 --num_processes "${PROCESSES:-2}" --mixed_precision no --dynamo_backend no \
    -m hdmole.cli compare --config runs/conflicts.toml --out results/conflicts
mkdir -p assets/results/conflicts
cp results/conflicts/summary.json results/conflicts/utterances.parquet results/conflicts/routing.parquet assets/results/conflicts/
