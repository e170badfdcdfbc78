#!/bin/sh
# A worker pool: no port, and a CPU that is not throttled between requests. Secrets from Secret Manager.
set -eu
gcloud run worker-pools deploy @APP@ --source . --region "${REGION:-us-central1}" --scaling=1 \
  --set-secrets BOT_TOKEN=@APP@-token:latest,DATABASE_URL=@APP@-database:latest
