#!/bin/sh
# Every method in the projector, on the work folder that `hdmole demo build` leaves; goes on where it was cut off.
set -e
accelerate launch --cpu --num_machines 1 --num_processes "${PROCESSES:-2}" --mixed_precision no --dynamo_backend no \
    -m hdmole.cli compare --config runs/projector.toml --out results/projector
mkdir -p assets/results/projector
cp results/projector/summary.json results/projector/utterances.parquet results/projector/routing.parquet assets/results/projector/
