#!/bin/sh
# Every method in the encoder, on the work folder that `hdmole demo build` leaves; goes on where it was cut off.
set -e
accelerate launch --cpu --num_machines 1 --num_processes "${PROCESSES:-2}" --mixed_precision no --dynamo_backend no \
    -m hdmole.cli compare --config runs/encoder.toml --out results/encoder
mkdir -p assets/results/encoder
cp results/encoder/summary.json results/encoder/utterances.parquet assets/results/encoder/
