#!/usr/bin/env bash
# All hosts of a TPU VM, with checkpoints in a bucket:
#   TPU=my-tpu ZONE=us-east5-a RUN=gs://bucket/runs/1 examples/launch/tpu-vm.sh
set -euo pipefail
on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$1"
}
on_all_hosts "cd lazy_orbax && pip install -q -e '.[examples]' 'jax[tpu]' gcsfs google-cloud-storage"
on_all_hosts "cd lazy_orbax && python examples/multihost_train.py --directory='$RUN' --steps=1000 --save-every=100"
