# What the examples' scripts share; they source it.

device=(--cpu)
if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then device=(); fi

with_peak_memory='
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
print(f"peak memory: {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024:,.0f} MiB")
sys.exit(code if code >= 0 else 128 - code)'

say() { printf '\n== %s\n' "$*"; }
# Run a step with its output, and the most memory that it took, in a log; show the end of the log if the step fails.
logged() {
  local log=$1
  shift
  if ! python -c "$with_peak_memory" "$@" >"$log.part" 2>&1; then
    tail -n 25 "$log.part" >&2
    echo "failed; all of it: $log.part" >&2
    exit 1
  fi
  mv "$log.part" "$log"
}

# Note what the results in a directory are of, and refuse a directory that holds the results of something else.
note_source() { # directory, description, variable that names another directory
  echo "$2" >"$1/source.new"
  if [ -e "$1/source" ] && ! cmp -s "$1/source" "$1/source.new"; then
    echo "$1 holds the results for $(cat "$1/source"): remove it, or name another directory with $3=..." >&2
    rm "$1/source.new"
    exit 1
  fi
  mv "$1/source.new" "$1/source"
}
