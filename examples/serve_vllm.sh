#!/usr/bin/env bash
# Serve a model over the ranks of this host with compressed sums, ask it something, and see what was sent.
#
# examples/serve_vllm.sh [MODEL] [RANKS]
#
# FLASHCOMM_CODEC or FLASHCOMM_POLICY choose what is compressed: nothing where ranks share memory, as it does not pay there,
# unless a policy names an algorithm. docs/vllm.md says more.
set -euo pipefail
model=${1:-$(python -c 'import flashcomm.demo; print(flashcomm.demo.MODEL)')}
ranks=${2:-2}
port=${PORT:-8000}
[ -n "${FLASHCOMM_POLICY:-}" ] || export FLASHCOMM_CODEC=${FLASHCOMM_CODEC:-int8g128}

python -m vllm.entrypoints.openai.api_server --model "$model" --served-model-name demo \
  --tensor-parallel-size "$ranks" --host 127.0.0.1 --port "$port" &
server=$!
trap 'kill $server 2>/dev/null; wait $server || true' EXIT
until curl -sf "localhost:$port/health" >/dev/null; do
  kill -0 $server || exit 1
  sleep 1
done

curl -s "localhost:$port/v1/completions" -H 'Content-Type: application/json' \
  -d '{"model": "demo", "prompt": "def read_config(path):\n", "max_tokens": 16, "temperature": 0}'
echo
sleep 2
curl -s "localhost:$port/metrics" | grep '^flashcomm'
