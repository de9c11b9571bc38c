#!/bin/sh
# Real people as the target, on the work folder that `hdmole demo build` leaves; one core. It goes on where it was cut off.
set -e
hdmole demo people
hdmole compare --config runs/people.toml --out results/people
mkdir -p assets/results/people
cp results/people/summary.json results/people/utterances.parquet results/people/routing.parquet assets/results/people/
