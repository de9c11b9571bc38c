#!/bin/sh
# The speed of one layer on this machine, into assets/results/bench and docs/speed.md. Usage: runs/bench.sh [cuda]
set -e
cd "$(dirname "$0")/.."
case "${1:-cpu}" in
    cuda) hdmole bench layer --device cuda --json assets/results/bench/layer-gpu.json --docs docs/speed.md ;;
    *) OMP_NUM_THREADS=1 hdmole bench layer --json assets/results/bench/layer-cpu.json --docs docs/speed.md ;;
esac
