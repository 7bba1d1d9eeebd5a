#!/usr/bin/env bash
# MLX's ring backend mixes up sums that one process asks for on two streams: each stream sends when its turn comes, the
# other process's streams need not be in the same order, and messages carry no name. So a sum of ones meets a sum of
# hundreds, both results are wrong, and nothing is raised. On one stream all sums are right. A loop that runs one step
# ahead on a stream of its own, as mlx-lm's does, asks on two.
# Exits 0 while sums on two streams come out wrong and those on one right, 1 once that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check "mlx[cpu]==0.32.4"
cat > sums.py <<'PYTHON'
from importlib.metadata import version

import mlx.core as mx

ROUNDS = 200
group = mx.distributed.init(strict=True, backend="ring")
rank = group.rank()
streams = [mx.new_stream(mx.cpu) for _ in range(2)]
for name, (first, second) in (("one stream", streams[:1] * 2), ("two streams", streams)):
    wrong = 0
    for _ in range(ROUNDS):
        ones, hundreds = mx.full((4096,), 1.0 + rank), mx.full((4096,), 100.0 * (1 + rank))
        mx.eval(ones, hundreds)
        sums = mx.distributed.all_sum(ones, stream=first), mx.distributed.all_sum(hundreds, stream=second)
        mx.eval(sums)
        wrong += not all(mx.all(s == want).item() for s, want in zip(sums, (3.0, 300.0)))
    print(f"mlx {version('mlx')}, process {rank}, {name}: {wrong} of {ROUNDS} pairs of sums wrong", flush=True)
PYTHON
echo "expected no pair of sums is wrong, on one stream or on two"
PATH="$work/env/bin:$PATH" timeout 120 mlx.launch -n 2 --backend ring -- "$work/env/bin/python" sums.py > output 2>&1
grep "pairs of sums" output | sort
[ "$(grep -c 'one stream: 0 of' output)" = 2 ] && grep -q "two streams: [1-9]" output
