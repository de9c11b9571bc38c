#!/bin/sh
# The variants of HDMoLE and their baselines, on the work folder that `hdmole demo build` leaves; goes on where it was cut off.
set -e
accelerate launch --cpu --num_machines 1 --num_processes "${PROCESSES:-2}" --mixed_precision no --dynamo_backend no \
    -m hdmole.cli compare --config runs/variants.toml --out results/variants
mkdir -p assets/results/variants
cp results/variants/summary.json results/variants/utterances.parquet results/variants/routing.parquet assets/results/variants/
