#!/bin/sh
# HDMoLE of other ranks and in other places, on the work folder that `hdmole demo build` leaves; goes on where it was cut off.
set -e
accelerate launch --cpu --num_machines 1 --num_processes "${PROCESSES:-2}" --mixed_precision no --dynamo_backend no \
    -m hdmole.cli compare --config runs/places.toml --out results/places
mkdir -p assets/results/places
cp results/places/summary.json results/places/utterances.parquet results/places/routing.parquet assets/results/places/
