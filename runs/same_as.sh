#!/bin/sh
# Does this working tree give what the commit REF gave, bit for bit? Usage: runs/same_as.sh REF
# Both versions are run through the command line on the demo model. What differs is printed, and the exit status is then 1.
set -e
cd "$(dirname "$0")/.."
after=$PWD
kept=$(mktemp -d)
before=$kept/tree
export PYTHON="${PYTHON:-python}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1
git worktree add --quiet --detach "$before" "$1"
trap 'git -C "$after" worktree remove --force "$before"; rm -rf "$kept"' EXIT
for tree in before after; do
    eval "folder=\$$tree"
    (cd "$folder" && PYTHONPATH=$folder "$PYTHON" "$after/runs/same_as.py" run "$kept/$tree" 2>"$kept/$tree.log") ||
        { cat "$kept/$tree.log"; exit 1; }
done
"$PYTHON" runs/same_as.py compare "$kept/before" "$kept/after"
