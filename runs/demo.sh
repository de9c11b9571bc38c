#!/bin/sh
# The demo model and its results: give the folders of real speech, each with a manifest.jsonl, as arguments.
set -e
for folder in "$@"; do set -- "$@" --real-speech "$folder"; shift; done
hdmole demo build "$@"
hdmole demo info --readme docs/compare.md
