#!/bin/sh
# Run a merge as a job of a Ray cluster and follow it:
#     RAY_API_SERVER_ADDRESS=http://HEAD:8265 RAY_AUTH_TOKEN_PATH=token scripts/submit.sh config.yaml s3://bucket/merged
# Arguments and exit status are those of `raymoe submit`; raymoe is this clone's, in VENV or on PATH.
set -eu
venv=${VENV:-$(dirname "$0")/../.venv}
if [ -x "$venv/bin/raymoe" ]; then
    exec "$venv/bin/raymoe" submit "$@"
fi
exec raymoe submit "$@"
