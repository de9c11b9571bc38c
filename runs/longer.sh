#!/bin/sh
# The headline's methods trained twice as long, on the work folder that `hdmole demo build` leaves; goes on where it was cut off.
set -e
accelerate launch --cpu --num_machines 1 --num_processes "${PROCESSES:-2}" --mixed_precision no --dynamo_backend no \
    -m hdmole.cli compare --config runs/longer.toml --out results/longer
mkdir -p assets/results/longer
cp results/longer/summary.json results/longer/utterances.parquet results/longer/routing.parquet assets/results/longer/
